"""`ipfsfuse doctor`: checks what a mount needs on this machine, and advises what to do if it is missing."""

import argparse
import errno
import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ipfsfuse import client, confinement, units
from ipfsfuse.cache.budget import FreeSpace, disk_usage
from ipfsfuse.cache.store import folder as cache_folder
from ipfsfuse.cli import console, folders, settings
from ipfsfuse.errors import IpfsFuseError, NotHere
from ipfsfuse.fuse import mountpoint as mountpoints
from ipfsfuse.fuse.mountpoint import fitting_deadline, request_timeout
from ipfsfuse.sources import defaults
from ipfsfuse.sources.local import library_folder

FUSE = Path("/dev/fuse")
FUSE_CONF = Path("/etc/fuse.conf")
USER_REQUESTS = Path("/sys/module/fuse/parameters/max_user_bgreq")

OK, NOTE, BAD = "ok", "note", "bad"


class Finding(NamedTuple):
    state: str
    """`ok`, `note` (works, with a limit) or `bad` (a mount fails, or has failed)."""
    about: str
    found: str
    todo: str = ""


def run(arguments: argparse.Namespace) -> int:
    findings = list(_everything(arguments))
    if arguments.json:
        console.values([finding._asdict() for finding in findings])
    else:
        for finding in findings:
            console.finding(finding.state, f"{finding.about}: {finding.found}", finding.todo)
    return 1 if any(finding.state == BAD for finding in findings) else 0


def _everything(arguments: argparse.Namespace) -> Iterator[Finding]:
    yield _device()
    yield from _helper()
    yield _allow_other()
    yield _kernel()
    yield _confinement()
    yield _guest_sandbox()
    yield from _user_requests()
    yield from _request_timeout(arguments.deadline)
    cache_dir, library = folders.cache_dir(arguments.cache_dir), folders.library(arguments.library)
    yield _cache_folder(cache_dir)
    yield from _space(cache_dir, arguments.budget, arguments.reserve)
    yield _library(library)
    yield _descriptors()
    yield from _mounts(cache_dir)
    if arguments.sources:
        for source, failure in _source_failures(arguments, defaults.chosen(arguments.sources)):
            shown = re.sub(r"//[^/?#]*@", "//", source)  # whatever stands there is a secret
            if failure is None:
                yield Finding(OK, shown, "answers")
            else:
                yield Finding(BAD, shown, failure, "mend that, or name another with --from (docs/SOURCES.md)")


def _device() -> Finding:
    try:
        os.close(os.open(FUSE, os.O_RDWR | os.O_CLOEXEC))
        return Finding(OK, str(FUSE), "there, and may be opened")
    except FileNotFoundError:
        return Finding(
            BAD,
            str(FUSE),
            "missing",
            "load the kernel's module (modprobe fuse); in a container: --device /dev/fuse --cap-add "
            "SYS_ADMIN",
        )
    except OSError as exc:
        return Finding(
            BAD,
            str(FUSE),
            f"can't be opened: {exc.strerror}",
            "chmod 666 /dev/fuse; a container must be given the device",
        )


def _helper() -> Iterator[Finding]:
    found = shutil.which("fusermount3")
    if found is None and os.geteuid() == 0:
        yield Finding(
            NOTE,
            "fusermount3",
            "missing: root mounts without it, other users can't",
            "install the package fuse3, if they should",
        )
        return
    if found is None:
        yield Finding(BAD, "fusermount3", "missing", "install the package fuse3")
        return
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    if os.geteuid() != 0 and not os.stat(found).st_mode & stat.S_ISUID:
        yield Finding(
            BAD,
            "fusermount3",
            f"{version}; not setuid root, so only root can mount",
            f"as root: chmod u+s {found}",
        )
    else:
        yield Finding(OK, "fusermount3", version)


def _allow_other() -> Finding:
    try:
        set_there = any(line.strip() == "user_allow_other" for line in FUSE_CONF.read_text().splitlines())
    except OSError:
        set_there = False
    if set_there or os.geteuid() == 0:
        return Finding(OK, "--allow-other", "may be used")
    return Finding(
        NOTE,
        "--allow-other",
        "may not be used by ordinary users",
        f"as root, if it is wanted: echo user_allow_other >> {FUSE_CONF}",
    )


def _kernel() -> Finding:
    release = os.uname().release
    numbers = tuple(int(number) for number in release.split("-")[0].split(".")[:2] if number.isdigit())
    if numbers < (4, 20):
        return Finding(
            NOTE,
            "kernel",
            f"{release}: no cached symlinks, perhaps no parallel lookups",
            "a kernel from 4.20 on is quicker",
        )
    return Finding(OK, "kernel", release)


def _confinement() -> Finding:
    """How a mount's daemon can be confined."""
    if confinement.landlock_abi() == 0:
        found = "by no_new_privs alone: this kernel has no landlock"
        return Finding(NOTE, "the daemon is confined", found, "a kernel from 5.13 on, with landlock, has it")
    return Finding(OK, "the daemon is confined", "by no_new_privs and landlock")


def _guest_sandbox() -> Finding:
    """How the process of a guest of ipfsfuse-run can be confined."""
    try:
        from ipfsfuse_run import host_folders, lockdown
    except ImportError:
        return Finding(NOTE, "guests", "the package ipfsfuse_run is not installed: no guest can be run")
    active = lockdown.available()
    missing = [each for each in lockdown.LAYERS if each not in active]
    tmp = "a tmpfs" if host_folders.tmpfs_is_offered() else "a folder that is measured as it grows"
    if missing:
        found = f"locked in by {', '.join(active)}; without {', '.join(missing)}; /tmp is {tmp}"
        return Finding(NOTE, "guests", found, "a kernel from 5.13 on, with landlock and seccomp, has them")
    return Finding(OK, "guests", f"locked in by {', '.join(active)}; /tmp is {tmp}")


def _user_requests() -> Iterator[Finding]:
    try:
        allowed = int(USER_REQUESTS.read_text())
    except (OSError, ValueError):
        return
    if os.geteuid() != 0 and allowed < 256:
        yield Finding(
            NOTE,
            "requests in flight",
            f"the kernel allows ordinary users {allowed}",
            f"as root: echo 4096 > {USER_REQUESTS}",
        )


def _request_timeout(deadline: float) -> Iterator[Finding]:
    """Nothing if the kernel has no such limit, or none is set."""
    timeout = request_timeout()
    if timeout is None:
        return
    try:
        _deadline, shortened = fitting_deadline(deadline)
    except IpfsFuseError as exc:
        yield Finding(BAD, "request timeout", str(exc), f"as root: echo 0 > {timeout.set_by}")
        return
    if shortened:
        yield Finding(
            NOTE, "request timeout", shortened, f"as root, if that is too short: echo 0 > {timeout.set_by}"
        )
    else:
        yield Finding(
            OK, "request timeout", f"{timeout.set_by} is {timeout.seconds} s, longer than the deadline"
        )


def _descriptors() -> Finding:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        return Finding(
            NOTE,
            "open files",
            f"at most {hard}: many requests at a time may fail",
            "raise it: `ulimit -Hn`, /etc/security/limits.conf, or LimitNOFILE= of the service",
        )
    return Finding(OK, "open files", "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}")


FEW_FILES = 4096
"""Descriptors that a mount can need: for each source up to 144 connections, with two descriptors each."""


STATUS_TIMEOUT = 5.0


def _space(folder: Path, budget: int, reserve: int | None) -> Iterator[Finding]:
    """Whether the disk has room for the budget."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        space = FreeSpace(existing, reserve)
    except OSError as exc:
        yield Finding(
            BAD, "space", f"{existing} can't be looked at: {exc.strerror}", "name another with --cache-dir"
        )
        return
    spare = space.spare()
    if spare is None:
        yield Finding(
            NOTE,
            "space",
            "the file system does not tell how much it has: the budget is not checked against it",
        )
        return
    effective = max(0, min(budget, spare + disk_usage(cache_folder.inside(folder))))
    there = f"{units.human(space.free)} free there, {units.human(space.reserve)} of it stay reserved"
    if effective < budget:
        found = f"the budget of {units.human(budget)} is cut to {units.human(effective)}: {there}"
        yield Finding(NOTE, "space", found, "make room, or name another disk with --cache-dir")
    else:
        yield Finding(OK, "space", f"a budget of {units.human(budget)} fits: {there}")


def _cache_folder(folder: Path) -> Finding:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if existing != folder:
        if os.access(existing, os.W_OK | os.X_OK):
            return Finding(OK, "cache folder", f"{folder} will be made")
        return Finding(
            BAD, "cache folder", f"{folder} can't be made in {existing}", "name another with --cache-dir"
        )
    try:
        cache_folder.examine(folder)
    except IpfsFuseError as exc:
        return Finding(BAD, "cache folder", str(exc), "mend that, or name another with --cache-dir")
    return Finding(OK, "cache folder", str(folder))


def _library(folder: Path) -> Finding:
    if not folder.exists():
        return Finding(OK, "library", f"{folder} will be made by the first `ipfsfuse add`")
    try:
        library_folder.examine(folder)
    except (IpfsFuseError, OSError) as exc:
        return Finding(BAD, "library", str(exc), "mend that, or name another with --library")
    if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return Finding(OK, "library", str(folder))
    return Finding(BAD, "library", f"{folder} may not be used by this user", "name another with --library")


def _mounts(cache_dir: Path) -> Iterator[Finding]:
    """The health of this user's mounts: those with a known daemon, those in the configuration, and the one
    that uses the cache folder."""
    daemon = cache_folder.announced(cache_dir)
    expected = {*map(str, settings.mounts().values()), *([daemon[1]] if daemon else [])}
    asked = set[Path]()
    for mounted in mountpoints.table():
        if mounted.type != mountpoints.TYPE or mounted.owner != os.geteuid():
            continue
        point = Path(mounted.mountpoint)
        live = folders.live_mount(point, str(cache_dir), must=False)
        if live is not None and live.control not in asked:
            asked.add(live.control)
            yield from _mount(point, live.control)
        elif live is None and mounted.mountpoint in expected and not mountpoints.answers(point):
            yield _dead(point)
    if cache_folder.is_free(cache_dir):
        if not asked:
            yield Finding(OK, "mount", "none uses the cache folder now")
    elif cache_folder.socket_path(cache_dir) not in asked:  # `serve`, or a mount that is not seen here
        what = f"process {daemon[0]} serves {daemon[1]}" if daemon else "a daemon is starting"
        yield Finding(OK, "mount", what)


def _mount(point: Path, control: Path) -> Iterator[Finding]:
    try:
        state = client.call(control, "status", timeout=STATUS_TIMEOUT)
    except IpfsFuseError as exc:
        if not mountpoints.answers(point):
            yield _dead(point)
        else:
            todo = f"look into `ipfsfuse logs`; end it by `ipfsfuse unmount {point}`"
            yield Finding(BAD, "running mount", f"{point}: {exc}", todo)
        return
    yield Finding(OK, "mount", f"process {state['pid']} serves {point}")
    for reason in state["reasons"]:
        yield Finding(
            NOTE, "running mount", f"{point}: {reason}", "`ipfsfuse status` and `ipfsfuse logs` say more"
        )
    if not state["reasons"]:
        yield Finding(OK, "running mount", f"{point}: healthy")
    cache = state["cache"]
    if cache["effective_budget"] < cache["budget"]:
        cut = f"{units.human(cache['budget'])} is cut to {units.human(cache['effective_budget'])}"
        yield Finding(NOTE, "running mount", f"{point}: its budget of {cut}", "make room on the disk")


def _dead(point: Path) -> Finding:
    error = os.strerror(errno.ENOTCONN)  # "Transport endpoint is not connected"
    found = f'{point} is left from a daemon that has ended: programs there get "{error}"'
    todo = f"`ipfsfuse mount {point}` takes its place; `fusermount3 -u {point}` removes it"
    return Finding(BAD, "mount", found, todo)


EMPTY_DIRECTORY = "bafybeiczsscdsbs7ffqz55asqdf3smv6klcw3gofszvwlyarci47bgf354"
"""Every IPFS node has this block."""
SOURCE_PROBE_SECONDS = 10.0


def _source_failures(
    arguments: argparse.Namespace, sources: Sequence[str]
) -> Iterator[tuple[str, str | None]]:
    """(SOURCE, why it can't be used or None) for each source. Opens each like a mount, and asks it for one
    block."""
    import trio  # 200 ms with what follows, and only where sources are named

    from ipfsfuse.cli.reading import open_settings
    from ipfsfuse.dag import cid as cids
    from ipfsfuse.sources.spec import open_sources

    settings = open_settings(arguments)

    async def probe(text: str) -> None:
        async with open_sources([text], settings) as sources:
            for source in sources:
                with suppress(NotHere), trio.fail_after(SOURCE_PROBE_SECONDS):  # an answer too
                    await source.get(cids.parse(EMPTY_DIRECTORY))

    for text in sources:
        try:
            trio.run(probe, text)
            yield text, None
        except IpfsFuseError as exc:
            yield text, str(exc)
        except trio.TooSlowError:
            yield text, f"no answer within {SOURCE_PROBE_SECONDS:g} s"
