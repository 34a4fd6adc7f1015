"""The commands and their options for argparse. This module is quick to import, so that `ipfsfuse --help` is
quick.

Each command names its function as "module:function" in `ipfsfuse.cli`. The module is imported when the
command runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from ipfsfuse import __version__, units
from ipfsfuse.cli import console, settings
from ipfsfuse.errors import UsageError

SOURCES_HELP = (
    "where blocks come from; repeat it to ask several sources in order: `library` (what `add` put there), a "
    "CAR file, `kubo` or kubo+http://HOST:PORT, https://GATEWAY, `gateway` (those that IPFS_GATEWAY or "
    "~/.config/ipfs/gateway name), `network` (needs --router). Default: the library, this machine's Kubo "
    "node if it has one, and `gateway`"
)

ROUTER_HELP = "a delegated router, which is asked who has a block (`--from network`) and for IPNS records"
PRIVATE_HELP = "let `network` also ask providers at loopback and private addresses, for private networks"
DNS_HELP = "a DNS-over-HTTPS server to ask for DNSLink (default: this system's resolver)"
RESERVE_HELP = (
    "bytes to leave free on the cache's disk (default: a twentieth of it, at most 2GiB; 0 for none)"
)


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises its errors as UsageErrors of one line."""

    commands: "Mapping[str, Parser]"
    """The parsers of the commands."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises UsageError; SystemExit for --help and --version."""
    words = _of_mount_8(sys.argv[1:] if argv is None else list(argv))
    parser = build()
    commands = parser.commands
    if words and not words[0].startswith("-"):
        _refuse_unknown(words[0], commands)
    options: dict[str, list[tuple[argparse.Action, object]]] = {}
    for name, command in commands.items():
        found = [each for each in command._actions if each.option_strings and each.dest != "help"]
        options[name] = [(each, each.default) for each in found]
        for each in found:
            each.default = argparse.SUPPRESS  # so that an option that was given differs from one that was not
    arguments, unknown = parser.parse_known_args(words, argparse.Namespace(argv=words))
    if unknown:
        command = commands[arguments.command]
        known = [name for each in command._actions for name in each.option_strings if name.startswith("--")]
        raise UsageError(_not_taken(unknown[0], arguments.command, known))
    settings.fill(arguments, options[arguments.command])
    return arguments


def _refuse_unknown(word: str, commands: Iterable[str]) -> None:
    if word not in commands:
        todo = console.suggestion(word, commands, "`ipfsfuse help` lists the commands")
        raise UsageError(f"{word!r} is not a command: {todo}")


def _not_taken(word: str, command: str, known: Iterable[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one word too many for {command} (see ipfsfuse {command} --help)"
    name = word.partition("=")[0]
    todo = console.suggestion(name, known, f"`ipfsfuse help {command}` lists them")
    return f"{name} is not an option of {command}: {todo}"


_IGNORED = {
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "auto", "noauto", "user", "nouser",
    "users", "nofail", "_netdev", "defaults", "sync", "async", "atime", "noatime", "relatime", "norelatime",
    "diratime", "nodiratime", "lazytime", "nolazytime", "default_permissions",
}  # fmt: skip
"""Options of mount(8) without an effect here: every mount is nosuid, nodev and read-only."""
_OF_MOUNT = frozenset(settings.SETTINGS) - {"listen", "allow-host", "fetch", "cid-version", "profile", "user"}


def _of_mount_8(words: list[str]) -> list[str]:
    """Translates `SOURCE DIR -o OPTIONS`, the arguments from mount(8), into those of `mount`.

    Raises UsageError."""
    if len(words) < 3 or "-o" not in words[2:] or words[0].startswith("-") or words[0] in ("get", "mount"):
        return words
    source, directory, *rest = words
    out = ["mount", directory]
    if source not in ("none", "ipfsfuse"):
        out += [f"--from={source}"]
    while rest:
        flag = rest.pop(0)
        if flag in ("-n", "-s", "-v", "-f"):
            continue
        if flag != "-o" or not rest:
            raise UsageError(f"{flag} can't come after SOURCE DIR: write -o OPTION[,OPTION]...")
        for option in filter(None, rest.pop(0).split(",")):
            name, equals, value = option.partition("=")
            spelled = name.replace("_", "-")
            if spelled in _OF_MOUNT:
                out.append(f"--{spelled}={value}" if equals else f"--{spelled}")
            elif name not in _IGNORED and not name.startswith(("x-", "user=", "comment")):
                todo = console.suggestion(spelled, _OF_MOUNT, "`ipfsfuse mount --help` lists them")
                raise UsageError(f"-o {option}: not an option of a mount: {todo}")
    return out


def build() -> Parser:
    """The parser of all commands, also for the man page."""
    parser = Parser(
        prog="ipfsfuse",
        allow_abbrev=False,
        description="IPFS as a read-only directory.",
        epilog="Exit codes: 0 success; 1 failure; 2 usage error; 75 another process uses the cache folder; "
        "130 interrupted. `status` exits with 3 if the mount is degraded.",
    )
    parser.add_argument("--version", action="version", version=f"ipfsfuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_library, _content, _mounts, _to_a_mount, _others):
        add(commands)
    parser.commands = commands.choices
    return parser


def _type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert` as an argparse type that shows the message of its UsageError."""

    def typed(text: str) -> Any:
        try:
            return convert(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return typed


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise UsageError("an empty path")
    return text


def _as_stored(text: str) -> str:
    """A path below a CID. Its names have the bytes of the argument, whatever the locale is."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


_SIZE, _SIZE_OR_ZERO, _DURATION = _type(units.size), _type(units.size_or_zero), _type(units.duration)
_COUNT, _OWNER, _OCTAL, _PATH = _type(units.count), _type(units.owner), _type(units.octal), _type(_path)


def _command(
    commands: Any, name: str, run: str, about: str, json: str = "print JSON, also for a failure"
) -> argparse.ArgumentParser:
    """A command with only the argument --json, which every command has."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    _switches(parser, {"--json": json})
    return parser


def _switches(parser: argparse.ArgumentParser, about: Mapping[str, str]) -> None:
    """Options without a value: their spellings, and their help texts."""
    for names, says in about.items():
        parser.add_argument(*names.split(), action="store_true", help=says)


# -- arguments that several commands have --------------------------------------------------------------------


def _sources(parser: argparse.ArgumentParser, names: bool = True) -> None:
    """Adds the options for sources and, with `names`, for resolving IPNS names."""
    parser.add_argument("--from", dest="sources", action="append", metavar="SOURCE", help=SOURCES_HELP)
    parser.add_argument("--router", dest="routers", action="append", metavar="URL", help=ROUTER_HELP)
    _switches(parser, {"--allow-private-providers": PRIVATE_HELP})
    if names:
        parser.add_argument("--dns", default="system", metavar="URL", help=DNS_HELP)
    parser.add_argument(
        "--header-file", dest="header_files", action="append", metavar="URL=FILE", type=_PATH,
        help="HTTP headers for the source at URL: one `Name: value` per line, in a file that only you may "
        "read",
    )  # fmt: skip


def _folders(parser: argparse.ArgumentParser, library: bool = True) -> None:
    parser.add_argument(
        "--cache-dir", metavar="DIR", type=_PATH,
        help="the cache folder (default: $IPFSFUSE_CACHE_DIR, else ~/.cache/ipfsfuse)",
    )  # fmt: skip
    if library:
        parser.add_argument(
            "--library", metavar="DIR", type=_PATH,
            help="the library (default: $IPFSFUSE_LIBRARY, else ~/.local/share/ipfsfuse/library)",
        )  # fmt: skip


def _bounds(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the size of the cache and the time of a read."""
    parser.add_argument(
        "--budget", type=_SIZE, default=units.size("10GiB"), metavar="SIZE",
        help="bytes that the cache may use on disk (default: 10GiB)",
    )  # fmt: skip
    parser.add_argument("--reserve", type=_SIZE_OR_ZERO, metavar="SIZE", help=RESERVE_HELP)
    parser.add_argument(
        "--deadline", type=_DURATION, default=30.0, metavar="TIME",
        help="how long a read waits for a block before it fails (default: 30s)",
    )  # fmt: skip


# -- commands without a mount --------------------------------------------------------------------------------


def _library(commands: Any) -> None:
    add = _command(
        commands, "add", "library:add", "add files and folders to the library and print their CIDs"
    )
    add.add_argument(
        "paths", nargs="+", metavar="PATH", help="a file, a folder or a symlink; - for standard input"
    )
    add.add_argument(
        "--cid-version", type=int, choices=[0, 1], help="1 is the profile unixfs-v1-2025, 0 is unixfs-v0-2015"
    )
    add.add_argument(
        "--profile", default="unixfs-v1-2025", choices=["unixfs-v1-2025", "unixfs-v0-2015"],
        help="how files are split into blocks, which decides their CIDs (default: unixfs-v1-2025)",
    )  # fmt: skip
    _switches(add, {
        "-q --quiet": "print only the CIDs",
        "-Q --quieter": "print only the last CID",
        "-r --recursive": "accepted for compatibility with `ipfs add`; a folder is always added whole",
        "-w --wrap-with-directory": "wrap the PATHs in a new folder",
        "-H --hidden": "also add files whose names begin with a dot",
        "-n --only-hash": "print the CIDs without adding anything",
        "--preserve-mode": "store permissions",
        "--preserve-mtime": "store modification times",
    })  # fmt: skip
    cars = _command(
        commands, "import", "library:import_cars", "add CAR files to the library and verify every block"
    )
    cars.add_argument("files", nargs="+", metavar="FILE.car", type=_PATH, help="a CAR file with roots")
    library = _command(commands, "library", "library:show", "list the roots in the library")
    _switches(library, {"--compact": "first free the space of what `rm` removed"})
    remove = _command(commands, "rm", "library:remove", "remove a CID from the library")
    remove.add_argument("cid", metavar="CID", help="a CID that `ipfsfuse library` lists")
    for parser in (add, cars, library, remove):
        _folders(parser)


def _content(commands: Any) -> None:
    export = _command(
        commands, "export", "reading:export", "write a CID and everything below it to a CAR file"
    )
    export.add_argument("cid", type=_as_stored, metavar="CID", help="the root to write")
    export.add_argument(
        "file", metavar="FILE.car", type=_PATH, help="the file to write; - for standard output"
    )
    _switches(export, {"--v2": "write CARv2, with an index"})
    push = _command(
        commands,
        "push",
        "reading:push",
        "send a CID and everything below it to a Kubo node, and pin it there",
    )
    push.add_argument("cid", type=_as_stored, metavar="CID", help="the root to send")
    push.add_argument(
        "--to",
        metavar="NODE",
        default="kubo",
        help="kubo+http://HOST:PORT (default: kubo, this machine's node)",
    )
    cat = _command(
        commands, "cat", "reading:cat", "print a file, without a mount",
        "print lines of JSON: the content in base64 pieces, then its size",
    )  # fmt: skip
    cat.add_argument(
        "path", type=_as_stored, metavar="CID/PATH", help="/ipfs/CID/a/b, CID/a/b, or /ipns/NAME/a/b"
    )
    _switches(cat, {"--raw": "print the block itself, whatever its codec"})
    get = _command(commands, "get", "reading:get", "copy a file or a directory, without a mount")
    get.add_argument(
        "path", type=_as_stored, metavar="CID/PATH", help="/ipfs/CID/a/b, CID/a/b, or /ipns/NAME/a/b"
    )
    get.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        type=_PATH,
        help="where to write it (default: under its own name in this folder)",
    )
    serve = _command(
        commands, "serve", "mounting:serve", "serve local content over HTTP, as a trustless gateway",
        "print the addresses and the pid",
    )  # fmt: skip
    serve.add_argument(
        "--listen",
        default="127.0.0.1:8080",
        metavar="HOST:PORT",
        help="where to listen (default: 127.0.0.1:8080)",
    )
    serve.add_argument(
        "--allow-host", type=_type(units.host_name), action="append", metavar="NAME",
        help="answer requests for this host name, such as a reverse proxy's, and else only those for this "
        "machine's names (at a loopback address only those are answered without this option)",
    )  # fmt: skip
    _switches(serve, {"--fetch": "also fetch what is not here, for any client"})
    _bounds(serve)
    for parser in (export, push, cat, get, serve):
        _sources(parser)
        _folders(parser)


# -- mounts --------------------------------------------------------------------------------------------------


def _mounts(commands: Any) -> None:
    mount = _command(
        commands, "mount", "starting:run", "mount IPFS at an empty folder, in the background",
        "print where it is mounted, the control socket and the pid",
    )  # fmt: skip
    mount.add_argument(
        "mountpoint", metavar="MOUNTPOINT|NAME", nargs="?", type=_PATH,
        help="an empty folder, or the name of a mount in the configuration",
    )  # fmt: skip
    _mount_options(mount)
    _switches(mount, {
        "--all": "mount everything that the configuration names",
        "--foreground": "stay in the foreground, and log to standard error",
    })  # fmt: skip
    mount.add_argument("--ready-fd", type=int, metavar="N", help=argparse.SUPPRESS)
    unmount = _command(
        commands, "unmount", "mounting:unmount", "unmount, or say which process keeps the mount busy"
    )
    unmount.add_argument(
        "mountpoint", metavar="MOUNTPOINT|NAME", nargs="?", type=_PATH,
        help="where it is mounted, or its name in the configuration",
    )  # fmt: skip
    _switches(unmount, {
        "--all": "unmount every mount of this user whose daemon is known",
        "--lazy": "detach now, while programs may still have files open",
    })  # fmt: skip
    _folders(unmount, library=False)
    _command(
        commands, "mounts", "mounting:show_mounts", "list mounts: whose, since when, and whether they answer"
    )


def _mount_options(parser: argparse.ArgumentParser) -> None:
    _sources(parser)
    _folders(parser)
    _bounds(parser)
    parser.add_argument(
        "--ipns", metavar="DIR", type=_PATH,
        help="show IPNS names and domains in this empty folder, as symlinks into MOUNTPOINT",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", metavar="CID|FILE",
        help="show only these CIDs and what is below them; FILE lists one CID per line",
    )  # fmt: skip
    parser.add_argument(
        "--record", metavar="FILE", type=_PATH, help="write the CID of every block that is used to FILE"
    )
    parser.add_argument(
        "--pins", choices=["kubo", "none"], default="kubo",
        help="kubo: have the Kubo nodes among the sources keep what is staged; none: don't (default: kubo)",
    )  # fmt: skip
    parser.add_argument(
        "--max-fetch", type=_SIZE_OR_ZERO, metavar="SIZE",
        help="the most bytes to fetch, from all sources together; after that, reads of what is missing "
        "fail with EIO",
    )  # fmt: skip
    parser.add_argument(
        "--bwlimit",
        type=_SIZE,
        metavar="RATE",
        help="the most bytes to fetch per second, from all sources together",
    )
    parser.add_argument(
        "--uid", type=_OWNER, metavar="N", help="the owner to show (default: the user who mounts)"
    )
    parser.add_argument(
        "--gid", type=_OWNER, metavar="N", help="the group to show (default: the group of that user)"
    )
    parser.add_argument(
        "--umask",
        type=_OCTAL,
        metavar="MODE",
        default=0,
        help="permissions to remove from what is shown (default: 000)",
    )
    parser.add_argument(
        "--user", metavar="NAME", help="when root starts it, continue as this user, who then owns the mount"
    )
    _switches(parser, {
        "--offline": "use only local content; reads of anything else fail at once",
        "--allow-other": "let other users in: they can read everything in the mount, including the whole "
        "library",
        "--passthrough": "let the kernel read staged files directly, once each was verified whole (root "
        "only, Linux 6.9 or later)",
        "--isolated": "use a new cache folder, which is removed with the mount",
        "--while-held": "end when the last connection that holds the mount closes, and remove MOUNTPOINT",
        "--unconfined": "switch the daemon's confinement off (landlock, no_new_privs): it can then reach "
        "every file of its user",
    })  # fmt: skip
    parser.add_argument(
        "--log-level", choices=["debug", "info", "warning", "error"], default="info",
        help="the least severe messages to log (default: info)",
    )  # fmt: skip
    parser.add_argument(
        "--log-file",
        metavar="FILE",
        type=_PATH,
        help="log to FILE and keep one older file (default: in the cache folder)",
    )
    parser.add_argument(
        "--log-format", choices=["text", "json", "journal"], default="text",
        help="json: one object per line; journal: with journald's priorities (default: text)",
    )  # fmt: skip


# -- commands to a running mount, through its control socket -------------------------------------------------


class _CheckLibrary(argparse.Action):
    """`--library [DIR]` of `fsck`: without DIR, the library is the one that the configuration names."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        namespace.check_library = True
        if values is not None:
            setattr(namespace, self.dest, values)


def _to_a_mount(commands: Any) -> None:
    def command(name: str, run: str, about: str) -> argparse.ArgumentParser:
        parser = _command(commands, name, run, about)
        parser.add_argument(
            "--mount", metavar="MOUNTPOINT|NAME", type=_PATH,
            help="the mount to ask (default: the mount that uses the cache folder)",
        )  # fmt: skip
        _folders(parser, library=False)
        return parser

    def items(parser: argparse.ArgumentParser, number: str = "+", more: str = "") -> None:
        says = f"a CID, CID/a/b, /ipns/NAME, or a path in a mount{more}"
        parser.add_argument("items", type=_as_stored, metavar="CID|PATH", nargs=number, help=says)

    status = command("status", "status:run", "show how a running mount is doing: sources, cache, pins")
    _switches(status, {"--watch": "show a live view until Ctrl-C"})
    status.add_argument("--html", metavar="FILE", type=_PATH, help="write a web page; - for standard output")
    listing = command("ls", "remote:ls", "list what is staged: names, sizes, completeness, last use, pins")
    _switches(listing, {"--tree": "show a tree, with small files and directories too"})
    pin = command(
        "pin",
        "remote:pin",
        "fetch CIDs whole and keep them until they are unpinned; `pin ls` lists them",
    )
    items(pin, more="; or `ls` to list the pins")
    items(command("unpin", "remote:unpin", "unpin CIDs, so that they may be evicted"))
    prefetch = command("prefetch", "remote:prefetch", "fetch CIDs and everything below them into the cache")
    items(prefetch)
    prefetch.add_argument(
        "--depth", type=_COUNT, metavar="N", help="how many levels of folders to descend (default: all)"
    )
    evict = command("evict", "remote:evict", "remove CIDs from the cache")
    items(evict, "*")
    _switches(evict, {"--all": "remove everything that is not pinned"})
    budget = command("budget", "remote:budget", "change the cache budget of a running mount")
    budget.add_argument("size", metavar="SIZE", type=_SIZE, help="such as 10GiB; what exceeds it is evicted")
    fsck = command("fsck", "remote:fsck", "hash everything in the cache again, and replace what is wrong")
    fsck.add_argument("file", metavar="FILE.car", nargs="?", type=_PATH, help="check this CAR file instead")
    fsck.set_defaults(check_library=False)
    fsck.add_argument(
        "--library", metavar="DIR", nargs="?", action=_CheckLibrary,
        help="check the library instead (default: $IPFSFUSE_LIBRARY, else ~/.local/share/ipfsfuse/library)",
    )  # fmt: skip
    logs = command("logs", "logs:show", "show the log of a mount")
    logs.add_argument(
        "-n", "--lines", type=_COUNT, default=50, metavar="N", help="how many lines to show (default: 50)"
    )
    _switches(logs, {"-f --follow": "go on printing what is logged"})
    logs.add_argument("--log-file", metavar="FILE", type=_PATH, help="the file that the mount logs to")
    metrics = command("metrics", "metrics:run", "print the metrics of a running mount, as OpenMetrics")
    metrics.add_argument("--listen", metavar="HOST:PORT", help="serve them over HTTP instead")
    metrics.add_argument(
        "--textfile", metavar="FILE", type=_PATH, help="write them to FILE, for a node exporter"
    )


# -- the rest ------------------------------------------------------------------------------------------------


def _others(commands: Any) -> None:
    doctor = _command(
        commands, "doctor", "doctor:run", "check this machine and its mounts, and say what to fix"
    )
    _bounds(doctor)
    _sources(doctor, names=False)
    _folders(doctor)
    config = _command(
        commands, "config", "settings:show", "show the settings of a mount, and where each comes from"
    )
    config.add_argument("mountpoint", metavar="NAME", nargs="?", help="a mount that the configuration names")
    _switches(
        config, {"--init": "write a configuration file for this user, with every setting commented out"}
    )
    _mount_options(config)
    help_ = _command(commands, "help", "parser:print_help", "explain a command, or list all commands")
    help_.add_argument(
        "about", metavar="COMMAND", nargs="?", help="the command to explain (default: list all commands)"
    )
    completion = _command(commands, "completion", "parser:print_completion", "print completions for a shell")
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))


SHELLS = ("bash", "zsh", "fish", "tcsh")


def print_completion(arguments: argparse.Namespace) -> int:
    """Write it where the shell looks: bash reads /usr/share/bash-completion/completions/ipfsfuse."""
    import shtab  # 30 ms, and only for this

    if arguments.shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"shtab {shtab.__version__} makes no completions for {arguments.shell}")
    script = shtab.complete(build(), arguments.shell)
    return console.answer(arguments, {"shell": arguments.shell, "script": script}, *script.splitlines())


def print_help(arguments: argparse.Namespace) -> int:
    parser = build()
    if arguments.about is not None:
        _refuse_unknown(arguments.about, parser.commands)
        parser = parser.commands[arguments.about]
    text = parser.format_help()
    return console.answer(arguments, {"command": arguments.about, "help": text}, *text.splitlines())
