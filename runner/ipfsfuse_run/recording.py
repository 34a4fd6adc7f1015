"""`--record`: executes a run in a mount of its own, and writes its receipt, as JSON or as a CAR file with all
that was read.

Temporary files have no names, so a killed runner leaves nothing.
"""

import base64
import contextlib
import datetime
import hashlib
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
from ipfsfuse_run import limits, mounts, read_paths, receipts, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.errors import GuestRefused, NotKept, ReceiptRefused, say
from ipfsfuse_run.mounts import Mount
from ipfsfuse_run.options import Options
from ipfsfuse_run.read_paths import Row
from ipfsfuse_run.receipts import Digest, GivenDir, Receipt, Variable
from ipfsfuse_run.record import RecordWriter, add_tree, replace_file
from ipfsfuse_run.supervisor import CompletedRun, Outcome, RunFiles

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class _Run(NamedTuple):
    outcome: Outcome
    started: str
    seconds: float


def open_mount(options: Options, used: BinaryIO) -> AbstractContextManager[Mount]:
    """A mount of the run's own. Its daemon logs the blocks that are asked for in the file `used`. It opens
    that file by the path of this process's descriptor. This process outlives the daemon."""
    option = f"--record=/proc/{os.getpid()}/fd/{used.fileno()}"
    return mounts.open_mount(options._replace(mount_options=(*options.mount_options, option)))


def record(options: Options) -> CompletedRun:
    """Runs the guest and writes its receipt. Writes none if the guest could not be started or was
    interrupted. Raises NotKept if the guest ran but the receipt could not be written."""
    target = _target(options)
    key = None
    if options.sign is not None:
        from ipfsfuse_run import signatures

        key = signatures.private_key(options.sign)
    with contextlib.ExitStack() as stack:
        # in the receipt's folder: the guest's output may not fit into TMPDIR
        files = RunFiles(
            *(stack.enter_context(tempfile.TemporaryFile(dir=target.parent)) for _ in RunFiles._fields)
        )
        _spool_stdin(files.stdin, options.limits.max_stdin)
        with open_mount(options, files.block_log) as mount:
            mounts.warn_of_disclosure(options, mount)
            box = sandbox.build(options, mount.mountpoint, mount.mount_id)
            plan = Plan(options, mount.mountpoint, box, mount.mount_id, guest_copy=files.guest.fileno())
            started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
            outcome = supervisor.run(plan, files=files)
            run = _Run(
                outcome, started.isoformat(timespec="milliseconds"), round(time.monotonic() - begin, 3)
            )
            if outcome.refused is None and outcome.signal is None:
                if outcome.limit == "max_out":
                    say(f"{target} is not written: its results would be larger than max-out")
                else:
                    try:
                        return _write(target, plan, run, files, mount.control, key)
                    except IpfsFuseError as exc:
                        raise NotKept(str(exc), CompletedRun(outcome)) from exc
    return CompletedRun(outcome)


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


def _spool_stdin(spool: BinaryIO, bound: int | None) -> None:
    """Copies standard input, unless it is a terminal, to the file `spool`. Raises GuestRefused for more than
    `bound` bytes."""
    if not os.isatty(0):
        while data := os.read(0, 1 << 20):
            spool.write(data)
            if bound is not None and spool.tell() > bound:
                given = limits.value_text("max_stdin", bound)
                raise GuestRefused(f"standard input has more than max-stdin={given}")
    spool.seek(0)


def digest_of(file: BinaryIO) -> Digest:
    """The digest of the whole file. Leaves the file at its start."""
    file.seek(0)
    found = hashlib.sha256()
    while data := file.read(1 << 20):
        found.update(data)
    digest = Digest(found.hexdigest(), file.tell())
    file.seek(0)
    return digest


def _write(
    target: Path,
    plan: Plan,
    run: _Run,
    files: RunFiles,
    control: Connection,
    key: "Ed25519PrivateKey | None",
) -> CompletedRun:
    """Writes the receipt."""
    options, box = plan.options, plan.box
    if options.guest == "-":  # standard input was the guest, which then had none
        files.stdin.truncate(0)
    with replace_file(target) as file, open(os.devnull, "wb") as nowhere:
        is_car = target.suffix == ".car"
        writer = RecordWriter(file if is_car else nowhere)
        asked, ahead = logged_blocks(files.block_log)
        blocks = _Blocks(writer, asked, control)
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
            left = add_tree(writer, options.out, options.limits.out_bytes)
            parts[receipts.OUT] = left.built
        dirs = [add_tree(writer, each.host, None).built for each in options.dirs]
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
                Variable(
                    name,
                    receipts.variable_hash(salt, name, value),
                    value if options.record_env else None,
                )
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
            stdin=digest_of(files.stdin),
            stdout=digest_of(files.stdout),
            stderr=digest_of(files.stderr),
            exit_code=run.outcome.code,
            trapped=run.outcome.trapped,
            started=run.started,
            seconds=run.seconds,
            format=receipts.RECEIPT_FORMAT,
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
    """Versions that may make a run differ on another machine."""
    return {
        "ipfsfuse": ipfsfuse.__version__,
        "wasmtime": importlib.metadata.version("wasmtime"),
        "machine": platform.machine(),
    }


def _encoded(receipt: Receipt) -> bytes:
    data = receipts.encode(receipt)
    if len(data) > receipts.MAX_RECEIPT:
        raise StoreFailed(
            f"the receipt names so many blocks that it has {len(data)} bytes: more than "
            f"{receipts.MAX_RECEIPT} can't be read again"
        )
    return data


def logged_blocks(record: BinaryIO) -> tuple[list[Cid], list[Cid]]:
    """The blocks in a daemon's log: (read, only fetched ahead), each in the order of first use."""
    record.seek(0)
    found: dict[str, list[Cid]] = {"read": [], "ahead": []}
    for line in record:
        entry = json.loads(line)
        found[entry["use"]].append(cids.parse(entry["cid"]))
    read = dict.fromkeys(found["read"])
    return list(read), [each for each in dict.fromkeys(found["ahead"]) if each not in read]


class _Blocks:
    """Puts the blocks that the run asked for into the CAR. Sorts them into blocks that were read and blocks
    that no source had."""

    def __init__(self, writer: RecordWriter, asked: Sequence[Cid], control: Connection) -> None:
        self.read: list[Cid] = []
        self.missing: list[Cid] = []
        self.roots = read_paths.Roots()
        self._nodes: dict[Cid, Node] = {}
        for cid in asked:
            block = cids.inline_block(cid)
            try:
                if block is None:
                    block = _ask(control, cid)
                    writer.put(cid, block)
            except Unavailable:
                self.missing.append(cid)
                continue
            self.read.append(cid)
            self.roots.add(cid, block)
            with contextlib.suppress(Malformed, Unsupported):  # the guest saw an error: no path leads on
                self._nodes[cid] = parse(cid, block)

    def _node(self, cid: Cid) -> Node:
        inline = cids.inline_block(cid)
        if cid not in self._nodes and inline is not None:
            return parse(cid, inline)
        try:
            return self._nodes[cid]
        except KeyError as exc:
            raise Malformed(f"{cids.brief(cid)} is not a node of a file or folder") from exc

    def rows(self) -> list[Row]:
        """What was read, by path; empty if the blocks form no valid tree."""
        try:
            return list(read_paths.Walk(self._node, self.roots.found, self.read).rows())
        except ReceiptRefused:
            return []


def _ask(control: Connection, cid: Cid) -> bytes:
    """One block from the mount's daemon, verified here. Raises DaemonFailed."""
    try:
        block = base64.b64decode(control.ask("block", cid=cids.text(cid))["data"], validate=True)
        cids.verify(cid, block)
    except (KeyError, TypeError, ValueError, WrongBlock) as exc:
        raise DaemonFailed(
            f"the mount's daemon did not give the block {cids.text(cid)} for the record"
        ) from exc
    return block
