"""The commands and their options, as one table for argparse. Imports nothing that takes long: `ipfsfuse
--help` is quick.

Each command names the function that runs it as "module:function" below `ipfsfuse.cli`, imported when it is
called.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from ipfsfuse import __version__, units
from ipfsfuse.cli import console, settings
from ipfsfuse.errors import UsageError

SOURCES_HELP = (
    "SOURCE, in the order to ask: `library` (what `add` put there), a CAR file, `kubo` or "
    "kubo+http://HOST:PORT, https://GATEWAY, `gateway` (those that IPFS_GATEWAY or ~/.config/ipfs/gateway "
    "name), `network` (with --router); by default the library, the Kubo node of this machine if it has one, "
    "and `gateway`"
)

ROUTER_HELP = "a delegated router: asked who has a block (`--from network`), and for IPNS records"
PRIVATE_HELP = "let `network` ask providers at loopback and private addresses too: for private networks"
DNS_HELP = "a DNS-over-HTTPS server to ask for DNSLink (this system's resolver)"
RESERVE_HELP = "bytes of the disk that the cache leaves free (a twentieth, at most 2GiB; 0 for none)"


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UsageErrors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises UsageError; SystemExit for --help and --version."""
    words = _of_mount_8(sys.argv[1:] if argv is None else list(argv))
    parser, commands = build()
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
        close = difflib.get_close_matches(word, commands, 1)
        todo = f"did you mean {close[0]}?" if close else "`ipfsfuse help` lists the commands"
        raise UsageError(f"{word!r} is not a command: {todo}")


def _not_taken(word: str, command: str, known: Iterable[str]) -> str:
    if not word.startswith("-"):
        return f"{word!r} is one word too many for {command} (see ipfsfuse {command} --help)"
    name = word.partition("=")[0]
    close = difflib.get_close_matches(name, known, 1)
    todo = f"did you mean {close[0]}?" if close else f"`ipfsfuse help {command}` lists them"
    return f"{name} is not an option of {command}: {todo}"


_IGNORED = {
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "auto", "noauto", "user", "nouser",
    "users", "nofail", "_netdev", "defaults", "sync", "async", "atime", "noatime", "relatime", "norelatime",
    "diratime", "nodiratime", "lazytime", "nolazytime", "default_permissions",
}  # fmt: skip
"""Options of mount(8) that change nothing here: every mount is nosuid and nodev, and refuses to write."""
_OF_MOUNT = frozenset(settings.SETTINGS) - {"listen", "fetch", "cid-version", "profile", "user"}


def _of_mount_8(words: list[str]) -> list[str]:
    """`SOURCE DIR -o OPTIONS`, as mount(8) calls it, as words of `mount`. Raises UsageError."""
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
            raise UsageError(f"{flag} can't stand behind SOURCE DIR: write -o OPTION[,OPTION]...")
        for option in filter(None, rest.pop(0).split(",")):
            name, equals, value = option.partition("=")
            spelled = name.replace("_", "-")
            if spelled in _OF_MOUNT:
                out.append(f"--{spelled}={value}" if equals else f"--{spelled}")
            elif name not in _IGNORED and not name.startswith(("x-", "user=", "comment")):
                close = difflib.get_close_matches(spelled, _OF_MOUNT, 1)
                todo = f"did you mean {close[0]}?" if close else "`ipfsfuse mount --help` lists them"
                raise UsageError(f"-o {option}: not an option of a mount: {todo}")
    return out


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the commands."""
    codes = "Exit codes: 0; 1 it failed; 2 usage; of status also 3: degraded."
    parser = Parser(
        prog="ipfsfuse",
        allow_abbrev=False,
        description="IPFS as a read-only directory.",
        epilog=codes,
    )
    parser.add_argument("--version", action="version", version=f"ipfsfuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (_library, _mounts, _serving, _remote, _others):
        add(commands)
    return parser, commands.choices


def _type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert` as an argparse type that keeps the message of its UsageError."""

    def typed(text: str) -> Any:
        try:
            return convert(text)
        except UsageError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return typed


def _folder(text: str) -> str:
    if not text or "\0" in text:
        raise UsageError("an empty path")
    return text


_SIZE, _DURATION, _PATH = _type(units.size), _type(units.duration), _type(_folder)
_COUNT = _type(units.count)


def _command(commands: Any, name: str, run: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about[0].upper() + about[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _library(commands: Any) -> None:
    add = _command(
        commands, "add", "library:add", "import files and folders into the library; prints their CIDs"
    )
    add.add_argument(
        "paths", nargs="+", metavar="PATH", help="a file, a folder, a symlink; - for standard input"
    )
    add.add_argument("-q", "--quiet", action="store_true", help="print CIDs alone")
    add.add_argument("-Q", "--quieter", action="store_true", help="print the last CID alone")
    add.add_argument(
        "-r",
        "--recursive",
        action="store_true",
        help="accepted, as of `ipfs add`: a folder is always added whole",
    )
    add.add_argument(
        "--cid-version", type=int, choices=[0, 1], help="1 is the profile unixfs-v1-2025, 0 is unixfs-v0-2015"
    )
    add.add_argument(
        "--profile",
        default="unixfs-v1-2025",
        choices=["unixfs-v1-2025", "unixfs-v0-2015"],
        help="how files are cut into blocks, and so which CID they get (unixfs-v1-2025)",
    )
    add.add_argument(
        "-w", "--wrap-with-directory", action="store_true", help="put the PATHs into a folder of their own"
    )
    add.add_argument("-H", "--hidden", action="store_true", help="add files whose names begin with a dot too")
    add.add_argument("--only-hash", "-n", action="store_true", help="print the CIDs and add nothing")
    add.add_argument("--preserve-mode", action="store_true", help="store permissions")
    add.add_argument("--preserve-mtime", action="store_true", help="store modification times")
    cars = _command(commands, "import", "library:import_cars", "add CAR files to the library, verified")
    cars.add_argument("files", nargs="+", metavar="FILE.car", type=_PATH, help="a CAR file with roots")
    library = _command(commands, "library", "library:show", "list what `add` put into the library")
    remove = _command(commands, "rm", "library:remove", "remove a CID from the library")
    export = _command(
        commands, "export", "reading:export", "write a CID with all below it to a CAR file, verified"
    )
    remove.add_argument("cid", metavar="CID", help="a CID that `ipfsfuse library` lists")
    export.add_argument("cid", metavar="CID", help="the root of what is written")
    export.add_argument(
        "file", metavar="FILE.car", type=_PATH, help="the file to write; - for standard output"
    )
    export.add_argument("--v2", action="store_true", help="a CARv2 with an index")
    push = _command(
        commands, "push", "reading:push", "send a CID with all below it to a Kubo node, and pin it there"
    )
    push.add_argument("cid", metavar="CID", help="the root of what is sent")
    push.add_argument(
        "--to", metavar="NODE", default="kubo", help="kubo (this machine's), or kubo+http://HOST:PORT"
    )
    for parser in (add, cars, library, remove, export, push):
        _json(parser)
    library.add_argument("--compact", action="store_true", help="first free the space of what was removed")
    cat = _command(commands, "cat", "reading:cat", "write a file to standard output, without a mount")
    cat.add_argument("path", metavar="CID/PATH", help="/ipfs/CID/a/b, CID/a/b, or /ipns/NAME/a/b")
    cat.add_argument("--raw", action="store_true", help="the block of the CID as it is, of any codec")
    cat.add_argument(
        "--json", action="store_true", help="lines of JSON: pieces of the content in base64, then their sum"
    )
    for parser in (export, push, cat):
        _sources(parser)
    for parser in (add, cars, library, remove, export, push, cat):
        _folders(parser)


def _sources(parser: argparse.ArgumentParser, names: bool = True) -> None:
    """Where a command gets content and, with `names`, what IPNS names stand for."""
    parser.add_argument("--from", dest="sources", action="append", metavar="SOURCE", help=SOURCES_HELP)
    parser.add_argument("--router", dest="routers", action="append", metavar="URL", help=ROUTER_HELP)
    parser.add_argument("--allow-private-providers", action="store_true", help=PRIVATE_HELP)
    if names:
        parser.add_argument("--dns", default="system", metavar="URL", help=DNS_HELP)
    parser.add_argument(
        "--header-file", dest="header_files", action="append", metavar="URL=FILE", type=_PATH,
        help="HTTP headers for the source at URL, one `Name: value` a line in a file that you alone may read",
    )  # fmt: skip


def _json(parser: argparse.ArgumentParser, says: str = "print JSON, of a failure too") -> None:
    parser.add_argument("--json", action="store_true", help=says)


def _folders(parser: argparse.ArgumentParser, library: bool = True) -> None:
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        type=_PATH,
        help="the cache folder (IPFSFUSE_CACHE_DIR, else ~/.cache/ipfsfuse)",
    )
    if library:
        parser.add_argument(
            "--library",
            metavar="DIR",
            type=_PATH,
            help="the library (IPFSFUSE_LIBRARY, else ~/.local/share/ipfsfuse/library)",
        )


def _mounts(commands: Any) -> None:
    mount = _command(commands, "mount", "mounting:run", "mount IPFS at an empty folder, in the background")
    mount.add_argument(
        "mountpoint", metavar="MOUNTPOINT|NAME", nargs="?", type=_PATH,
        help="an empty folder, or the name of a mount in the configuration",
    )  # fmt: skip
    mount.add_argument("--all", action="store_true", help="every mount that the configuration names")
    _mount_options(mount)
    mount.add_argument(
        "--foreground", action="store_true", help="stay in the foreground, and log to standard error"
    )
    mount.add_argument(
        "--json", action="store_true", help="print where it is mounted, the control socket and the pid"
    )
    mount.add_argument("--ready-fd", type=int, metavar="N", help=argparse.SUPPRESS)
    unmount = _command(
        commands, "unmount", "mounting:unmount", "unmount; if it is busy, say which process uses it"
    )
    unmount.add_argument(
        "mountpoint", metavar="MOUNTPOINT|NAME", nargs="?", type=_PATH,
        help="where it is mounted, or its name in the configuration",
    )  # fmt: skip
    unmount.add_argument("--all", action="store_true", help="every mount of this user whose daemon is known")
    _json(unmount)
    unmount.add_argument("--lazy", action="store_true", help="unmount now; programs that use it may finish")
    _folders(unmount, library=False)
    doctor = _command(
        commands, "doctor", "doctor:run", "check this machine and its mounts, and say what to do"
    )
    _json(doctor)
    _bounds(doctor)
    _sources(doctor, names=False)
    _folders(doctor)


def _bounds(parser: argparse.ArgumentParser) -> None:
    """What a cache may take, and how long a read may."""
    parser.add_argument(
        "--budget",
        type=_SIZE,
        default=units.size("10GiB"),
        metavar="SIZE",
        help="bytes that the cache may take on disk (10GiB)",
    )
    parser.add_argument("--reserve", type=_type(units.size_or_zero), metavar="SIZE", help=RESERVE_HELP)
    parser.add_argument(
        "--deadline",
        type=_DURATION,
        default=30.0,
        metavar="TIME",
        help="a read fails after this long without a block (30s)",
    )


def _mount_options(parser: argparse.ArgumentParser) -> None:
    _sources(parser)
    parser.add_argument(
        "--ipns",
        metavar="DIR",
        type=_PATH,
        help="show IPNS names and domains in this empty folder, as symlinks into MOUNTPOINT",
    )
    parser.add_argument(
        "--offline", action="store_true", help="show what is here; anything else fails at once"
    )
    _folders(parser)
    _bounds(parser)
    parser.add_argument(
        "--allow",
        action="append",
        metavar="CID|FILE",
        help="these CIDs and what they hold, nothing else; a file lists one a line",
    )
    parser.add_argument(
        "--record", metavar="FILE", type=_PATH, help="write the CID of every block that is used"
    )
    parser.add_argument(
        "--allow-other",
        action="store_true",
        help="let other users in: they can read all that the mount shows, the whole library too",
    )
    parser.add_argument(
        "--passthrough",
        action="store_true",
        help="let the kernel read staged files itself, once they were verified whole: for root, Linux 6.9",
    )
    parser.add_argument(
        "--isolated", action="store_true", help="a cache folder of its own, gone with the mount"
    )
    parser.add_argument(
        "--while-held",
        action="store_true",
        help="end with the last connection that holds the mount, and remove MOUNTPOINT",
    )
    parser.add_argument(
        "--pins",
        choices=["kubo", "none"],
        default="kubo",
        help="kubo (the default): hold what is staged at the Kubo nodes among the sources",
    )
    parser.add_argument(
        "--max-fetch",
        type=_type(units.size_or_zero),
        metavar="SIZE",
        help="bytes to fetch at most, of all sources together; then reads of what is not here fail with EIO",
    )
    parser.add_argument(
        "--bwlimit", type=_SIZE, metavar="RATE", help="bytes a second to fetch, of all sources together"
    )
    parser.add_argument(
        "--uid", type=_type(units.owner), metavar="N", help="show this owner (the user who mounts)"
    )
    parser.add_argument(
        "--gid", type=_type(units.owner), metavar="N", help="show this group (the group who mounts)"
    )
    parser.add_argument(
        "--user",
        metavar="NAME",
        help="started by root, go on as this user, whose mount it then is",
    )
    parser.add_argument(
        "--unconfined",
        action="store_true",
        help="let the daemon reach every file of its user: no landlock, and no no_new_privs",
    )
    parser.add_argument(
        "--umask", type=_type(units.octal), metavar="MODE", default=0, help="permissions to take away (000)"
    )
    _log_options(parser)


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="the least that is logged (info)",
    )
    parser.add_argument(
        "--log-file", metavar="FILE", type=_PATH, help="log there, and keep one older file (the cache folder)"
    )
    parser.add_argument(
        "--log-format", choices=["text", "json", "journal"], default="text",
        help="json: an object a line; journal: priorities for journald (text)",
    )  # fmt: skip


def _serving(commands: Any) -> None:
    serve = _command(
        commands,
        "serve",
        "mounting:serve",
        "give out what is here as a trustless gateway",
    )
    serve.add_argument(
        "--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="where (127.0.0.1:8080)"
    )
    serve.add_argument(
        "--fetch", action="store_true", help="fetch what is not here from the sources, whoever asks"
    )
    _sources(serve)
    _bounds(serve)
    serve.add_argument("--json", action="store_true", help="print the addresses and the pid")
    _folders(serve)


def _asked_mount(parser: argparse.ArgumentParser) -> None:
    """Which mount a command asks, and how it shows the answer."""
    _json(parser)
    parser.add_argument(
        "--mount",
        metavar="MOUNTPOINT|NAME",
        type=_PATH,
        help="the mount to ask; without it, that of the cache folder",
    )
    _folders(parser, library=False)


class _CheckLibrary(argparse.Action):
    """`--library [DIR]` of `fsck`: without DIR, the library is the one that the configuration names."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        namespace.check_library = True
        if values is not None:
            setattr(namespace, self.dest, values)


def _remote(commands: Any) -> None:
    """Commands to a running mount, through its control socket."""
    about = {
        "status": "show how a running mount is doing: sources, cache, pins",
        "ls": "list what is staged: names, sizes, completeness, last use, pins",
        "pin": "fetch CIDs whole, and keep them until they are unpinned; `pin ls` lists what is pinned",
        "unpin": "stop keeping pinned CIDs",
        "prefetch": "fetch CIDs with all below them into the cache",
        "evict": "remove CIDs from the cache",
        "budget": "change how many bytes the cache of a running mount may take",
        "fsck": "hash everything in the cache again, and replace what is wrong",
    }
    for name, says in about.items():
        parser = _command(commands, name, "status:run" if name == "status" else f"remote:{name}", says)
        if name in ("pin", "unpin", "prefetch", "evict"):
            parser.add_argument(
                "items",
                metavar="CID|PATH",
                nargs="*" if name == "evict" else "+",
                help="a CID, CID/a/b, /ipns/NAME, or a path in a mount"
                + ("; or the word ls, to list pins" if name == "pin" else ""),
            )
        if name == "ls":
            parser.add_argument(
                "--tree", action="store_true", help="small files and directories too, below their directories"
            )
        if name == "prefetch":
            parser.add_argument(
                "--depth", type=_type(units.count), metavar="N", help="levels of folders to go down (all)"
            )
        if name == "status":
            parser.add_argument("--watch", action="store_true", help="a live view, until Ctrl-C")
            parser.add_argument(
                "--html", metavar="FILE", type=_PATH, help="write a page for a browser; - for standard output"
            )
        if name == "budget":
            parser.add_argument(
                "size", metavar="SIZE", type=_SIZE, help="such as 10GiB; what is too much is evicted"
            )
        if name == "evict":
            parser.add_argument("--all", action="store_true", help="everything that is not pinned")
        if name == "fsck":
            parser.add_argument(
                "file", metavar="FILE.car", nargs="?", type=_PATH, help="check this CAR file instead"
            )
            parser.set_defaults(check_library=False)
            parser.add_argument(
                "--library",
                metavar="DIR",
                nargs="?",
                action=_CheckLibrary,
                help="check the library instead (IPFSFUSE_LIBRARY, else ~/.local/share/ipfsfuse/library)",
            )
        _asked_mount(parser)


def _others(commands: Any) -> None:
    mounts = _command(
        commands, "mounts", "mounting:show_mounts", "list mounts: by whom, since when, whether they answer"
    )
    _json(mounts)
    config = _command(
        commands, "config", "settings:show", "show which settings hold for a mount, and where each comes from"
    )
    config.add_argument("mountpoint", metavar="NAME", nargs="?", help="a mount that the configuration names")
    config.add_argument("--init", action="store_true", help="write a commented file for this user")
    _json(config)
    _mount_options(config)
    help_ = _command(commands, "help", "parser:print_help", "explain a command, or list all commands")
    help_.add_argument("about", metavar="COMMAND", nargs="?", help="without one, all commands are listed")
    _json(help_)
    logs = _command(commands, "logs", "logs:show", "show the log of a mount")
    logs.add_argument("-n", "--lines", type=_COUNT, default=50, metavar="N", help="the last N lines (50)")
    logs.add_argument("-f", "--follow", action="store_true", help="then print what is logged from now on")
    logs.add_argument("--log-file", metavar="FILE", type=_PATH, help="the file that the mount logs to")
    _asked_mount(logs)
    metrics = _command(
        commands, "metrics", "metrics:run", "print what a running mount counts, as OpenMetrics"
    )
    metrics.add_argument("--listen", metavar="HOST:PORT", help="serve it over HTTP instead")
    metrics.add_argument("--textfile", metavar="FILE", type=_PATH, help="write it there, for a node exporter")
    _asked_mount(metrics)
    get = _command(commands, "get", "reading:get", "copy a file or a directory, without a mount")
    get.add_argument("path", metavar="CID/PATH", help="/ipfs/CID/a/b, CID/a/b, or /ipns/NAME/a/b")
    get.add_argument(
        "-o", "--output", metavar="PATH", type=_PATH, help="where to write it (its name, in this folder)"
    )
    _json(get)
    _sources(get)
    _folders(get)
    completion = _command(commands, "completion", "parser:print_completion", "print a shell's completions")
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=", ".join(SHELLS))
    _json(completion)


SHELLS = ("bash", "zsh", "fish", "tcsh")


def print_completion(arguments: argparse.Namespace) -> int:
    """Write it where the shell looks: bash reads /usr/share/bash-completion/completions/ipfsfuse."""
    import shtab  # 30 ms, and only for this

    if arguments.shell not in shtab.SUPPORTED_SHELLS:
        raise UsageError(f"shtab {shtab.__version__} makes no completions for {arguments.shell}")
    script = shtab.complete(build()[0], arguments.shell)
    if arguments.json:
        console.values({"shell": arguments.shell, "script": script})
    else:
        for line in script.splitlines():
            console.line(line)
    return 0


def print_help(arguments: argparse.Namespace) -> int:
    parser, commands = build()
    if arguments.about is not None:
        _refuse_unknown(arguments.about, commands)
        parser = commands[arguments.about]
    if arguments.json:
        console.values({"command": arguments.about, "help": parser.format_help()})
    else:
        for line in parser.format_help().splitlines():
            console.line(line)
    return 0


def build_parser() -> Parser:
    """For the man page."""
    return build()[0]
