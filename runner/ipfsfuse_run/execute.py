"""One run from its options: the mount, the sandbox, the guest's process.

What takes long to import is imported when it is needed: a guest on a live mount waits for none of it.
"""

import os
from collections.abc import Mapping, Sequence

from ipfsfuse.errors import IpfsFuseError, MountFailed, StoreFailed, UsageError
from ipfsfuse_run import limits, places, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import NotKept, say
from ipfsfuse_run.options import Options
from ipfsfuse_run.supervisor import Alarm, CompletedRun, Outcome


def execute(options: Options) -> CompletedRun:
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
            raise NotKept(str(exc), ended._replace(out=None)) from exc
    return ended


def _execute(options: Options) -> CompletedRun:
    if options.record is not None:
        from ipfsfuse_run import recording  # with the codecs, 100 ms

        return recording.record(options)
    if options.mount is not None:
        mountpoint = os.path.abspath(options.mount)
        return CompletedRun(_run_on(mountpoint, options, _our_mount(mountpoint)))
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
        return CompletedRun(outcome)


def _hash_results(options: Options, folder: str, cid: str | None) -> str | None:
    """The CID of the results, if it is known already or asked for; it is printed for the command. With --add
    they are taken into the library. Raises StoreFailed."""
    if options.add or (cid is None and (options.cid_file is not None or options.return_cid)):
        from ipfsfuse.dag import cid as cids
        from ipfsfuse_run import results

        bound = options.limits.out_bytes
        cid = cids.text(results.add(options, folder) if options.add else results.cid_of(folder, bound))
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
    box = sandbox.build(options, mountpoint, mount_id, names)
    path = None
    if options.engine != "library":
        from ipfsfuse_run import command

        path = command.choose(options, mount_id is not None)
    plan = Plan(options, mountpoint, box, mount_id, path)
    writes = options.out is not None or any(each.writable for each in options.dirs)
    streams = supervisor.direct_streams(options.limits, writes)
    return supervisor.run(plan, streams, close, alarm)
