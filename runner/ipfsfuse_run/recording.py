"""`--record`: one run in a mount of its own, and its receipt, as JSON or as a CAR with all that was read.

What the run needs on the way lies in files without a name: a runner that is killed leaves nothing.
"""

import base64
import datetime
import importlib.metadata
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ipfsfuse
from ipfsfuse.client import Connection
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import DaemonFailed, StoreFailed, Unavailable, UsageError, WrongBlock
from ipfsfuse_run import mounts, receipts, sandbox, supervisor
from ipfsfuse_run.child import Plan
from ipfsfuse_run.options import Options
from ipfsfuse_run.receipts import GivenDir, Receipt, Writer
from ipfsfuse_run.sandbox import Sandbox
from ipfsfuse_run.supervisor import Digest, Outcome


class _Material(NamedTuple):
    """What a run leaves behind, for its receipt."""

    used: BinaryIO
    """The daemon's record: JSON lines."""
    guest: BinaryIO
    stdin: BinaryIO
    control: Connection


class _Run(NamedTuple):
    outcome: Outcome
    stdout: Digest
    stderr: Digest
    started: str
    seconds: float


def record(options: Options) -> Outcome:
    """Runs the guest and writes its receipt; one that could not be started, or was interrupted, leaves
    none."""
    target = _target(options)
    with (
        tempfile.TemporaryFile() as used,
        tempfile.TemporaryFile() as guest,
        supervisor.spooled_stdin(options.limits.max_stdin) as stdin,
    ):
        # the daemon opens the file through this process, which outlives it
        told = f"--record=/proc/{os.getpid()}/fd/{used.fileno()}"
        with mounts.mounted(options._replace(mount_options=(*options.mount_options, told))) as mount:
            mounts.warn_of_disclosure(options, mount)
            box = sandbox.build(options, mount.mountpoint, mount.mount_id)
            plan = Plan(
                options.guest, mount.mountpoint, box, mount.mount_id, options.deterministic, guest.fileno()
            )
            run = _run(plan, stdin, mount.control)
            if run.outcome.refused is None and run.outcome.signal is None:
                _write(target, options, box, run, _Material(used, guest, stdin, mount.control))
    return run.outcome


def _target(options: Options) -> Path:
    assert options.record is not None
    target = Path(options.record)
    if target.suffix not in (".json", ".car"):
        raise UsageError(
            f"--record {target}: name it .json for the receipt alone, .car for the receipt with all blocks"
        )
    if target.suffix == ".car" and any(each.writable for each in options.dirs):
        raise UsageError(
            "--record to a CAR takes --dir read-only alone (HOST::GUEST::ro): a folder that changes "
            "can't be repeated"
        )
    if (
        receipts.arguments_size((options.argv0 or options.guest, *options.args), options.env)
        > receipts.MAX_ARGUMENTS
    ):
        raise UsageError(
            f"--record: arguments and variables of more than {receipts.MAX_ARGUMENTS} bytes can't be recorded"
        )
    return target


def _run(plan: Plan, stdin: BinaryIO, control: Connection) -> _Run:
    started, begin = datetime.datetime.now(datetime.UTC), time.monotonic()
    through = supervisor.to_descriptor(1), supervisor.to_descriptor(2)
    outcome, out, err = supervisor.run_hashed(plan, stdin, through, close=[control.fileno()])
    return _Run(
        outcome,
        out,
        err,
        started.isoformat(timespec="milliseconds"),
        round(time.monotonic() - begin, 3),
    )


def _write(target: Path, options: Options, box: Sandbox, run: _Run, material: _Material) -> None:
    if options.guest == "-":  # standard input was the guest: none was left for it
        material.stdin.truncate(0)
    receipt = _receipt(options, box, run, material)
    with receipts.written(target) as out:
        if target.suffix == ".json":
            with open(os.devnull, "wb") as nowhere:
                receipt, _roots = _with_blocks(Writer(nowhere), receipt, material.control)
            out.write(_encoded(receipt))
        else:
            _write_car(Writer(out), receipt, options, material)


def _receipt(options: Options, box: Sandbox, run: _Run, material: _Material) -> Receipt:
    read, ahead = _used(material.used)
    return Receipt(
        guest=receipts.cid_of(material.guest),
        name=os.fsencode(options.guest).decode(errors="replace"),
        argv=box.argv,
        env=box.env,
        cwd=box.cwd,
        limits=box.limits,
        dirs=[GivenDir(each.guest, each.writable, None) for each in options.dirs],
        deterministic=options.deterministic,
        versions={
            "ipfsfuse": ipfsfuse.__version__,
            "wasmtime": importlib.metadata.version("wasmtime"),
            "machine": platform.machine(),
        },
        read=read,
        missing=(),
        ahead=ahead,
        stdin=supervisor.digest_of(material.stdin),
        stdout=run.stdout,
        stderr=run.stderr,
        exit_code=run.outcome.code,
        trapped=run.outcome.trapped,
        started=run.started,
        seconds=run.seconds,
    )


def _encoded(receipt: Receipt) -> bytes:
    data = receipts.encode(receipt)
    if len(data) > receipts.MAX_BYTES:
        raise StoreFailed(
            f"the receipt names so many blocks that it has {len(data)} bytes: more than "
            f"{receipts.MAX_BYTES} can't be read again"
        )
    return data


def _used(record: BinaryIO) -> tuple[list[Cid], list[Cid]]:
    """(read, only fetched ahead), each in the order of first use."""
    record.seek(0)
    found: dict[str, list[Cid]] = {"read": [], "ahead": []}
    for line in record:
        entry = json.loads(line)
        found[entry["use"]].append(cids.parse(entry["cid"]))
    read = dict.fromkeys(found["read"])
    return list(read), [each for each in dict.fromkeys(found["ahead"]) if each not in read]


def _write_car(writer: Writer, receipt: Receipt, options: Options, material: _Material) -> None:
    receipt, roots = _with_blocks(writer, receipt, material.control)
    dirs = [writer.add_tree(Path(each.host)) for each in options.dirs]
    given = [each._replace(cid=built.cid) for each, built in zip(receipt.dirs, dirs, strict=True)]
    material.guest.seek(0)
    children = [
        (receipts.RECEIPT, writer.add_file(io.BytesIO(_encoded(receipt._replace(dirs=given))))),
        (receipts.GUEST, writer.add_file(material.guest)),
        (receipts.STDIN, writer.add_file(material.stdin)),
        (receipts.IPFS, writer.add_folder([(cids.text(cid), built) for cid, built in roots.items()])),
    ]
    if dirs:
        children.append(
            (receipts.DIRS, writer.add_folder([(str(number), built) for number, built in enumerate(dirs)]))
        )
    writer.close(writer.add_folder(children))


def _with_blocks(writer: Writer, receipt: Receipt, control: Connection) -> tuple[Receipt, dict[Cid, Built]]:
    """Puts every block that was read into the CAR. Gives the receipt without what no source had, and the
    roots that were used: the blocks that no block read before them links to."""
    roots: dict[Cid, Built] = {}
    below: set[bytes] = set()
    missing = []
    for cid in receipt.read:
        block = cids.inline(cid)
        try:
            if block is None:
                block = _ask(control, cid)
                writer.put(cid, block)
        except Unavailable:
            missing.append(cid)
            continue
        if cids.multihash(cid) not in below:
            roots[cid] = Built(cid, 0, len(block))
        below.update(cids.multihash(each) for each in receipts.links(cid, block))
    lacking = set(missing)
    return receipt._replace(
        read=[each for each in receipt.read if each not in lacking], missing=missing
    ), roots


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
