"""One run from its options: the mount, the sandbox, the guest's process, and what is said about its end.

What takes long to import is imported for whom it serves: a guest in a mount that is there waits for none of
it.
"""

import os
import sys
from collections.abc import Sequence

from ipfsfuse_run import messages, sandbox, streams, supervise
from ipfsfuse_run.child import Plan
from ipfsfuse_run.options import Options
from ipfsfuse_run.supervise import Outcome


def run(options: Options) -> int:
    """The exit code, or the number of the signal that ended the run, below 0. Raises IpfsFuseError."""
    if options.record is None:
        outcome = _plainly(options)
    else:
        from ipfsfuse_run import recording  # with the codecs, 100 ms

        outcome = recording.record(options)
    if outcome.refused is not None:
        messages.say(outcome.refused)
    return outcome.code if outcome.signal is None else -outcome.signal


def _plainly(options: Options) -> Outcome:
    if options.mount is not None:
        return _in(os.path.abspath(options.mount), options)
    from ipfsfuse_run import disclosure, mounts  # with what starts a daemon, 10 ms

    with mounts.mounted(options) as mount:
        disclosure.warn(options, mount)
        return _in(mount.mountpoint, options, mount.mount_id, held=(mount.control.fileno(),))


def _in(mountpoint: str, options: Options, mount_id: int | None = None, held: Sequence[int] = ()) -> Outcome:
    plan = Plan(options.guest, mountpoint, sandbox.build(options, mountpoint, mount_id), mount_id)
    outcome = supervise.run(
        plan, streams.of_guest(options.limits, any(each.writable for each in options.dirs)), close=held
    )
    if outcome.trap is not None:
        sys.stderr.write(messages.trap_text(plan.name, outcome.trap))
    return outcome
