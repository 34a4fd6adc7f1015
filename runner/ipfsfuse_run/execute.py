"""One run from its options: the mount, the sandbox, the guest's process.

What takes long to import is imported when it is needed: a guest on a live mount waits for none of it.
"""

import os
import sys
from collections.abc import Mapping, Sequence

from ipfsfuse_run import sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import trap_text
from ipfsfuse_run.options import Options
from ipfsfuse_run.supervisor import Outcome


def execute(options: Options) -> Outcome:
    """Raises IpfsFuseError."""
    if options.record is not None:
        from ipfsfuse_run import recording  # with the codecs, 100 ms

        return recording.record(options)
    if options.mount is not None:
        return _run_on(os.path.abspath(options.mount), options)
    from ipfsfuse_run import mounts  # with what starts a daemon, 10 ms

    with mounts.mounted(options) as mount:
        mounts.warn_of_disclosure(options, mount)
        names = mounts.resolved(options, mount)
        return _run_on(mount.mountpoint, options, mount.mount_id, names, close=(mount.control.fileno(),))


def _run_on(
    mountpoint: str,
    options: Options,
    mount_id: int | None = None,
    names: Mapping[str, str] = sandbox.NO_NAMES,
    close: Sequence[int] = (),
) -> Outcome:
    plan = Plan(options.guest, mountpoint, sandbox.build(options, mountpoint, mount_id, names), mount_id)
    streams = supervisor.direct_streams(options.limits, any(each.writable for each in options.dirs))
    outcome = supervisor.run(plan, streams, close)
    if outcome.trap is not None:
        sys.stderr.write(trap_text(plan.name, outcome.trap))
    return outcome
