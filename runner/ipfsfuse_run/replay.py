"""`--replay`: a recorded run again, offline, from its CAR alone; and whether it gives the same."""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.nodes import Directory
from ipfsfuse_run import limits, mounts, receipts, sandbox, supervisor
from ipfsfuse_run.child import MAX_GUEST, Plan
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.limits import NO_LIMITS, Limits
from ipfsfuse_run.options import Dir, Options
from ipfsfuse_run.receipts import Bundle, Receipt
from ipfsfuse_run.supervisor import Outcome, Sink


class Verdict(NamedTuple):
    """One thing that came out, then and now."""

    what: str
    recorded: object
    now: object

    @property
    def same(self) -> bool:
        return self.recorded == self.now


REPLAY_LIMITS = Limits(
    timeout=600.0,
    max_memory_size=1 << 30,
    max_wasm_stack=8 << 20,
    max_stdout=64 << 20,
    max_out=1 << 30,
    max_stdin=64 << 20,
)
"""What a replay may use at most without a `-W`. A recording may come from anyone: what it says never loosens
these."""

_DATA_SPARE = 512 << 20
"""Bytes that a replay's process may use beside the guest's memory."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[Bundle, Receipt]]:
    """A record that is whole: every block that its receipt names is there and right, and so is the guest.

    Its standard input is not looked at (`check_stdin`). Raises ReceiptRefused."""
    with closing(Bundle(path)) as record:
        place = record.find(receipts.RECEIPT)
        if place is None:
            raise ReceiptRefused(f"{path} holds no {receipts.RECEIPT}: it is not a record of a run")
        receipt = receipts.decode(record.receipt(place))
        _check_parts(record, receipt)
        yield record, receipt


def _check_parts(record: Bundle, receipt: Receipt) -> None:
    if record.find(receipts.GUEST) != receipt.guest:
        raise ReceiptRefused(f"{record.path}: its guest is not the one that its receipt names")
    for cid in receipt.read:
        if cid not in record:
            raise ReceiptRefused(
                f"{record.path} is cut short: it lacks the block {cids.text(cid)} that the run read"
            )
    place = record.find(receipts.DIRS)
    node = None if place is None else record.node(place)
    held = {link.name: link.cid for link in node.links} if isinstance(node, Directory) else {}
    for number, each in enumerate(receipt.dirs):
        if held.get(b"%d" % number) != each.cid:
            raise ReceiptRefused(
                f"{record.path}: its folder {each.guest} is not the one that its receipt names"
            )


def check_stdin(
    record: Bundle, receipt: Receipt, out: BinaryIO | None = None, most: int | None = None
) -> None:
    """Writes the recorded standard input to `out`. Raises ReceiptRefused unless it is the one that the
    receipt names.

    `most` bytes are looked at, by default as many as the CAR file can hold and 64 MiB more."""
    given = supervisor.HashingSink(None if out is None else _into(out))
    place = record.find(receipts.STDIN)
    if place is not None and record.file(place).size == receipt.stdin.size:
        for data in record.content(place, record.size + (64 << 20) if most is None else most):
            given(data)
    if given.digest() != receipt.stdin:
        raise ReceiptRefused(f"{record.path}: its standard input is not the one that its receipt names")


def _into(out: BinaryIO) -> Sink:
    def sink(data: bytes) -> None:
        out.write(data)

    return sink


def limits_for(path: Path, receipt: Receipt, given: Limits) -> Limits:
    """Those of `given`, then the recorded ones, then REPLAY_LIMITS. Raises ReceiptRefused, naming the -W to
    give, where the recording needs more than that."""
    shown = {
        "timeout": receipt.seconds,
        "max_stdout": max(receipt.stdout.size, 0 if receipt.trapped else receipt.stderr.size),
        "max_stdin": receipt.stdin.size,
    }
    chosen = given.over(receipt.limits)
    for name, most in REPLAY_LIMITS._asdict().items():
        if most is None:
            continue
        needed = max(shown.get(name, 0), getattr(receipt.limits, name) or 0)
        if getattr(given, name) is None:
            if needed > most:
                text = limits.value_text(name, math.ceil(needed))
                raise ReceiptRefused(
                    f"{path} needs more than a replay gives "
                    f"({limits.option(name)}={limits.value_text(name, most)}): "
                    f"if you trust it, give -W {limits.option(name)}={text}"
                )
            if getattr(chosen, name) is None and name != "max_wasm_stack":  # wasmtime's own is smaller
                chosen = chosen._replace(**{name: most})
    if chosen.max_stdin is not None and receipt.stdin.size > chosen.max_stdin:
        raise ReceiptRefused(
            f"{path} has {receipt.stdin.size} bytes of standard input: more than the given max-stdin"
        )
    return chosen


def replay(path: Path, given: Limits = NO_LIMITS) -> int:
    """Says what is the same and what is not; 0 if all is, else 3. A signal's number below 0 if one ended it.

    Raises ReceiptRefused where the run could not be repeated. `given` limits go before those of the
    receipt."""
    with tempfile.TemporaryFile() as guest, tempfile.TemporaryFile() as stdin:
        with opened(path) as (record, receipt):
            chosen = limits_for(path, receipt, given)
            _copy_guest(record, guest)
            check_stdin(record, receipt, stdin, chosen.max_stdin)
            stdin.seek(0)
        outcome, verdicts = _run(path, receipt, chosen, guest, stdin)
    if outcome.signal is not None:
        return -outcome.signal
    if outcome.refused is not None:
        raise ReceiptRefused(f"the recorded run can't be repeated here: {outcome.refused}")
    known = given.over(receipt.limits)._asdict()
    ours = {
        limits.option(name): limits.value_text(name, most)
        for name, most in chosen._asdict().items()
        if most is not None and known[name] is None
    }
    name = limits.option(outcome.limit or "")
    if name in ours:
        raise ReceiptRefused(
            f"{path} needs more than a replay gives ({name}={ours[name]}): if you trust it, give a "
            f"larger -W {name}"
        )
    for each in verdicts:
        print(
            f"{each.what}: the same"
            if each.same
            else f"{each.what}: DIFFERENT, recorded {each.recorded}, now {each.now}"
        )
    if all(each.same for each in verdicts):
        return 0
    print(f"not fixed in this record: {', '.join(receipt.differs)}")
    if ours:
        print(f"limits of this replay alone: {', '.join(f'{name}={most}' for name, most in ours.items())}")
    return DIFFERENT


DIFFERENT = 3
"""The exit code of a replay that ran and gave something else."""


def _copy_guest(record: Bundle, out: BinaryIO) -> None:
    place = record.find(receipts.GUEST)
    if place is None:
        raise ReceiptRefused(f"{record.path} holds no {receipts.GUEST}")
    out.writelines(record.content(place, min(MAX_GUEST, max(64 << 20, 4 * record.size))))
    out.seek(0)


def _run(
    path: Path, receipt: Receipt, chosen: Limits, guest: BinaryIO, stdin: BinaryIO
) -> tuple[Outcome, Sequence[Verdict]]:
    options = Options(
        guest=f"/proc/self/fd/{guest.fileno()}",
        args=tuple(receipt.argv[1:]),
        argv0=receipt.argv[0],
        env=tuple(receipt.env),
        cwd=receipt.cwd,
        limits=chosen,
        isolated=True,
        mount_options=(f"--from={os.path.abspath(path)}", "--offline"),
    )
    with mounts.mounted(options) as mount:
        box = sandbox.build(
            options._replace(dirs=_dirs(receipt, mount.mountpoint)), mount.mountpoint, mount.mount_id
        )
        data = (
            None
            if chosen.max_memory_size is None
            else chosen.max_memory_size + 2 * (chosen.max_wasm_stack or 0) + _DATA_SPARE
        )
        plan = Plan(
            options.guest,
            mount.mountpoint,
            box,
            mount.mount_id,
            receipt.deterministic,
            shown_as=receipt.name,
            max_data=data,
        )
        outcome, out, err = supervisor.run_hashed(plan, stdin, (None, None), close=[mount.control.fileno()])
    return outcome, [
        Verdict("stdout", receipt.stdout, out),
        Verdict("stderr", receipt.stderr, err),
        Verdict("exit code", _end(receipt.exit_code, receipt.trapped), _end(outcome.code, outcome.trapped)),
    ]


def _end(code: int, trapped: bool) -> str:
    return f"{code}, by a trap" if trapped else str(code)


def _dirs(receipt: Receipt, mountpoint: str) -> tuple[Dir, ...]:
    """The folders that were recorded, by their CIDs in the mount."""
    found = []
    for each in receipt.dirs:
        if each.cid is None:
            raise ReceiptRefused(f"the folder {each.guest} is not part of the record")
        found.append(Dir(os.path.join(mountpoint, cids.text(each.cid)), each.guest, writable=False))
    return tuple(found)
