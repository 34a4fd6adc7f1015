"""`--record`: one run in a mount of its own, and its receipt, as JSON or as a CAR with all that was read.

What the run needs on the way lies in files without a name: a runner that is killed leaves nothing.
"""

import base64
import contextlib
import datetime
import importlib.metadata
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import ipfsfuse
from ipfsfuse.client import Connection
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.cid import Cid
from ipfsfuse.dag.nodes import Node, parse
from ipfsfuse.errors import (
    DaemonFailed,
    IpfsFuseError,
    Malformed,
    StoreFailed,
    Unavailable,
    Unsupported,
    UsageError,
    WrongBlock,
)
from ipfsfuse_run import mounts, read_paths, receipts, results, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import NotKept, ReceiptRefused, say
from ipfsfuse_run.mounts import Mount
from ipfsfuse_run.options import Options
from ipfsfuse_run.read_paths import Row
from ipfsfuse_run.receipts import GivenDir, Receipt
from ipfsfuse_run.record import RecordWriter, written
from ipfsfuse_run.sandbox import Sandbox
from ipfsfuse_run.supervisor import CompletedRun, Outcome

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class RunFiles(NamedTuple):
    """What a run leaves behind, for its receipt: files without a name."""

    used: BinaryIO
    """The daemon's record: JSON lines."""
    guest: BinaryIO
    stdin: BinaryIO
    stdout: BinaryIO
    stderr: BinaryIO


class _Run(NamedTuple):
    outcome: Outcome
    started: str
    seconds: float


def mounted(options: Options, used: BinaryIO) -> AbstractContextManager[Mount]:
    """A mount of the run's own, whose daemon writes into the file `used` which blocks are asked for. The
    daemon opens the file through this process, which outlives it."""
    option = f"--record=/proc/{os.getpid()}/fd/{used.fileno()}"
    return mounts.mounted(options._replace(mount_options=(*options.mount_options, option)))


def record(options: Options) -> CompletedRun:
    """Runs the guest and writes its receipt; one that could not be started, or was interrupted, leaves
    none. Raises NotKept if the guest ran and the receipt could not be written."""
    target = _target(options)
    key = None
    if options.sign is not None:
        from ipfsfuse_run import signatures

        key = signatures.private_key(options.sign)
    with contextlib.ExitStack() as stack:
        # beside the receipt: what is kept of the output may be more than TMPDIR holds
        used, guest, stdout, stderr = (
            stack.enter_context(tempfile.TemporaryFile(dir=target.parent)) for _ in range(4)
        )
        stdin = stack.enter_context(supervisor.spooled_stdin(options.limits.max_stdin))
        files = RunFiles(used, guest, stdin, stdout, stderr)
        with mounted(options, used) as mount:
            mounts.warn_of_disclosure(options, mount)
            box = sandbox.build(options, mount.mountpoint, mount.mount_id)
            plan = Plan(options, mount.mountpoint, box, mount.mount_id, keep=guest.fileno())
            run = _run(plan, files, mount.control)
            if run.outcome.refused is None and run.outcome.signal is None:
                if run.outcome.limit == "max_out":
                    say(f"{target} is not written: its results would be larger than max-out")
                else:
                    try:
                        return _write(target, options, box, run, files, mount.control, key)
                    except IpfsFuseError as exc:
                        raise NotKept(str(exc), CompletedRun(run.outcome)) from exc
    return CompletedRun(run.outcome)


def _target(options: Options) -> Path:
    assert options.record is not None
    target = Path(options.record)
    if target.suffix not in (".json", ".car"):
        raise UsageError(
            f"--record {target}: name it .json for the receipt alone, .car for the receipt with all blocks"
        )
    if not target.parent.is_dir():
        raise UsageError(f"--record {target}: there is no folder {target.parent}")
    if options.sign is not None and target.suffix != ".car":
        raise UsageError("--sign goes with --record RUN.car: the signature lies in it")
    if any(each.writable for each in options.dirs):
        raise UsageError(
            "--record takes --dir read-only alone (HOST::GUEST::ro): a folder that changes can't be "
            "repeated. Results go to --out DIR, the guest's /out"
        )
    size = receipts.arguments_size((options.argv0 or options.guest, *options.args), options.env)
    if size > receipts.MAX_ARGUMENTS:
        raise UsageError(
            f"--record: arguments and variables of more than {receipts.MAX_ARGUMENTS} bytes can't be recorded"
        )
    return target


def _run(plan: Plan, files: RunFiles, control: Connection) -> _Run:
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    kept = files.stdout, files.stderr
    outcome = supervisor.run_kept(plan, files.stdin, kept, show=True, close=[control.fileno()])
    return _Run(outcome, started.isoformat(timespec="milliseconds"), round(time.monotonic() - begin, 3))


def _write(
    target: Path,
    options: Options,
    box: Sandbox,
    run: _Run,
    files: RunFiles,
    control: Connection,
    key: "Ed25519PrivateKey | None",
) -> CompletedRun:
    """Writes the receipt."""
    if options.guest == "-":  # standard input was the guest: none was left for it
        files.stdin.truncate(0)
    with written(target) as file, open(os.devnull, "wb") as nowhere:
        is_car = target.suffix == ".car"
        writer = RecordWriter(file if is_car else nowhere)
        asked, ahead = used(files.used)
        blocks = _take_blocks(writer, asked, control)
        files.guest.seek(0)
        parts = {receipts.GUEST: writer.add_file(files.guest)}
        contents = (
            (receipts.STDIN, files.stdin),
            (receipts.STDOUT, files.stdout),
            (receipts.STDERR, files.stderr),
        )
        for name, held in contents:
            held.seek(0)
            parts[name] = writer.add_file(held)
        left = None
        if options.out is not None:
            left = results.written(writer, options.out, options.limits.out_bytes)
            parts[receipts.OUT] = left.built
        dirs = [writer.add_tree(Path(each.host)) for each in options.dirs]
        if dirs:
            parts[receipts.DIRS] = writer.add_folder(
                [(str(number), built) for number, built in enumerate(dirs)]
            )
        salt = os.urandom(16).hex()
        receipt = Receipt(
            guest=parts[receipts.GUEST].cid,
            name=os.fsencode(options.guest).decode(errors="replace"),
            argv=box.argv,
            env=[
                receipts.variable(salt, name, value, options.record_env)
                for name, value in dict(box.env).items()
            ],
            cwd=box.cwd,
            limits=options.limits,
            dirs=[GivenDir(each.guest, built.cid) for each, built in zip(options.dirs, dirs, strict=True)],
            deterministic=options.deterministic,
            versions=this_machine(),
            read=blocks.read,
            missing=blocks.missing,
            ahead=ahead,
            stdin=supervisor.digest_of(files.stdin),
            stdout=supervisor.digest_of(files.stdout),
            stderr=supervisor.digest_of(files.stderr),
            exit_code=run.outcome.code,
            trapped=run.outcome.trapped,
            started=run.started,
            seconds=run.seconds,
            format=receipts.FORMAT,
            salt=salt,
            root=options.root,
            tmp=box.tmp,
            paths=blocks.rows(),
            contents={name: parts[name].cid for name, _held in contents},
            out=None if left is None else left.built.cid,
            limit=run.outcome.limit,
        )
        data = _encoded(receipt)
        if not is_car:
            file.write(data)
        else:
            parts[receipts.RECEIPT] = writer.add_file(io.BytesIO(data))
            parts[receipts.IPFS] = writer.add_folder(
                [
                    (cids.text(each), writer.add_symlink(f"../../{cids.text(each)}"))
                    for each in blocks.roots.found
                ]
            )
            if key is not None:
                from ipfsfuse_run import signatures

                envelope = signatures.signed(key, receipt, data, [] if left is None else left.files)
                parts[receipts.SIGNATURE] = writer.add_file(io.BytesIO(envelope))
            writer.close(writer.add_folder(list(parts.items())))
        return CompletedRun(run.outcome, None if receipt.out is None else cids.text(receipt.out), data)


def this_machine() -> dict[str, str]:
    """What may make a run differ elsewhere."""
    return {
        "ipfsfuse": ipfsfuse.__version__,
        "wasmtime": importlib.metadata.version("wasmtime"),
        "machine": platform.machine(),
    }


def _encoded(receipt: Receipt) -> bytes:
    data = receipts.encode(receipt)
    if len(data) > receipts.MAX_BYTES:
        raise StoreFailed(
            f"the receipt names so many blocks that it has {len(data)} bytes: more than "
            f"{receipts.MAX_BYTES} can't be read again"
        )
    return data


def used(record: BinaryIO) -> tuple[list[Cid], list[Cid]]:
    """What a daemon wrote down: (read, only fetched ahead), each in the order of first use."""
    record.seek(0)
    found: dict[str, list[Cid]] = {"read": [], "ahead": []}
    for line in record:
        entry = json.loads(line)
        found[entry["use"]].append(cids.parse(entry["cid"]))
    read = dict.fromkeys(found["read"])
    return list(read), [each for each in dict.fromkeys(found["ahead"]) if each not in read]


class _Blocks:
    """What was read, without what no source had."""

    def __init__(self) -> None:
        self.read: list[Cid] = []
        self.missing: list[Cid] = []
        self.roots = read_paths.Roots()
        self._nodes: dict[Cid, Node] = {}

    def add(self, cid: Cid, block: bytes) -> None:
        self.read.append(cid)
        self.roots.add(cid, block)
        with contextlib.suppress(Malformed, Unsupported):  # the guest saw an error: no path leads through it
            self._nodes[cid] = parse(cid, block)

    def _node(self, cid: Cid) -> Node:
        inline = cids.inline(cid)
        if cid not in self._nodes and inline is not None:
            return parse(cid, inline)
        try:
            return self._nodes[cid]
        except KeyError as exc:
            raise Malformed(f"{cids.brief(cid)} is not a node of a file or folder") from exc

    def rows(self) -> list[Row]:
        """By path; none where no path is known."""
        try:
            return list(read_paths.Walk(self._node, self.roots.found, self.read).rows())
        except ReceiptRefused:
            return []


def _take_blocks(writer: RecordWriter, asked: Sequence[Cid], control: Connection) -> _Blocks:
    """Puts every block that was read into the CAR."""
    blocks = _Blocks()
    for cid in asked:
        block = cids.inline(cid)
        try:
            if block is None:
                block = _ask(control, cid)
                writer.put(cid, block)
        except Unavailable:
            blocks.missing.append(cid)
            continue
        blocks.add(cid, block)
    return blocks


def _ask(control: Connection, cid: Cid) -> bytes:
    """One block from the mount's daemon, which need not be trusted with it. Raises DaemonFailed."""
    try:
        block = base64.b64decode(control.ask("block", cid=cids.text(cid))["data"], validate=True)
        cids.verify(cid, block)
    except (KeyError, TypeError, ValueError, WrongBlock) as exc:
        raise DaemonFailed(
            f"the mount's daemon did not give the block {cids.text(cid)} for the record"
        ) from exc
    return block
