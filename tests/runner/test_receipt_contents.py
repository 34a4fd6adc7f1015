"""What a receipt says of a run besides its input and output: which blocks were only fetched ahead, which were
missing, and whether NaN bits were fixed."""

import io
import json
import os
import platform
import struct
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse.dag import car
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import Built
from ipfsfuse.dag.nodes import Directory, parse
from ipfsfuse_run import receipts
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.record import RecordWriter
from tests.dagging import Dag
from tests.mounting import Home
from tests.runner.conftest import GUESTS, Runner, lines

pytestmark = pytest.mark.fuse

LEAF = 256 << 10
LEAVES = [bytes([number]) * LEAF for number in range(64)]


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})


def receipt(target: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(target.read_text())
    return content


def test_a_receipt_lists_separately_the_blocks_that_were_only_fetched_ahead(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    dag = Dag()
    file = dag.file(LEAVES)
    leaves = [cids.text(dag.block(leaf)) for leaf in LEAVES]
    source, target = dag.car(tmp_path / "source.car"), tmp_path / "run.json"
    done = run(
        "--from", source, "--record", target, habits, "cat", f"/ipfs/{cids.text(file)}", str(16 * LEAF)
    )
    assert done.stdout == b"".join(LEAVES[:16])
    seen = receipt(target)
    assert seen["read"] == [cids.text(file), *leaves[:16]]
    assert seen["ahead"]
    assert seen["ahead"] == leaves[16 : 16 + len(seen["ahead"])]
    assert leaves[-1] not in seen["ahead"]  # because the guest stopped long before it
    assert seen["missing"] == []


@pytest.mark.parametrize("form", ["json", "car"])
def test_a_missing_block_is_in_the_receipt_and_is_missing_in_the_replay(
    run: Runner, tmp_path: Path, habits: Path, form: str
) -> None:
    dag = Dag()
    file = dag.file(LEAVES[:3])
    first, second = (dag.block(leaf) for leaf in LEAVES[:2])
    del dag.blocks[cids.multihash(second)]
    source, target = dag.car(tmp_path / "source.car"), tmp_path / f"run.{form}"
    done = run("--from", source, "--offline", "--record", target, habits, "cat", f"/ipfs/{cids.text(file)}")
    assert (done.returncode, done.stdout) == (1, LEAVES[0])
    if form == "json":
        seen = receipt(target)
        assert (seen["read"], seen["missing"]) == ([cids.text(file), cids.text(first)], [cids.text(second)])
    else:
        again = run("--replay", target)
        assert again.returncode == 0
        assert {"exit code: the same", "read: the same", "missing: the same"} <= set(lines(again.stdout))


def rewritten(source: Path, target: Path, new_receipt: dict[str, Any]) -> Path:
    """Copies the record `source`, with another receipt."""
    data = source.read_bytes()
    at = car.header_length(data[:9])
    (root,) = car.decode_header(data[:at])
    with target.open("w+b") as out:
        writer, blocks = RecordWriter(out), {}
        while at < len(data):
            found = car.section(data[at : at + car.HEAD_BYTES], at=0, base=at)
            blocks[found.cid] = data[found.block : found.end]
            writer.put(found.cid, blocks[found.cid])
            at = found.end
        folder = parse(root, blocks[root])
        assert isinstance(folder, Directory)
        children = {os.fsdecode(link.name): Built(link.cid, 0, link.tsize) for link in folder.links}
        children["receipt.json"] = writer.add_file(io.BytesIO(json.dumps(new_receipt).encode()))
        writer.close(writer.add_folder(list(children.items())))
    return target


def test_a_receipt_with_other_reads_is_reported_as_different(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    """It lists a block fewer or more as read or as missing, or it lists a block as only fetched ahead."""
    dag = Dag()
    file = dag.file(LEAVES[:6])
    other = cids.text(dag.file([b"other" * 10]))
    del dag.blocks[cids.multihash(dag.block(LEAVES[3]))]
    source, target = dag.car(tmp_path / "source.car"), tmp_path / "run.car"
    options = ("--from", source, "--offline", "--record", target)
    assert run(*options, habits, "cat", f"/ipfs/{cids.text(file)}").returncode == 1
    recorded = json.loads(run("inspect", target, "--json").stdout)
    assert len(recorded["missing"]) == 1
    last = recorded["read"][-1]
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "read less": {"read": recorded["read"][:-1]},
        "read more": {"read": [*recorded["read"], other]},
        "read as ahead": {"read": recorded["read"][:-1], "ahead": [*recorded["ahead"], last]},
        "none missing": {"missing": []},
        "more missing": {"missing": [*recorded["missing"], other]},
        "missing as ahead": {"missing": [], "ahead": [*recorded["ahead"], *recorded["missing"]]},
    }
    for change, changed in changes.items():
        again = run("--replay", rewritten(target, tmp_path / "again.car", recorded | changed))
        expected = {"nothing": 0, "read more": 125}.get(change, 3)  # 125: the record lacks that block
        assert again.returncode == expected, (change, again)


def test_a_guest_whose_name_is_not_utf_8_can_be_recorded(run: Runner, tmp_path: Path, habits: Path) -> None:
    guest = tmp_path / os.fsdecode(b"\xff.wasm")
    guest.write_bytes(habits.read_bytes())
    for form in ("json", "car"):
        assert (
            run("--record", tmp_path / f"run.{form}", "--argv0", "me", guest, "args").stdout == b"me\nargs\n"
        )
    assert receipt(tmp_path / "run.json")["guest"]["name"] == f"{tmp_path}/\ufffd.wasm"
    assert run("--replay", tmp_path / "run.car").returncode == 0


def test_a_receipt_with_half_a_surrogate_pair_is_refused(run: Runner, tmp_path: Path, habits: Path) -> None:
    target = tmp_path / "run.json"
    run("--record", target, "--env", "A=1", habits, "args")
    whole, half = receipt(target), "\udcff"
    receipts.decode(json.dumps(whole).encode())
    folder = {"guest": half, "cid": whole["guest"]["cid"]}
    guest = whole["guest"] | {"name": half}
    for field, value in {
        "argv": [half],
        "env": whole["env"] | {"variables": [whole["env"]["variables"][0] | {"name": half}]},
        "cwd": half,
        "dirs": [folder],
        "guest": guest,
        "started": half,
    }.items():
        with pytest.raises(ReceiptRefused, match="UTF-8"):
            receipts.decode(json.dumps(whole | {field: value}).encode())


CANONICAL = struct.pack(
    "<IQQIQQ", 0x7FC0_0000, 0x7FF8 << 48, 0x7FF8 << 48, 0x7FC0_0000, *[0x7FC0_0000_7FC0_0000] * 2
)


def test_nan_bits_are_fixed_only_with_deterministic(run: Runner, tmp_path: Path) -> None:
    """nans.wat makes each NaN by an operation in which processors differ, or which keeps the bits of its
    operand."""
    fixed, free = tmp_path / "fixed.json", tmp_path / "free.json"
    assert run("--record", fixed, "--deterministic", GUESTS / "nans.wat").stdout == CANONICAL
    assert "NaN bits" not in receipt(fixed)["differs"]
    output = run("--record", free, GUESTS / "nans.wat").stdout
    assert "NaN bits" in receipt(free)["differs"]
    if platform.machine() == "x86_64":
        assert output != CANONICAL
