"""One run from its options: the mount, the sandbox, the guest's process.

What takes long to import is imported when it is needed: a guest on a live mount waits for none of it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ipfsfuse.errors import IpfsFuseError, MountFailed, StoreFailed, UsageError
from ipfsfuse_run import limits, places, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import NotKept, say
from ipfsfuse_run.options import Options
from ipfsfuse_run.supervisor import Alarm, Outcome


class Ended(NamedTuple):
    """A run that was made: how it ended, and what it left."""

    outcome: Outcome
    out: str | None = None
    """The CID of the results, where --add, --cid-file, --record or `return_cid` asked for it."""
    receipt: bytes | None = None
    """The receipt that --record wrote: JSON."""


def execute(options: Options) -> Ended:
    """Raises NotKept if the guest ran and what it left could not be kept, another IpfsFuseError if it did not
    run."""
    if options.compile_only:
        return _execute(options._replace(out=None))
    if options.cid_file is not None and os.path.lexists(options.cid_file):
        raise UsageError(f"--cid-file {options.cid_file} is there already: remove it, or name another")
    if options.out is None:
        return _execute(options)
    results = places.results_folder(options.out)
    try:
        ended = _execute(options._replace(out=results.path))
    except BaseException:
        results.forget()
        raise
    if ended.outcome.refused is not None:
        results.forget()
    elif ended.outcome.signal is None and ended.outcome.limit != "max_out":
        try:
            return ended._replace(out=_hash_results(options, results.path, ended.out))
        except IpfsFuseError as exc:
            raise NotKept(str(exc), ended.outcome, ended.receipt) from exc
    return ended


def _execute(options: Options) -> Ended:
    if options.record is not None:
        from ipfsfuse_run import recording  # with the codecs, 100 ms

        return Ended(*recording.record(options))
    if options.mount is not None:
        mountpoint = os.path.abspath(options.mount)
        return Ended(_run_on(mountpoint, options, _our_mount(mountpoint)))
    from ipfsfuse_run import mounts  # with what starts a daemon, 10 ms

    with mounts.mounted(options) as mount:
        mounts.warn_of_disclosure(options, mount)
        names = mounts.resolved(options, mount)
        alarm = None
        if mount.quota is not None:
            bound = limits.value_text("max_fetch", options.limits.max_fetch or 0)
            alarm = Alarm(mount.quota.fileno(), "max_fetch", f"had more than max-fetch={bound} fetched")
        close = [each.fileno() for each in (mount.control, mount.quota) if each is not None]
        outcome = _run_on(mount.mountpoint, options, mount.mount_id, names, close, alarm)
        if alarm is not None and mount.control.ask("quota")["reached"]:
            outcome = supervisor.over_limit(outcome, alarm)
        return Ended(outcome)


def _hash_results(options: Options, folder: str, cid: str | None) -> str | None:
    """The CID of the results, if it is known already or asked for; it is printed for the command. With --add
    they are taken into the library. Raises StoreFailed."""
    if options.add or (cid is None and (options.cid_file is not None or options.return_cid)):
        from ipfsfuse_run import results

        cid = results.add(options, folder) if options.add else results.cid_of(options, folder)
    if cid is None:
        return None
    if not options.return_cid:
        say(f"results /ipfs/{cid}")
    if options.cid_file is not None:
        try:
            with open(options.cid_file, "x", encoding="ascii") as file:
                file.write(cid)
        except OSError as exc:
            raise StoreFailed(f"--cid-file {options.cid_file} can't be written: {exc.strerror}") from exc
    return cid


def _command(options: Options, in_our_mount: bool) -> str | None:
    """The wasmtime command that runs the guest; None for the library. Raises UsageError."""
    if options.engine == "library":
        return None
    from ipfsfuse_run import command

    why = command.unsuited(options)
    if why is None and not in_our_mount:
        why = "the command has no read-only folders: --mount of a folder that is no mount needs the library"
    path = None
    if why is None:
        path, why = command.find()
    if path is None and options.engine == "command":
        raise UsageError(f"--engine command: {why}")
    if path is None and options.verbose:
        say(f"the library runs this guest: {why}")
    return path


def _our_mount(mountpoint: str) -> int | None:
    """The number of the mount of ours at `mountpoint`, which refuses all writing; None for another folder."""
    from ipfsfuse_run import mounts

    try:
        return mounts.kernel_mount_id(mountpoint)
    except MountFailed:
        return None


def _run_on(
    mountpoint: str,
    options: Options,
    mount_id: int | None = None,
    names: Mapping[str, str] = sandbox.NO_NAMES,
    close: Sequence[int] = (),
    alarm: Alarm | None = None,
) -> Outcome:
    plan = Plan(
        options.guest,
        mountpoint,
        sandbox.build(options, mountpoint, mount_id, names),
        mount_id,
        compile_only=options.compile_only,
        verbose=options.verbose,
        require_sandbox=options.require_sandbox,
        engine=options.engine,
        command=_command(options, mount_id is not None),
        invoke=options.invoke,
        preload=options.preload,
    )
    writes = options.out is not None or any(each.writable for each in options.dirs)
    streams = supervisor.direct_streams(options.limits, writes)
    return supervisor.run(plan, streams, close, alarm)
