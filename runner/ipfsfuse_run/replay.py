"""`--replay`: a recorded run again, offline, from its CAR alone; and whether it gives the same."""

import contextlib
import hashlib
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Directory, File
from ipfsfuse.errors import UsageError
from ipfsfuse.text import printable
from ipfsfuse_run import limits, mounts, places, read_paths, receipts, recording, sandbox, supervisor
from ipfsfuse_run.child import MAX_GUEST, Plan
from ipfsfuse_run.errors import ReceiptRefused, trap_text
from ipfsfuse_run.limits import Limits
from ipfsfuse_run.options import Dir, Options
from ipfsfuse_run.receipts import Bundle, Receipt, Writer
from ipfsfuse_run.supervisor import Digest, Outcome, Sink

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


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


def receipt_alone(path: Path) -> Receipt | None:
    """The receipt in a .json; None where `path` is something else, be it a CAR. Raises ReceiptRefused."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(1)
            if data != b"{" or not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return receipts.decode(data + file.read(receipts.MAX_BYTES))
    except ReceiptRefused as exc:
        raise ReceiptRefused(f"{path}: {exc}") from exc
    except OSError as exc:
        raise ReceiptRefused(f"{path} can't be read: {exc.strerror}") from exc


@contextmanager
def opened(path: Path) -> Iterator[tuple[Bundle, Receipt]]:
    """A record that is whole: every block that its receipt names is there and right, and so is the guest.

    The content of its streams is not looked at (`check_content`). Raises ReceiptRefused."""
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
    for name, cid in receipt.contents.items():
        if record.find(name) != cid:
            raise ReceiptRefused(f"{record.path}: its {name} is not the one that its receipt names")
    if receipt.format > 1 and record.find(receipts.OUT) != receipt.out:
        raise ReceiptRefused(f"{record.path}: its results are not the ones that its receipt names")
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


def check_content(
    record: Bundle, receipt: Receipt, name: str, out: BinaryIO | None = None, most: int | None = None
) -> None:
    """Writes one of the recorded streams (STDIN, STDOUT, STDERR) to `out`. Raises ReceiptRefused unless it is
    the one that the receipt names.

    `most` bytes are looked at, by default as many as the CAR file can hold and 64 MiB more."""
    recorded: Digest = getattr(receipt, name)
    given = supervisor.HashingSink(None if out is None else _into(out))
    place = record.find(name)
    if place is not None and record.file(place).size == recorded.size:
        for data in record.content(place, record.size + (64 << 20) if most is None else most):
            given(data)
    if given.digest() != recorded:
        raise ReceiptRefused(f"{record.path}: its {_STREAMS[name]} is not the one that its receipt names")


_STREAMS = {
    receipts.STDIN: "standard input",
    receipts.STDOUT: "standard output",
    receipts.STDERR: "standard error",
}


def check_signature(record: Bundle, receipt: Receipt, key: "Ed25519PublicKey", most: int) -> None:
    """Raises ReceiptRefused unless `key` signed the receipt and the results, of `most` bytes."""
    from ipfsfuse_run import signatures

    place, receipt_node = record.find(receipts.SIGNATURE), record.find(receipts.RECEIPT)
    assert receipt_node is not None
    if place is None:
        raise ReceiptRefused(f"{record.path} has no signature: {signatures.fingerprint(key)} did not sign it")
    envelope = b"".join(record.content(place, min(signatures.MAX_BYTES, record.size)))

    def files() -> list[tuple[str, str]]:
        if receipt.out is None:
            return []
        return [
            (path, _sha256(record.content(node.cid, most)))
            for path, node in record.files(receipt.out, most)
            if isinstance(node, File)
        ]

    try:
        signatures.check(envelope, key, receipt, record.receipt(receipt_node), files)
    except ReceiptRefused as exc:
        raise ReceiptRefused(f"{record.path}: {exc}") from exc


def _sha256(content: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for data in content:
        found.update(data)
    return found.hexdigest()


def _into(out: BinaryIO) -> Sink:
    def sink(data: bytes) -> None:
        out.write(data)

    return sink


def limits_for(path: Path, receipt: Receipt, given: Limits) -> Limits:
    """Those of `given`, then the recorded ones, then REPLAY_LIMITS. Raises ReceiptRefused, naming the -W to
    give, where the recording needs more than that."""
    shown = {
        "timeout": receipt.seconds,
        "max_stdout": max(
            receipt.stdout.size, 0 if receipt.trapped and receipt.format == 1 else receipt.stderr.size
        ),
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


def replay(options: Options) -> int:
    """Says what is the same and what is not; 0 if all is, else 3. A signal's number below 0 if one ended it.

    Raises ReceiptRefused where the run could not be repeated. The limits of `options` go before those of the
    receipt."""
    assert options.replay is not None
    path, given = Path(options.replay), options.limits
    if receipt_alone(path) is not None:
        raise ReceiptRefused(
            f"{path} is a receipt alone, without the guest and the blocks: record to a .car to replay"
        )
    key = None
    if options.key is not None:
        from ipfsfuse_run import signatures

        key = signatures.public_key(options.key)
    with contextlib.ExitStack() as files:
        guest, stdin, out, err, used = (files.enter_context(tempfile.TemporaryFile()) for _ in range(5))
        with opened(path) as (record, receipt):
            chosen = limits_for(path, receipt, given)
            most = chosen.max_out or 0
            if key is not None:
                check_signature(record, receipt, key, most)
            for name in receipt.contents or [receipts.STDIN]:
                # a smaller limit is the guest's: what was recorded before is only hashed
                bound = (
                    chosen.max_stdin
                    if name == receipts.STDIN
                    else max(chosen.max_stdout or 0, REPLAY_LIMITS.max_stdout or 0)
                )
                check_content(record, receipt, name, stdin if name == receipts.STDIN else None, bound)
            if options.out is not None and receipt.out is None:
                raise UsageError(f"--out {options.out}: the recorded run had no /out")
            repeated = repeated_options(path, receipt, options, chosen)
            _copy_guest(record, guest)
            stdin.seek(0)
            dirs = _blocks_below(record, receipt)
            results = None
            if receipt.out is not None:
                folder = places.scratch_folder("out", os.getpid()) if options.out is None else options.out
                results = places.results_folder(folder)
        try:
            said = _run(repeated, receipt, _Streams(guest, stdin, out, err, used), results)
        finally:
            if results is not None and options.out is None:
                places.remove_tree(results.path)
        outcome = said.outcome
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
        if options.show:
            _show(out, 1)
            _show(err, 2)
        return _say_verdicts(receipt, said.verdicts(receipt, dirs), ours, show=options.show)


def _show(file: BinaryIO, target: int) -> None:
    file.seek(0)
    while data := file.read(1 << 20):
        supervisor.to_descriptor(target)(data)


def _say_verdicts(receipt: Receipt, verdicts: Sequence[Verdict], ours: Mapping[str, str], show: bool) -> int:
    """With `show`, standard output is the guest's, and the verdict goes to standard error."""
    to = sys.stderr if show else sys.stdout
    now = recording.this_machine()
    for name, then in receipt.versions.items():
        if name in now and then != now[name]:
            print(f"{name}: {printable(then)} then, {now[name]} now", file=to)
    for each in verdicts:
        print(
            f"{each.what}: the same"
            if each.same
            else f"{each.what}: DIFFERENT, recorded {each.recorded}, now {each.now}",
            file=to,
        )
    if all(each.same for each in verdicts):
        return 0
    print(f"not fixed in this record: {', '.join(receipt.differs)}", file=to)
    if ours:
        limited = ", ".join(f"{name}={most}" for name, most in ours.items())
        print(f"limits of this replay alone: {limited}", file=to)
    return DIFFERENT


DIFFERENT = 3
"""The exit code of a replay that ran and gave something else."""


def _copy_guest(record: Bundle, out: BinaryIO) -> None:
    place = record.find(receipts.GUEST)
    if place is None:
        raise ReceiptRefused(f"{record.path} holds no {receipts.GUEST}")
    out.writelines(record.content(place, min(MAX_GUEST, max(64 << 20, 4 * record.size))))
    out.seek(0)


class _Streams(NamedTuple):
    guest: BinaryIO
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO
    used: BinaryIO
    """What the daemon writes down of the blocks that were asked for."""


class _Repeated(NamedTuple):
    outcome: Outcome
    stdout: Digest
    stderr: Digest
    out: Cid | None
    read: Sequence[Cid]

    def verdicts(self, receipt: Receipt, of_dirs: frozenset[bytes]) -> list[Verdict]:
        """`of_dirs`: the blocks of the folders that were given, which lie in the mount of a replay alone."""
        found = [
            Verdict("stdout", receipt.stdout, self.stdout),
            Verdict("stderr", receipt.stderr, self.stderr),
            Verdict(
                "exit code",
                _end(receipt.exit_code, receipt.trapped, receipt.limit),
                _end(
                    self.outcome.code,
                    self.outcome.trapped,
                    self.outcome.limit if receipt.format > 1 else None,
                ),
            ),
        ]
        if receipt.format == 1:
            return found
        if receipt.out is not None:
            found.append(Verdict("out", cids.text(receipt.out), self.out and cids.text(self.out)))
        held = {cids.multihash(each) for each in receipt.read}
        asked = {cids.multihash(each) for each in self.read}
        found.append(_compared("read", held, (asked & held) | (held & of_dirs)))
        lacked = {cids.multihash(each) for each in receipt.missing}
        found.append(_compared("missing", lacked, asked - held - of_dirs))
        return found


def _compared(what: str, then: set[bytes], now: set[bytes]) -> Verdict:
    same = then == now
    return Verdict(
        what,
        "" if same else f"{len(then)} blocks",
        "" if same else f"{len(now)}, {len(then ^ now)} of them others",
    )


def repeated_options(path: Path, receipt: Receipt, options: Options, chosen: Limits) -> Options:
    """The options of the recorded run. Raises ReceiptRefused, UsageError where it needs what was not
    given."""
    tmp = receipt.tmp if options.tmp is None else options.tmp
    if tmp > max(sandbox.TMP_BYTES, options.tmp or 0):
        raise ReceiptRefused(
            f"{path} needs more than a replay gives (--tmp {sandbox.TMP_BYTES}): if you trust it, give "
            f"--tmp {tmp}"
        )
    in_mount = receipt.format > 1 and receipt.name.startswith(sandbox.IPFS + "/")
    return Options(
        guest=receipt.name if in_mount else "",
        args=tuple(receipt.argv[1:]),
        argv0=receipt.argv[0],
        env=_environment(path, receipt, options.env),
        cwd=receipt.cwd,
        root=receipt.root,
        tmp=tmp,
        limits=chosen,
        isolated=True,
        mount_options=(f"--from={os.path.abspath(path)}", "--offline"),
    )


def _environment(
    path: Path, receipt: Receipt, given: Sequence[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """The recorded variables, and the given ones that were not recorded. Raises ReceiptRefused for a value
    that is missing or another one."""
    values = dict(given)
    for name in values.keys() - {each.name for each in receipt.env}:
        raise ReceiptRefused(f"{path}: the recorded run had no variable {name}")
    found = []
    for each in receipt.env:
        value = values.get(each.name, each.value)
        if value is None:
            raise ReceiptRefused(
                f"{path} does not hold the value of {each.name}: give --env {each.name}=VALUE"
            )
        if each.sha256 and receipts.variable_hash(receipt.salt, each.name, value) != each.sha256:
            raise ReceiptRefused(f"{path}: --env {each.name} had another value in the recorded run")
        found.append((each.name, value))
    return tuple(found)


def _blocks_below(record: Bundle, receipt: Receipt) -> frozenset[bytes]:
    """The blocks of the folders that were given."""
    found: set[bytes] = set()
    stack = [each.cid for each in receipt.dirs if each.cid is not None]
    while stack:
        cid = stack.pop()
        if cids.multihash(cid) not in found:
            found.add(cids.multihash(cid))
            if cid in record:
                stack.extend(read_paths.links(cid, record.block(cid)))
    return frozenset(found)


def _run(options: Options, receipt: Receipt, streams: _Streams, results: places.Results | None) -> _Repeated:
    option = f"--record=/proc/{os.getpid()}/fd/{streams.used.fileno()}"
    chosen = options.limits
    with mounts.mounted(options._replace(mount_options=(*options.mount_options, option))) as mount:
        box = sandbox.build(
            options._replace(
                guest=options.guest or "guest",
                dirs=_dirs(receipt, mount.mountpoint),
                out=None if results is None else results.path,
            ),
            mount.mountpoint,
            mount.mount_id,
        )
        data = (
            None
            if chosen.max_memory_size is None
            else chosen.max_memory_size + 2 * (chosen.max_wasm_stack or 0) + _DATA_SPARE
        )
        plan = Plan(
            options.guest or f"/proc/self/fd/{streams.guest.fileno()}",
            mount.mountpoint,
            box,
            mount.mount_id,
            receipt.deterministic,
            shown_as=receipt.name,
            max_data=data,
            guest_sha256=supervisor.digest_of(streams.guest).sha256,
        )
        kept = streams.stdout, streams.stderr
        outcome = supervisor.run_kept(plan, streams.stdin, kept, show=False, close=[mount.control.fileno()])
    if outcome.trap is not None and receipt.format == 1:  # which counts it as standard error
        streams.stderr.seek(0, os.SEEK_END)
        streams.stderr.write(trap_text(plan.name, outcome.trap).encode())
    out = None
    if results is not None and outcome.refused is None and outcome.limit != "max_out":
        with open(os.devnull, "wb") as nowhere:
            out = Writer(nowhere).add_results(results.path, chosen.max_out or 0).built.cid
    return _Repeated(
        outcome,
        supervisor.digest_of(streams.stdout),
        supervisor.digest_of(streams.stderr),
        out,
        recording.used(streams.used)[0],
    )


def _end(code: int, trapped: bool, limit: str | None) -> str:
    why = ", by a trap" if trapped else f", by {limits.option(limit)}" if limit else ""
    return f"{code}{why}"


def _dirs(receipt: Receipt, mountpoint: str) -> tuple[Dir, ...]:
    """The folders that were recorded, by their CIDs in the mount."""
    found = []
    for each in receipt.dirs:
        if each.cid is None:
            raise ReceiptRefused(f"the folder {each.guest} is not part of the record")
        found.append(Dir(os.path.join(mountpoint, cids.text(each.cid)), each.guest, writable=False))
    return tuple(found)
