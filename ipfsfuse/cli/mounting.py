"""The daemon of `ipfsfuse mount`, and the commands `unmount`, `mounts` and `serve`.

The daemon makes a MountConfig of its arguments, mounts and serves. It runs in the foreground, or tells the
process that started it the result (`cli.starting`). Until then its log messages go to the starter's standard
error, and later to the log in the cache folder (`cache.store.folder`). If the starter ends before it has the
result, the daemon ends too.

SIGHUP makes a daemon open its log again, and read the budget and the log level from the configuration again.
In the foreground of a terminal, SIGHUP means that the terminal has gone: then the mount ends.

`unmount` waits until the daemon has ended, and names the processes that use the mount.
"""

import argparse
import ipaddress
import json
import logging
import os
import pwd
import select
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ipfsfuse import client, confinement, units
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cache.store.folder import LOG, OLD_LOG
from ipfsfuse.cli import console, folders, logs, parser, settings
from ipfsfuse.cli.child import PROGRAM, Starter, environment
from ipfsfuse.config import ContentConfig, MountConfig, User
from ipfsfuse.control import live_mounts
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import IpfsFuseError, MountFailed, UsageError
from ipfsfuse.fuse import mountpoint as mountpoints
from ipfsfuse.fuse.mountpoint import fitting_deadline
from ipfsfuse.sources import defaults
from ipfsfuse.sources.spec import addresses_of_node, header_files_of, is_remote, parse_sources
from ipfsfuse.structures import LogLimiter

log = logging.getLogger("ipfsfuse.mount")

DAEMON_END_SECONDS = 10.0
"""A daemon may take so long to end after unmounting."""


def config(arguments: argparse.Namespace) -> MountConfig:
    """Raises UsageError."""
    return MountConfig(
        mountpoint=folders.mountpoint(arguments.mountpoint),
        **_content(arguments),
        offline=arguments.offline,
        allow=None if arguments.allow is None else _allowed(arguments.allow),
        record=None if arguments.record is None else Path(arguments.record).absolute(),
        allow_other=arguments.allow_other,
        passthrough=_passthrough(arguments),
        isolated=arguments.isolated,
        while_held=arguments.while_held,
        pins=arguments.pins,
        ipns=None if arguments.ipns is None else folders.mountpoint(arguments.ipns),
        uid=arguments.uid,
        gid=arguments.gid,
        umask=arguments.umask,
        bwlimit=arguments.bwlimit,
        user=None if arguments.user is None else _user(arguments.user),
        confined=not arguments.unconfined,
        max_fetch=arguments.max_fetch,
    )


def _content(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that `mount` and `serve` share: cache folder, library and sources."""
    sources = tuple(source(text) for text in defaults.chosen(arguments.sources))
    return {
        "cache_dir": folders.cache_dir(arguments.cache_dir),
        "library": folders.library(arguments.library),
        "sources": sources,
        "budget": arguments.budget,
        "reserve": arguments.reserve,
        "deadline": arguments.deadline,
        "dns": arguments.dns,
        "header_files": header_files(arguments, sources),
        "routers": tuple(arguments.routers or ()),
        "allow_private_providers": arguments.allow_private_providers,
    }


def _passthrough(arguments: argparse.Namespace) -> bool:
    """Raises MountFailed if this user may not use passthrough. Whether the kernel and the cache folder's file
    system support it is known only after mounting (`fuse.open_files.Passthrough`)."""
    if arguments.passthrough and not _is_capable(confinement.CAP_SYS_ADMIN):
        raise MountFailed(
            "--passthrough: only root (CAP_SYS_ADMIN) may let the kernel read files itself: run it as root, "
            "or without"
        )
    if arguments.passthrough and arguments.user is not None:
        raise UsageError("--passthrough needs root's rights, and --user gives them up: leave one of them out")
    if arguments.passthrough and arguments.record is not None:
        raise UsageError(
            "--record needs to see every read, and --passthrough hides them: leave one of them out"
        )
    return bool(arguments.passthrough)


def _is_capable(capability: int) -> bool:
    """Whether this process has the effective capability (capabilities(7))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    in_effect = next(line for line in lines if line.startswith("CapEff")).split()[1]
    return bool(int(in_effect, 16) >> capability & 1)


def _user(name: str) -> User | None:
    """The user to change to; None for the user of this process. Raises UsageError."""
    try:
        found = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, ValueError) as exc:
        raise UsageError(f"--user {name}: this machine has no such user") from exc
    if found.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise UsageError(f"--user {name}: only root may go on as another user")
    return User(found.pw_name, found.pw_uid, found.pw_gid)


def _at_home(name: str) -> None:
    """Changes the default folders from those of root to those of the user `name`."""
    if (user := _user(name)) is not None:
        os.environ.update(HOME=pwd.getpwuid(user.uid).pw_dir, USER=user.name, LOGNAME=user.name)
        for variable in ("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"):
            os.environ.pop(variable, None)


def _allowed(texts: Iterable[str]) -> frozenset[Cid]:
    """The canonical CIDs of `texts`. Each text is a CID, or a file with one CID in each line and comments
    after #."""
    return frozenset(cids.canonical(each) for text in texts for each in _listed(text))


def _listed(text: str) -> Iterator[Cid]:
    try:
        yield cid_alone(text)
        return
    except UsageError as exc:
        if not Path(text).is_file():
            raise UsageError(f"--allow {text!r} is neither a CID nor a file that lists some") from exc
    try:
        lines = Path(text).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"--allow {text}: can't be read: {exc}") from exc
    for number, line in enumerate(lines, 1):
        if entry := line.partition("#")[0].strip():
            try:
                yield cid_alone(entry)
            except UsageError as exc:
                raise UsageError(f"--allow {text}, line {number}: {exc}") from exc


def source(text: str) -> str:
    """SOURCE with an absolute path of a file, since a daemon has another working directory."""
    if not text:
        raise UsageError("--from was given an empty SOURCE")
    named = text in (defaults.LIBRARY, defaults.KUBO, defaults.NETWORK)
    return os.path.abspath(text) if not named and os.path.exists(text) else text


def header_files(arguments: argparse.Namespace, sources: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """(URL, file of headers) for the sources. Files from a configuration for other sources are left out.

    Raises UsageError."""
    given = tuple(header_file(text) for text in arguments.header_files or ())
    return given if arguments.origins["header-file"] == "argument" else header_files_of(given, sources)


def header_file(text: str) -> tuple[str, Path]:
    """The URL and the file of URL=FILE. The URL is "" if there is none. Raises UsageError."""
    url, separator, path = text.partition("=")
    if "://" not in url:
        return "", Path(text).absolute()
    if not separator or not path:
        raise UsageError(f"--header-file {text}: the file is missing; write {url}=FILE")
    return url, Path(path).absolute()


# -- checks before a mount -----------------------------------------------------------------------------------


def _check_name(text: str) -> None:
    """Raises UsageError for a word that is not a folder and is similar to the name of a mount."""
    todo = console.suggestion(text, settings.mounts(), "")
    if todo and "/" not in text and not os.path.lexists(text):
        raise UsageError(f"{text} is neither a folder nor a mount that the configuration names: {todo}")


def _refuse_below(asked: MountConfig) -> None:
    """Raises UsageError if the daemon would use files below its own mount, and so wait for itself."""
    own = {"the cache folder": asked.cache_dir, "the library": asked.library, "the record": asked.record}
    own |= {f"the headers file {path}": path for _url, path in asked.header_files}
    own |= {f"the source {source}": Path(source) for source in asked.sources if os.path.isabs(source)}
    points = [asked.mountpoint] if asked.ipns is None else [asked.mountpoint, asked.ipns]
    if len(points) == 2 and (points[0].is_relative_to(points[1]) or points[1].is_relative_to(points[0])):
        raise UsageError(
            f"--ipns {points[1]}: give a folder that is neither {points[0]}, nor in it, nor around it"
        )
    for what, path in own.items():
        for point in points:
            if path is not None and Path(os.path.realpath(path)).is_relative_to(point):
                raise UsageError(f"{what} ({path}) lies below the mountpoint {point}: choose another place")


def _await_ending(cache_dir: Path) -> None:
    """Waits while the daemon of an earlier mount is ending and still uses the cache folder."""
    end = time.monotonic() + DAEMON_END_SECONDS
    while time.monotonic() < end and not cache_folder.is_free(cache_dir):
        daemon = cache_folder.announced(cache_dir)
        serving = daemon is not None and not os.path.isabs(daemon[1])  # `ipfsfuse serve`, which has no mount
        points = [mounted.mountpoint for mounted in mountpoints.table()]
        if daemon is None or serving or daemon[1] in points:
            return
        time.sleep(0.05)


# -- the daemon ----------------------------------------------------------------------------------------------

INDEX_LOG_SECONDS = 5.0
"""Seconds between two log lines about the progress of an index."""


def run_daemon(arguments: argparse.Namespace, starter: Starter | None) -> None:
    """Mounts and serves until the mount has ended. Raises the error that prevents it."""
    if arguments.user is not None:
        _at_home(arguments.user)
    _check_name(arguments.mountpoint)
    asked = config(arguments)
    _refuse_below(asked)
    if not asked.isolated:
        _await_ending(asked.cache_dir)
    _serve_mount(asked, arguments, starter)


def _serve_mount(asked: MountConfig, arguments: argparse.Namespace, starter: Starter | None) -> None:
    from ipfsfuse import mount  # with trio and pyfuse3, 200 ms: only the process that serves needs them

    confinement.hide_memory()
    log_to = logs.DaemonLog()
    logging.basicConfig(level=logging.INFO, handlers=[log_to])
    logging.getLogger("ipfsfuse").setLevel(arguments.log_level.upper())
    logs.escape_the_log(logs.FORMATS[arguments.log_format])
    file = None if arguments.log_file is None else Path(arguments.log_file).absolute()
    notes: list[str] = []
    if starter is not None:
        notes += _notes(asked, arguments)  # they may be about files that a confined daemon can't read
        os.chdir("/")

    def ready(control: Path) -> None:
        answer = {"mountpoint": str(asked.mountpoint), "control": str(control), "pid": os.getpid()}
        output = None
        if starter is None and arguments.json and sys.stdout is not None:
            output = os.dup(sys.stdout.fileno())  # the log takes standard output
        if file is not None:
            log_to.move(file, logs.FILE_BYTES, file.with_name(file.name + ".1"), needed=True)
        elif starter is not None:
            limit = min(logs.LOG_BYTES, asked.budget // logs.LOG_PART)
            log_to.move(control.parent / LOG, limit, control.parent / OLD_LOG)
        if asked.allow_other:
            log.info("%s", settings.ALLOW_OTHER)
        if starter is not None:
            starter.mounted(answer, notes)
        elif output is not None:
            with open(output, "w") as stream, redirect_stdout(stream):
                console.values(answer, indent=None)

    limiter = LogLimiter(INDEX_LOG_SECONDS, time.monotonic)

    def indexing(name: str, done: int, total: int) -> None:
        if starter is not None:
            starter.progress({"done": done, "total": total, "what": name})
        if limiter.admit(name) is not None or done == total:
            log.info("the index of %s is built: %s of %s", name, units.human(done), units.human(total))

    configured = asked.budget

    def reload() -> int | None:
        nonlocal configured
        log_to.reopen()
        try:
            again = parser.parse(arguments.argv)
        except UsageError as exc:
            log.warning("nothing is changed: %s", exc)
            return None
        logging.getLogger("ipfsfuse").setLevel(again.log_level.upper())
        later = [
            name
            for name in arguments.origins
            if name not in ("budget", "log-level")
            and settings.value(again, name) != settings.value(arguments, name)
        ]
        if later:
            log.warning("a new value of %s holds from the next mount on", ", ".join(later))
        before, configured = configured, again.budget
        return configured if configured != before else None  # `ipfsfuse budget` holds until the file changes

    hangup = None if starter is None and _has_terminal() else reload
    writes = [] if file is None else [file]
    mount.run(asked, ready, indexing, hangup, settings.candidates(), writes)


def _notes(asked: MountConfig, arguments: argparse.Namespace) -> Iterator[str]:
    """What the user is told once the mount is up."""
    _deadline, shortened = fitting_deadline(asked.deadline)  # the mount does the same, and logs it
    if shortened:
        yield shortened
    if not arguments.json:
        by_default = not arguments.sources
        specs = zip(asked.sources, parse_sources(asked.sources), strict=True)
        remote = [text for text, spec in specs if is_remote(spec)]
        if asked.offline and defaults.KUBO in asked.sources:  # its repository may name a node elsewhere
            remote += [each.text for each in addresses_of_node()[:1] if not each.is_local]
        yield defaults.described(asked.sources, by_default=by_default, offline=asked.offline, remote=remote)
    if asked.allow_other:
        yield settings.ALLOW_OTHER
    if any(not url for url, _path in asked.header_files):
        yield "--header-file FILE is the old spelling, and will go: write --header-file URL=FILE"


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal. Then a SIGHUP means that the terminal has gone."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


# -- `unmount` and `mounts` ----------------------------------------------------------------------------------


def unmount(arguments: argparse.Namespace) -> int:
    if arguments.all == (arguments.mountpoint is not None):
        raise UsageError("unmount takes one MOUNTPOINT or NAME, or --all")
    if arguments.all:
        words = ["unmount", *(each for each in arguments.argv[1:] if each != "--all")]
        known = [each["mountpoint"] for each in _mounts() if each["mine"] and each["pid"] is not None]
        return _all(words, {point: Path(point) for point in known})
    point = folders.mountpoint(settings.mountpoint_of(arguments.mountpoint))
    _must_be_ours(point)
    explicit = arguments.origins.get("cache-dir") == "argument"
    served_by = folders.live_mount(point, arguments.cache_dir, must=explicit)
    os.chdir("/")  # we may have been called from inside
    daemon = None
    with suppress(OSError):  # it may have ended already
        daemon = None if served_by is None else os.pidfd_open(served_by.pid)
    take_away(point, arguments.lazy)
    if daemon is not None and not arguments.lazy:
        select.select([daemon], [], [], DAEMON_END_SECONDS)
    return console.answer(arguments, {"unmounted": str(point)})


def mount_all(arguments: argparse.Namespace) -> int:
    named = settings.mounts()
    if not named:
        raise UsageError("the configuration names no mount: write [mount.NAME] (see `ipfsfuse config`)")
    return _all(["mount", *(each for each in arguments.argv[1:] if each != "--all")], named)


def _all(words: list[str], mounts: Mapping[str, Path]) -> int:
    """Runs the command for each mount, even if it fails for some. Returns 1 if one failed."""
    mounted = {each["mountpoint"] for each in _mounts() if each["answers"]}
    code, answers = 0, []
    for name, point in mounts.items():
        if words[0] == "mount" and str(point) in mounted:
            console.note(f"ipfsfuse: {name} is mounted already at {point}")
            continue
        command = [*PROGRAM, *words, name]
        output = subprocess.PIPE if "--json" in words else None
        done = subprocess.run(command, env=environment(), stdout=output)
        if done.stdout:
            answers.append(json.loads(done.stdout))
        code = code or (1 if done.returncode else 0)
    if "--json" in words:
        console.values(answers)
    return code


def show_mounts(arguments: argparse.Namespace) -> int:
    """`ipfsfuse mounts`."""
    found = _mounts()
    if arguments.json:
        console.values(found)
    else:
        shown = ("mountpoint", "user", "pid", "since", "answers")
        console.table("mounts", [{key: each[key] for key in shown} for each in found])
    return 0


UPTIME_SECONDS = 2.0


def _mounts() -> list[dict[str, Any]]:
    """Every mount of ipfsfuse that this process sees. `answers` is None if the daemon is not known, as for a
    mount of another user."""
    found = []
    for mounted in mountpoints.table():
        if mounted.type != mountpoints.TYPE:
            continue
        live = live_mounts.find(Path(mounted.mountpoint))
        since, answers = None, None
        if live is not None:
            answers = False
            with suppress(IpfsFuseError, KeyError, TypeError):
                uptime = client.call(live.control, "status", timeout=UPTIME_SECONDS)["uptime"]
                since, answers = units.timestamp(time.time() - uptime), True
        found.append(
            {
                "mountpoint": mounted.mountpoint,
                "user": "?" if mounted.owner is None else folders.user_name(mounted.owner),
                "pid": None if live is None else live.pid,
                "since": since,
                "answers": answers,
                "control": None if live is None else str(live.control),
                "mine": mounted.owner == os.geteuid(),
            }
        )
    return found


def _must_be_ours(point: Path) -> None:
    kinds = [mounted.type for mounted in mountpoints.table() if mounted.mountpoint == str(point)]
    if not kinds:
        raise MountFailed(f"nothing is mounted at {point}")
    if kinds[-1] != mountpoints.TYPE:
        raise MountFailed(f"{point} is not a mount of ipfsfuse but of type {kinds[-1]}: use umount")


def take_away(point: Path, lazy: bool) -> None:
    """Unmounts. Raises MountFailed, with the names of the processes that use the mount."""
    command = [*mountpoints.fusermount(), "-u", *(["-z"] if lazy else []), "--", str(point)]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
    )
    if done.returncode == 0:
        return
    reason = done.stderr.strip().rpartition(": ")[2] or "fusermount3 gave no reason"
    if "busy" not in reason:
        raise MountFailed(f"{point} can't be unmounted: {reason}")
    users = [f"{user.pid} ({user.command}) uses {user.uses}" for user in holders(point)]
    who = (
        "; ".join(users[:5]) + (f"; and {len(users) - 5} more" if len(users) > 5 else "")
        or "a process that this user can't see"
    )
    raise MountFailed(f"{point} is busy: {who}: end that first, or unmount with --lazy")


# -- who uses a mount: from /proc alone, because a mount that does not answer would block us -----------------


class Holder(NamedTuple):
    pid: int
    command: str
    uses: str
    """One of its open files below the mountpoint, or its working directory there."""


def holders(point: Path) -> Iterator[Holder]:
    """The processes that use a file at or below `point`, as far as this user may see them. Reads only links
    in /proc, and does not ask the mount."""
    for entry in sorted((name for name in os.listdir("/proc") if name.isdigit()), key=int):
        for target in _uses(f"/proc/{entry}"):
            if target == str(point) or target.startswith(f"{point}/"):
                yield Holder(int(entry), _command(entry), target)
                break


def _uses(process: str) -> Iterator[str]:
    links = ["cwd", "root", "exe"]
    with suppress(OSError):  # it has ended meanwhile, or is another user's: so below
        links += [f"fd/{number}" for number in os.listdir(f"{process}/fd")]
    for link in links:
        with suppress(OSError):
            yield os.readlink(f"{process}/{link}")
    with suppress(OSError), open(f"{process}/maps", errors="surrogateescape") as maps:
        for line in maps:
            # the path of a mapped file (proc_pid_maps(5))
            for path in line.rstrip("\n").split(maxsplit=5)[5:]:
                yield path.replace("\\012", "\n")


def _command(pid: str) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
        return os.fsdecode(command)[:60] or Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"


# -- `serve` -------------------------------------------------------------------------------------------------


def serve(arguments: argparse.Namespace) -> int:
    # with trio and hypercorn, 200 ms: only the process that serves needs them
    from ipfsfuse.serve import server

    host, port = units.address(arguments.listen)
    config = ContentConfig(offline=not arguments.fetch, **_content(arguments))
    logging.basicConfig(level=logging.INFO, handlers=[logs.DaemonLog()])
    logs.escape_the_log()
    if not _is_loopback(host):
        console.note(
            f"ipfsfuse: {host} is not this machine alone: whoever reaches it can read the whole library, and "
            "all that is staged"
        )

    def ready(urls: Sequence[str]) -> None:
        console.listening(arguments, urls, f"serving at {', '.join(urls)}")

    server.run(config, host, port, arguments.fetch, arguments.allow_host or [], ready)
    return 0


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
