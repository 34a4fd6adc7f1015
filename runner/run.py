"""One run from its options: the mount, the sandbox, the guest's process, and what is said about its end."""

import sys

from runner import mounts, sandbox, supervise
from runner.child import Plan
from runner.options import Options
from runner.supervise import OutputFull, Streams


def run(options: Options) -> int:
    """The exit code, or the number of the signal that ended the run, below 0. Raises IpfsFuseError."""
    with mounts.mounted(options) as mount:
        plan = Plan(options.guest, mount.mountpoint, sandbox.build(options, mount.mountpoint))
        held = () if mount.control is None else (mount.control.fileno(),)
        outcome = supervise.run(plan, Streams(stdout=bounded_stdout(options.limits.max_stdout)), close=held)
    if outcome.refused is not None:
        print(f"ipfsfuse-run: {outcome.refused}", file=sys.stderr)
    return outcome.code if outcome.signal is None else -outcome.signal


def bounded_stdout(bound: int | None) -> supervise.Sink | None:
    """Carries the guest's output to ours while it is within `bound` bytes; None, for no carrying, without one."""
    if bound is None:
        return None
    left = bound

    def sink(data: bytes) -> None:
        nonlocal left
        write_all(1, data[:left])
        if len(data) > left:
            raise OutputFull(f"the guest wrote more than max-stdout={bound} bytes")
        left -= len(data)

    return sink


def write_all(file: int, data: bytes) -> None:
    with open(file, "wb", buffering=0, closefd=False) as out:
        view = memoryview(data)
        while view:
            view = view[out.write(view) or 0 :]
