"""`--replay`: a recorded run again, offline, from its CAR alone; and whether it gives the same."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ipfsfuse.dag import cid as cids
from runner import bundle, mounts, sandbox, streams, supervise
from runner import receipt as receipts
from runner.bundle import Bundle
from runner.child import Plan
from runner.errors import ReceiptRefused
from runner.limits import NO_LIMITS, Limits
from runner.options import Dir, Options
from runner.receipt import Receipt
from runner.supervise import Outcome, Streams


class Verdict(NamedTuple):
    """One thing that came out, then and now."""

    what: str
    recorded: object
    now: object

    @property
    def same(self) -> bool:
        return self.recorded == self.now


def opened(path: Path) -> tuple[Bundle, Receipt]:
    """A record that is whole: every block that its receipt names is there and right. Raises ReceiptRefused."""
    record = Bundle(path)
    place = record.find(bundle.RECEIPT)
    if place is None:
        raise ReceiptRefused(f"{path} holds no {bundle.RECEIPT}: it is no record of a run")
    receipt = receipts.decode(record.whole(place))
    if record.find(bundle.GUEST) != receipt.guest:
        raise ReceiptRefused(f"{path}: its guest is not the one that its receipt names")
    for cid in receipt.read:
        if cid not in record:
            raise ReceiptRefused(f"{path} is cut short: it lacks the block {cids.text(cid)} that the run read")
    _check_given(record, receipt)
    return record, receipt


def _check_given(record: Bundle, receipt: Receipt) -> None:
    """Standard input and the given folders are those that the receipt names."""
    given = streams.Digested(None)
    place = record.find(bundle.STDIN)
    for data in () if place is None else record.content(place):
        given(data)
    if given.digest() != receipt.stdin:
        raise ReceiptRefused(f"{record.path}: its standard input is not the one that its receipt names")
    for number, each in enumerate(receipt.dirs):
        if record.find(bundle.DIRS, str(number)) != each.cid:
            raise ReceiptRefused(f"{record.path}: its folder {each.guest} is not the one that its receipt names")


def replay(path: Path, limits: Limits = NO_LIMITS) -> int:
    """Says what is the same and what is not; 0 if all is, else 1. A signal's number below 0 if one ended it.

    `limits` go before those of the receipt, whose writer need not be trusted."""
    record, receipt = opened(path)
    receipt = receipt._replace(limits=limits.over(receipt.limits))
    with tempfile.TemporaryFile() as guest, tempfile.TemporaryFile() as stdin:
        with closing(record):
            _copy(record, bundle.GUEST, guest)
            _copy(record, bundle.STDIN, stdin)
        outcome, verdicts = _run(path, receipt, guest, stdin)
    if outcome.signal is not None:
        return -outcome.signal
    if outcome.refused is not None:
        raise ReceiptRefused(f"the recorded run can't be repeated here: {outcome.refused}")
    for each in verdicts:
        print(f"{each.what}: the same" if each.same else f"{each.what}: DIFFERENT, recorded {each.recorded}, now {each.now}")
    if not all(each.same for each in verdicts) and receipt.differs:
        print(f"not fixed in this record: {', '.join(receipt.differs)}")
    return 0 if all(each.same for each in verdicts) else 1


def _copy(record: Bundle, name: str, out: BinaryIO) -> None:
    place = record.find(name)
    if place is None:
        raise ReceiptRefused(f"{record.path} holds no {name}")
    out.writelines(record.content(place))
    out.seek(0)


def _run(path: Path, receipt: Receipt, guest: BinaryIO, stdin: BinaryIO) -> tuple[Outcome, Sequence[Verdict]]:
    out, err = streams.Digested(None), streams.Digested(None)
    options = Options(
        guest=f"/proc/self/fd/{guest.fileno()}",
        args=tuple(receipt.argv[1:]),
        argv0=receipt.argv[0],
        env=tuple(receipt.env),
        cwd=receipt.cwd,
        limits=receipt.limits,
        isolated=True,
        mount_options=(f"--from={os.path.abspath(path)}", "--offline"),
    )
    with mounts.mounted(options) as mount:
        box = sandbox.build(options._replace(dirs=_dirs(receipt, mount.mountpoint)), mount.mountpoint)
        plan = Plan(options.guest, mount.mountpoint, box, receipt.deterministic, shown_as=receipt.name)
        bounded = streams.bounded(out, receipt.limits.max_stdout)
        outcome = supervise.run(plan, Streams(stdin.fileno(), bounded, err), close=[mount.control.fileno()])
    return outcome, [
        Verdict("stdout", receipt.stdout.sha256, out.digest().sha256),
        Verdict("stderr", receipt.stderr.sha256, err.digest().sha256),
        Verdict("exit code", receipt.exit_code, outcome.code),
    ]


def _dirs(receipt: Receipt, mountpoint: str) -> tuple[Dir, ...]:
    """The folders that were recorded, by their CIDs in the mount."""
    found = []
    for each in receipt.dirs:
        if each.cid is None:
            raise ReceiptRefused(f"the folder {each.guest} is not part of the record")
        found.append(Dir(os.path.join(mountpoint, cids.text(each.cid)), each.guest, writable=False))
    return tuple(found)
