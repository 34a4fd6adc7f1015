"""One run from its options: the mount, the sandbox, the guest's process, and what is said about its end."""

import sys

from runner import mounts, sandbox, streams, supervise
from runner.child import Plan
from runner.options import Options
from runner.supervise import Outcome, Streams


def run(options: Options) -> int:
    """The exit code, or the number of the signal that ended the run, below 0. Raises IpfsFuseError."""
    if options.record is None:
        outcome = _plainly(options)
    else:
        from runner import recording  # with the codecs, 100 ms

        outcome = recording.record(options)
    if outcome.refused is not None:
        print(f"ipfsfuse-run: {outcome.refused}", file=sys.stderr)
    return outcome.code if outcome.signal is None else -outcome.signal


def _plainly(options: Options) -> Outcome:
    with mounts.mounted(options) as mount:
        plan = Plan(options.guest, mount.mountpoint, sandbox.build(options, mount.mountpoint))
        held = () if mount.control is None else (mount.control.fileno(),)
        bound = options.limits.max_stdout
        return supervise.run(plan, Streams(stdout=None if bound is None else streams.bounded(streams.carried(1), bound)), close=held)
