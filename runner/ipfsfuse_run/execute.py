"""One run from its options: the mount, the sandbox, the guest's process.

Modules that take long to import are imported only when they are needed. A guest on a live mount needs none of
them.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ipfsfuse.errors import IpfsFuseError, MountFailed, StoreFailed, UsageError
from ipfsfuse_run import host_folders, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import NotKept, say
from ipfsfuse_run.options import Options
from ipfsfuse_run.supervisor import CompletedRun, Outcome

if TYPE_CHECKING:
    from ipfsfuse.dag.cid import Cid


def execute(options: Options) -> CompletedRun:
    """Raises NotKept if the guest ran but its results or receipt could not be stored, another IpfsFuseError
    if it did not run."""
    if options.compile_only:
        return _execute(options._replace(out=None))
    if options.cid_file is not None and os.path.lexists(options.cid_file):
        raise UsageError(f"--cid-file {options.cid_file} is there already: remove it, or name another")
    if options.out is None:
        return _execute(options)
    results = host_folders.results_folder(options.out)
    try:
        ended = _execute(options._replace(out=results.path))
    except BaseException:
        results.discard()
        raise
    if ended.outcome.refused is not None:
        results.discard()
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
    from ipfsfuse_run import mounts  # with json and sockets, 5 ms

    if options.mount is not None:
        mountpoint = os.path.abspath(options.mount)
        try:
            mount_id = mounts.kernel_mount_id(mountpoint)
        except MountFailed:
            mount_id = None
        return CompletedRun(_run_on(mountpoint, options, mount_id))
    with mounts.open_mount(options) as mount:
        mounts.warn_of_disclosure(options, mount)
        names = mounts.resolved_names(options, mount)
        quota = None if mount.quota is None else mount.quota.fileno()
        outcome = _run_on(mount.mountpoint, options, mount.mount_id, names, quota)
        if quota is not None and mount.control.ask("quota")["reached"]:
            outcome = supervisor.over_quota(outcome, options.limits)
        return CompletedRun(outcome)


def _hash_results(options: Options, folder: str, cid: str | None) -> str | None:
    """The CID of the results, if it is known already or an option asks for it. Prints it, unless the caller
    wants it returned. With --add the results are added to the library. Raises StoreFailed."""
    if options.add or (cid is None and (options.cid_file is not None or options.return_cid)):
        from ipfsfuse.dag import cid as cids
        from ipfsfuse_run import record

        bound = options.limits.out_bytes
        found = _add_to_library(options, folder) if options.add else record.tree_cid(folder, bound)
        cid = cids.text(found)
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


def _add_to_library(options: Options, folder: str) -> "Cid":
    """Adds the results to the library, and returns their CID. Raises StoreFailed."""
    from ipfsfuse_run import mounts
    from ipfsfuse_run.record import RecordWriter, add_tree

    scratch = host_folders.scratch_folder("add", os.getpid())
    try:
        car = os.path.join(scratch, "results.car")
        with open(car, "w+b") as out:
            writer = RecordWriter(out)
            built = add_tree(writer, folder, options.limits.out_bytes).built
            writer.close(built)
        library = [each for each in options.mount_options if each.startswith("--library=")]
        try:
            mounts.ipfsfuse_command("import", *library, car)
        except IpfsFuseError as exc:
            raise StoreFailed(f"the results can't be taken into the library: {exc}") from exc
        return built.cid
    except OSError as exc:
        raise StoreFailed(f"the results can't be taken into the library: {exc.strerror}") from exc
    finally:
        host_folders.remove_tree(scratch)


def _run_on(
    mountpoint: str,
    options: Options,
    mount_id: int | None,
    names: Mapping[str, str] = sandbox.NO_NAMES,
    quota: int | None = None,
) -> Outcome:
    """`mount_id` is the kernel's number of the mount of ours at `mountpoint`; None for another folder."""
    box = sandbox.build(options, mountpoint, mount_id, names)
    path = None
    if options.engine != "library":
        from ipfsfuse_run import command

        path = command.choose(options, mount_id is not None)
    return supervisor.run(Plan(options, mountpoint, box, mount_id, path), quota)
