"""Parses the command line of a run into frozen values. Options come before GUEST; everything after GUEST is
passed to the guest.

Pure, except that `--env NAME` reads that variable.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from ipfsfuse import __version__, units
from ipfsfuse.errors import UsageError
from ipfsfuse_run import limits as limiting
from ipfsfuse_run.limits import NO_LIMITS, Limits

ENGINES = ("auto", "library", "command")


class Dir(NamedTuple):
    """A folder of the host that the guest may use."""

    host: str
    guest: str
    writable: bool


class Options(NamedTuple):
    guest: str = ""
    """A file, /ipfs/CID/path, or `-` for standard input."""
    args: tuple[str, ...] = ()
    argv0: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    dirs: tuple[Dir, ...] = ()
    cwd: str | None = None
    invoke: str | None = None
    """The exported function that is called in place of `_start`; `args` are its arguments."""
    preload: tuple[tuple[str, str], ...] = ()
    """Modules that the guest may import from: (name, file or /ipfs/CID/path)."""
    tmp: int | None = None
    """Bytes that the guest's own /tmp may hold: 0 for none, None for the default."""
    out: str | None = None
    """A folder for the guest's results: its /out."""
    root: str | None = None
    """CID[/path] of the directory that is the guest's `/`."""
    limits: Limits = NO_LIMITS
    mount: str | None = None
    """A mount to use as it is."""
    mount_options: tuple[str, ...] = ()
    """Passed on to `ipfsfuse mount` unchanged."""
    allow: tuple[str, ...] = ()
    """CIDs, or files that list some."""
    ipns: tuple[str, ...] = ()
    """IPNS names and domains that the guest sees below /ipns."""
    cache_dir: str | None = None
    isolated: bool = False
    record: str | None = None
    record_env: bool = False
    """Record the values of `env`, not only their hashes."""
    sign: str | None = None
    """A private key that signs the receipt."""
    add: bool = False
    """Take the results into the library."""
    cid_file: str | None = None
    """A new file for the CID of the results."""
    return_cid: bool = False
    """Return the CID of the results to the caller instead of printing it."""
    replay: str | None = None
    show: bool = False
    """Print what the replay's guest printed."""
    key: str | None = None
    """A public key that must have signed the receipt."""
    deterministic: bool = False
    engine: str = "auto"
    """What runs the guest: `auto`, `library` or `command`."""
    compile_only: bool = False
    """Compile the guest for later runs, and don't run it."""
    verbose: bool = False
    require_sandbox: bool = False

    @property
    def guest_name(self) -> str:
        """For messages."""
        return "standard input" if self.guest == "-" else self.guest

    @property
    def own_mount(self) -> bool:
        """Whether the run needs a mount of its own, because a live mount can't serve it."""
        own = {"--from", "--budget"}
        return (
            self.isolated
            or bool(self.allow)
            or self.record is not None
            or self.limits.max_fetch is not None
            or any(each.partition("=")[0] in own for each in self.mount_options)
        )


class _WasmtimeOption(NamedTuple):
    """The values of an option of `wasmtime run` that are accepted here."""

    name: str
    """The option's long name."""
    on: tuple[str, ...]
    """Accepted, because they are always on."""
    reasons: Mapping[str, str]
    """Refused, each for its reason."""


_NETWORK = ("inherit-network", "http", "tcp", "udp", "allow-ip-name-lookup", "tls", "listenfd", "tcplisten")
_STREAMS = ("inherit-stdin", "inherit-stdout", "inherit-stderr")
_WASMTIME_OPTIONS = {
    "-S": _WasmtimeOption(
        "--wasi",
        ("cli", "common", "preview2", "preview0", *_STREAMS),
        dict.fromkeys(_NETWORK, "a guest gets no network")
        | dict.fromkeys(("nn", "config", "keyvalue"), "that interface is not offered")
        | {
            "threads": "a guest gets no threads of its own",
            "inherit-env": "a guest gets only the variables of --env; --env NAME passes one on",
            "p3": "WASI preview 3 is not offered",
            "cwd": "give --cwd DIR",
        },
    ),
    "-C": _WasmtimeOption(
        "--codegen",
        ("cache", "parallel-compilation"),
        {
            "compiler": "code is compiled by Cranelift",
            "cache-config": "code is kept in the runner's own cache",
        },
    ),
    "-O": _WasmtimeOption("--optimize", ("opt-level=2", "memory-init-cow"), {}),
    "-D": _WasmtimeOption(
        "--debug", ("address-map",), {"coredump": "a guest's memory is not written to a file"}
    ),
}
_NOT_TAKEN = {
    "-g/--gdbstub": "no debugger can be attached to a guest: it gets no network",
    "--profile": "a guest can't be profiled here: use `wasmtime run --profile` on the mount",
    "--config": "settings of wasmtime are not read: give the options themselves",
    "--target": "a guest runs on this machine",
    "--allow-precompiled": "precompiled code could do anything: give the WebAssembly, its code is kept",
    "-R": "wasmtime's own recording is not offered: give --record RUN.car",
}
"""Options of `wasmtime run` that are refused, each for its reason."""


class _Refused(argparse.Action):
    """An option of _NOT_TAKEN, with or without a value."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", **more)

    def __call__(self, *_given: Any) -> NoReturn:
        raise UsageError(f"{self.option_strings[0]}: {_NOT_TAKEN['/'.join(self.option_strings)]}")


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UsageError with a message of one line."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message = (
                f"{message.removeprefix('unrecognized arguments: ')} is not an option of ipfsfuse-run; "
                "the guest's own options go behind GUEST"
            )
        raise UsageError(message)


class _Formatter(argparse.HelpFormatter):
    """Keeps names such as max-memory-size on one line, and gets the terminal's width without importing
    shutil."""

    def __init__(self, prog: str) -> None:
        try:
            width = int(os.environ.get("COLUMNS", "")) or 80
        except ValueError:
            width = os.get_terminal_size(1).columns or 80 if os.isatty(1) else 80
        super().__init__(prog, width=width - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        import textwrap

        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _parser() -> Parser:
    usage = (
        "ipfsfuse-run [run] [OPTION]... GUEST [ARG]...\n       "
        "ipfsfuse-run compile [OPTION]... GUEST\n       ipfsfuse-run --replay RUN.car\n       "
        "ipfsfuse-run inspect RUN.car [--json]"
    )
    parser = Parser(
        prog="ipfsfuse-run",
        usage=usage,
        allow_abbrev=False,
        formatter_class=_Formatter,
        description="Run a WASI command (core module or component, binary or text) with IPFS at /ipfs. "
        "GUEST is a file, /ipfs/CID/path, or - for standard input.",
        epilog="Exit codes: the guest's own; 2 usage error; 124 out of time; 125 could not be run; 134 "
        "trapped; 137 killed. With --replay: 0 the same, 3 different, 125 could not be repeated.",
    )
    _guest_options(parser.add_argument_group("the guest"))
    _mount_options(parser.add_argument_group("the mount (--mount, or what `ipfsfuse mount` takes)"))
    _receipt_options(parser.add_argument_group("receipts"))
    return parser


def _guest_options(group: argparse._ArgumentGroup) -> None:
    _repeatable(group, "--env", "K[=V]", "set a variable, or pass on the runner's value", type=_variable)
    _repeatable(
        group,
        "--dir",
        "HOST[::GUEST[::ro]]",
        "give the guest a folder of the host, writable unless ::ro is given",
        type=parse_dir,
        dest="dirs",
    )
    group.add_argument(
        "--tmp",
        metavar="SIZE",
        type=units.size_or_zero,
        help="the size of the guest's private /tmp (default: 256 MiB; 0 for no /tmp)",
    )
    group.add_argument(
        "--out", metavar="DIR", help="a new or empty folder for the guest's results, which it sees as /out"
    )
    group.add_argument("--add", action="store_true", help="add the results in --out to the library")
    group.add_argument(
        "--cid-file", metavar="FILE", help="write the CID of the results in --out to a new file"
    )
    group.add_argument(
        "--root",
        metavar="CID[/path]",
        type=parse_root,
        help="use this directory as the guest's /, with /ipfs, /tmp and /out over it",
    )
    group.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="what runs the guest: the wasmtime command on PATH, or the library; auto uses the command if "
        "possible",
    )
    group.add_argument(
        "--require-sandbox",
        action="store_true",
        help="refuse to run if the kernel lacks one of the sandbox's layers",
    )
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="say what runs the guest and which sandbox layers are in force",
    )
    group.add_argument(
        "--invoke",
        metavar="FUNC",
        help="call this exported function of a core module with the ARGs, and print its results, one per "
        "line",
    )
    _repeatable(
        group,
        "--preload",
        "NAME=MODULE",
        "a core module (a file or /ipfs/CID/path) that the guest imports under this name",
        type=_preload,
    )
    for option, accepted in _WASMTIME_OPTIONS.items():
        meaning = f"accepted as in `wasmtime run`; these are always on: {', '.join(accepted.on)}"
        _repeatable(group, option, "NAME", meaning, accepted.name, dest=option)
    for names in _NOT_TAKEN:
        group.add_argument(*names.split("/"), action=_Refused, help=argparse.SUPPRESS)
    group.add_argument("-V", "--version", action="version", version=f"ipfsfuse-run {__version__}")
    group.add_argument(
        "--argv0", metavar="NAME", help="the name that the guest sees as its own (default: GUEST's)"
    )
    group.add_argument("--cwd", metavar="DIR", help="the guest's working directory, as the guest names it")
    names = ", ".join(map(limiting.option, Limits._fields))
    _repeatable(group, "-W", "LIMIT=N[,...]", f"limits: {names}", "--wasm", dest="limits")


def _repeatable(
    group: argparse._ArgumentGroup, name: str, metavar: str, meaning: str, *aliases: str, **more: Any
) -> None:
    group.add_argument(name, *aliases, action="append", default=[], metavar=metavar, help=meaning, **more)


def _mount_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mount", metavar="DIR", help="use this mount, or any folder, as /ipfs")
    group.add_argument(
        "--isolated", action="store_true", help="use a mount, staging and page cache for this run alone"
    )
    _repeatable(
        group,
        "--allow",
        "CID|FILE",
        "show the guest only these CIDs and what is below them (implies --isolated)",
    )
    _repeatable(
        group,
        "--ipns",
        "NAME",
        "show an IPNS name or a domain as the folder /ipns/NAME, as it resolves when the run begins",
    )
    for name, (metavar, meaning) in MOUNT_OPTIONS.items():
        _repeatable(group, name, metavar, meaning)
    group.add_argument(
        "--cache-dir", metavar="DIR", help="the cache folder; a mount that uses it is used, else one is made"
    )
    group.add_argument(
        "--offline", action="store_true", help="ask no gateway, and a node only for what it has"
    )


MOUNT_OPTIONS = {
    "--from": (
        "SOURCE",
        "where blocks come from: library, a CAR file, kubo, kubo+http://HOST:PORT, a URL, gateway, network",
    ),
    "--budget": ("SIZE", "bytes that the cache may use on disk"),
    "--reserve": ("SIZE", "bytes that the cache leaves free on its disk"),
    "--deadline": ("TIME", "how long a read waits for a block before it fails (default: 30s)"),
    "--library": ("DIR", "the library that `ipfsfuse add` fills"),
    "--dns": ("URL", "a DNS-over-HTTPS server to ask for domains under /ipns"),
    "--router": ("URL", "a delegated router, which is asked for IPNS records and who has a block"),
}
"""Options of `ipfsfuse mount` with a value. They are passed on unchecked."""


def _receipt_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--record", metavar="RUN.json|RUN.car", help="write a receipt of the run (implies --isolated)"
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="with --record: make clocks, random numbers and NaN bits the same in every run",
    )
    group.add_argument(
        "--record-env",
        action="store_true",
        help="with --record: record the values of --env, not only their hashes",
    )
    group.add_argument(
        "--sign", metavar="KEY", help="with --record RUN.car: sign the receipt with this Ed25519 key"
    )
    group.add_argument(
        "--show",
        action="store_true",
        help="with --replay: print what the guest prints, and the verdict on stderr",
    )
    group.add_argument(
        "--key", metavar="PUB", help="with --replay: refuse a receipt that this Ed25519 key did not sign"
    )
    group.add_argument(
        "--replay",
        metavar="RUN.car",
        help="repeat a recorded run offline, and say whether it gives the same results",
    )


def parse(argv: Sequence[str]) -> Options:
    """Raises UsageError; SystemExit for --help."""
    parser = _parser()
    parser.add_argument("guest", nargs="?", default="", help=argparse.SUPPRESS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    seen = vars(parser.parse_args(list(argv)))
    for option, accepted in _WASMTIME_OPTIONS.items():
        _check_wasmtime_option(option, seen[option], accepted)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in seen.items()
        if name in Options._fields
    }
    given |= {"limits": limiting.parse(seen["limits"]), "mount_options": _passed_on(seen)}
    options = Options(**given)
    check(options)
    return options


def _check_wasmtime_option(option: str, given: Sequence[str], accepted: _WasmtimeOption) -> None:
    """Raises UsageError for a value that is not always on here."""
    for text in ",".join(given).split(",") if given else ():
        name, _, value = text.partition("=")
        if text in accepted.on or (name in accepted.on and value in ("y", "yes", "true")):
            continue
        why = accepted.reasons.get(name)
        if why is None:
            why = f"ipfsfuse-run takes only {', '.join(accepted.on)} there, which are on anyway"
        raise UsageError(f"{option} {text[:80]}: {why}")


def _preload(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not path:
        raise UsageError(f"--preload {text} is not NAME=MODULE")
    return name, path


def _passed_on(seen: dict[str, list[str]]) -> tuple[str, ...]:
    found = [f"{name}={each}" for name in MOUNT_OPTIONS for each in seen[name[2:].replace("-", "_")]]
    return tuple(found + ["--offline"] * bool(seen["offline"]))


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or "\0" in text:
        raise UsageError(f"--env {text!r} names no variable")
    if not equals:
        if name not in os.environ:
            raise UsageError(f"--env {name}: there is no such variable to pass on; give {name}=VALUE")
        value = os.environ[name]
    return name, value


def parse_dir(text: str) -> Dir:
    """Parses a value of --dir. Raises UsageError."""
    host, *rest = text.split("::")
    guest = rest[0] if rest and rest[0] else host
    if len(rest) > 2 or (len(rest) == 2 and rest[1] not in ("ro", "rw")):
        raise UsageError(f"--dir {text} is not HOST, HOST::GUEST or HOST::GUEST::ro")
    return Dir(host, guest, writable=rest[1:] != ["ro"])


def parse_root(text: str) -> str:
    """Parses a value of --root. Raises UsageError."""
    path = text.removeprefix("/ipfs/")
    if not path.strip("/") or path.startswith("/"):
        raise UsageError(f"--root {text} is not CID or CID/path")
    return path


def check(options: Options) -> None:
    """Raises UsageError for options that do not go together."""
    if options.replay is not None:
        allowed = ("replay", "limits", "env", "tmp", "out", "show", "key")
        if options != Options(**{name: getattr(options, name) for name in allowed}):
            raise UsageError(
                "--replay takes everything else from the receipt; only -W, --env, --tmp, --out, --show and "
                "--key go with it"
            )
        return
    for name, is_alone, needed in (
        ("--show", options.show, "--replay"),
        ("--key", options.key, "--replay or inspect"),
        ("--sign", options.sign and options.record is None, "--record"),
        ("--record-env", options.record_env and options.record is None, "--record"),
        ("--deterministic", options.deterministic and options.record is None, "--record"),
        ("--add", options.add and options.out is None, "--out"),
        ("--cid-file", options.cid_file and options.out is None, "--out"),
    ):
        if is_alone:
            raise UsageError(f"{name} goes with {needed}")
    if not options.guest:
        raise UsageError("no GUEST given: ipfsfuse-run [OPTION]... GUEST [ARG]...")
    if options.mount is not None:
        given = {
            "--isolated": options.isolated,
            "--allow": options.allow,
            "--record": options.record,
            "--ipns": options.ipns,
            "-W max-fetch": options.limits.max_fetch is not None,
            "--cache-dir": options.cache_dir,
        }
        for name in [
            *(each for each, value in given.items() if value),
            *(each.partition("=")[0] for each in options.mount_options),
        ]:
            raise UsageError(f"--mount uses that mount as it is: {name} can't go with it")
    if options.ipns and options.record is not None:
        raise UsageError(
            "--record with --ipns: what a name stands for can't be repeated; give the guest /ipfs/CID instead"
        )
    if options.record is not None and (options.invoke is not None or options.preload):
        raise UsageError("--record of a run with --invoke or --preload is not offered")
    if options.record is not None and options.limits.max_fetch is not None:
        raise UsageError("--record of a run with -W max-fetch is not offered")
    if options.limits.max_stdin is not None and options.record is None:
        raise UsageError(
            "-W max-stdin goes with --record or --replay: another run's standard input is the guest's own"
        )
    if options.cwd is not None and not options.cwd.startswith("/"):
        raise UsageError(f"--cwd {options.cwd} must be absolute, as the guest names it")
