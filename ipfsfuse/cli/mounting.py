"""`ipfsfuse mount`: arguments to a MountConfig; in the foreground, or as a daemon that is waited for until it
is mounted.

The daemon is this program started anew in a session of its own (`--foreground --ready-fd N`, see `daemon`).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import ipfsfuse
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.progress import Progress
from ipfsfuse.config import MountConfig
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import MountFailed, UsageError
from ipfsfuse.fuse import mountpoint as mountpoints
from ipfsfuse.fuse.mountpoint import fitting_deadline

END_SECONDS = 10.0
"""How long a daemon whose mount is gone may take to let go of its cache folder."""

ALLOW_OTHER = (
    "--allow-other: every user of this machine can read what this mount shows: the whole library, "
    "what is pinned, "
    "what was read, and any CID that its sources have"
)

PROGRESS = "progress "
"""What a line of the daemon's begins with that tells how far it is (see `daemon`)."""


def config(arguments: argparse.Namespace) -> MountConfig:
    """Raises UsageError."""
    return MountConfig(
        mountpoint=folders.mountpoint(arguments.mountpoint),
        cache_dir=folders.cache_dir(arguments.cache_dir),
        library=folders.library(arguments.library),
        sources=tuple(_source(text) for text in arguments.sources or ["library"]),
        offline=arguments.offline,
        budget=arguments.budget,
        reserve=arguments.reserve,
        deadline=arguments.deadline,
        allow=None if arguments.allow is None else _allowed(arguments.allow),
        record=None if arguments.record is None else Path(arguments.record).absolute(),
        allow_other=arguments.allow_other,
        isolated=arguments.isolated,
        while_held=arguments.while_held,
        pins=arguments.pins,
        header_files=tuple(_header_file(text) for text in arguments.header_files or ()),
    )


def _allowed(texts: Iterable[str]) -> frozenset[Cid]:
    """The canonical CIDs of `texts`: each is a CID, or a file that lists some, one a line, # before
    comments."""
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


def _source(text: str) -> str:
    """SOURCE with a file's path made absolute: a daemon has no working directory."""
    if not text:
        raise UsageError("--from was given an empty SOURCE")
    return os.path.abspath(text) if text not in ("library", "kubo") and os.path.exists(text) else text


def _header_file(text: str) -> tuple[str, Path]:
    """The URL in URL=FILE, "" where there is none, and the file. Raises UsageError."""
    url, separator, path = text.partition("=")
    if "://" not in url:
        return "", Path(text).absolute()
    if not separator or not path:
        raise UsageError(f"--header-file {text}: the file is missing; write {url}=FILE")
    return url, Path(path).absolute()


def run(arguments: argparse.Namespace) -> int:
    asked = config(arguments)
    _refuse_below(asked)
    if not asked.isolated:
        _await_ending(asked.cache_dir)
    if arguments.foreground:
        # with trio and pyfuse3, 200 ms: only the process that serves needs them
        from ipfsfuse.cli import daemon

        daemon.serve(asked, arguments.ready_fd, arguments.json)
        return 0
    _deadline, shortened = fitting_deadline(asked.deadline)  # the daemon does the same, and logs it
    if shortened:
        console.note(f"ipfsfuse: {shortened}")
    told = _start_daemon(arguments.argv)
    if asked.allow_other:
        console.note(f"ipfsfuse: {ALLOW_OTHER}")
    if any(not url for url, _path in asked.header_files):
        console.note(
            "ipfsfuse: --header-file FILE is the old spelling, and will go: write --header-file URL=FILE"
        )
    if arguments.json:
        console.values(told, indent=None)
    return 0


def _refuse_below(asked: MountConfig) -> None:
    """Raises UsageError where the daemon would have to read or write below its own mount: it would wait for
    itself."""
    own = {"the cache folder": asked.cache_dir, "the library": asked.library, "the record": asked.record}
    own |= {f"the headers file {path}": path for _url, path in asked.header_files}
    own |= {f"the source {source}": Path(source) for source in asked.sources if os.path.isabs(source)}
    for what, path in own.items():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(asked.mountpoint):
            raise UsageError(
                f"{what} ({path}) lies below the mountpoint {asked.mountpoint}: choose another place"
            )


def _await_ending(cache_dir: Path) -> None:
    """Gives a daemon whose mount was just taken away the time to let go of the cache folder."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end and not cache_folder.is_free(cache_dir):
        said = cache_folder.announced(cache_dir)
        if said is None or any(mounted.mountpoint == said[1] for mounted in mountpoints.table()):
            return
        time.sleep(0.05)


def _start_daemon(argv: list[str]) -> dict[str, Any]:
    """Starts the daemon and waits for its line. Raises MountFailed or UsageError with its reason."""
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as said, open(reading, "rb") as line_from:
        at = argv.index("mount")
        command = [
            sys.executable,
            "-P",
            "-m",
            "ipfsfuse",
            *argv[: at + 1],
            "--foreground",
            "--ready-fd",
            str(writing),
            *argv[at + 1 :],
        ]
        try:
            daemon = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=[writing],
                start_new_session=True,
                env=_environment(),
            )
        finally:
            os.close(writing)
        try:
            line = _told(line_from)
        except KeyboardInterrupt:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait()
            raise
        if line.startswith("ok "):
            daemon.returncode = 0  # it goes on without us: nothing is left to wait for
            told: dict[str, Any] = json.loads(line.removeprefix("ok "))
            return told
        code = daemon.wait()
        reason = line.removeprefix("error ") or _last_words(said, code)
        raise UsageError(reason) if code == 2 else MountFailed(reason)


def _told(lines: BinaryIO) -> str:
    """The daemon's last line, "" where it gave none; what it tells of its progress before is shown."""
    with Progress("indexing") as show:
        for each in lines:
            line = each.decode(errors="surrogateescape").rstrip("\n")
            if not line.startswith(PROGRESS):
                return line
            show(json.loads(line.removeprefix(PROGRESS)))
    return ""


def _environment() -> dict[str, str]:
    """Ours, with the folder that this package was imported from: a checkout need not be installed."""
    top = str(Path(ipfsfuse.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))}


def _last_words(said: BinaryIO, code: int) -> str:
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()
    ending = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the mount {ending} before it was ready" + (f": {lines[-1]}" if lines else "")
