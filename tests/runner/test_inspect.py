"""`inspect` of hostile records: it ends, and shows what it can."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse.dag import builder
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.record import RecordWriter, open_car
from tests.runner import recorded
from tests.runner.conftest import TOP, Runner

GUEST = b"any guest"


def write(target: Path, writer: RecordWriter, root: Built, read: list[Built]) -> None:
    """Completes the record of a run that read the blocks `read` of the DAG `root`."""
    guest, stdin = writer.add_file(io.BytesIO(GUEST)), writer.add_file(io.BytesIO())
    fields = recorded.receipt(GUEST, b"", read=[cids.text(each.cid) for each in read])
    receipt = writer.add_file(io.BytesIO(json.dumps(fields).encode()))
    ipfs = writer.add_folder([(cids.text(root.cid), root)])
    writer.close(
        writer.add_folder(
            [("receipt.json", receipt), ("guest.wasm", guest), ("stdin", stdin), ("ipfs", ipfs)]
        )
    )


def inspected(target: Path) -> list[dict[str, Any]]:
    done = Runner({**os.environ, "PYTHONPATH": str(TOP)})("inspect", target, "--json")
    assert done.returncode == 0, done
    rows: list[dict[str, Any]] = json.loads(done.stdout)["paths"]
    return rows


def test_a_block_that_was_changed_since_it_was_first_read_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        file = writer.add_file(io.BytesIO(b"the content"))
        write(target, writer, file, [file])
    with open_car(target) as record:
        assert record.block(file.cid) == b"the content"
        target.write_bytes(target.read_bytes().replace(b"the content", b"The content"))
        with pytest.raises(ReceiptRefused, match=r"run\.car was changed"):
            record.block(file.cid)


def test_a_tree_3000_deep_is_shown(tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        read = [writer.add_file(io.BytesIO(b"bottom"))]
        for _ in range(3000):
            read.append(writer.add_folder([("d", read[-1])]))
        write(target, writer, read[-1], read)
    rows = inspected(target)
    assert len(rows) == 3001
    assert (rows[-1]["path"].count("/d"), rows[-1]["read"]) == (3000, 6)


def test_a_file_that_names_one_block_a_billion_times_is_counted_at_once(tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        read = [writer.add_file(io.BytesIO(b"x"))]
        for _ in range(30):
            file_builder = builder.FileBuilder(builder.UNIXFS_V1_2025, writer.put)
            file_builder.add(read[-1])
            file_builder.add(read[-1])
            read.append(file_builder.finish())
        write(target, writer, read[-1], read)
    (row,) = inspected(target)
    assert row["size"] == row["read"] == 1 << 30
