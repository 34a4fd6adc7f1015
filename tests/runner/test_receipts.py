"""Receipts: a run recorded, repeated offline from its CAR alone, inspected; and records that are refused."""

import io
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import StoreFailed
from ipfsfuse_run import receipts
from ipfsfuse_run import record as records
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.record import RecordWriter
from tests.mounting import Home
from tests.runner import recorded
from tests.runner.conftest import DEMO, GUESTS, Done, Runner, lines

pytestmark = pytest.mark.fuse

SAME = [f"{what}: the same" for what in ("stdout", "stderr", "exit code", "read", "missing")]
READER = DEMO / "reader-p2.wat"


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Runner:
    """Another user, who has nothing but the CAR."""
    other = Home(tmp_path / "elsewhere")
    return Runner({**other.env, "XDG_CACHE_HOME": str(tmp_path / "elsewhere" / "xdg")})


@pytest.fixture
def cid(home: Home, tmp_path: Path) -> str:
    source = tmp_path / "source"
    (source / "dir").mkdir(parents=True)
    (source / "dir" / "file").write_text("content\n")
    (source / "other").write_text("not read\n")
    (source / "big").write_bytes(bytes(range(256)) * 12_000)
    return home.add(source)


def record(run: Runner, target: Path, *args: str | Path, stdin: bytes = b"") -> Done:
    done = run("--record", target, *args, stdin=stdin)
    assert done.returncode in (0, 7, 134), done
    return done


def inspected(run: Runner, target: Path) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(
        subprocess.run(
            [*run.command("inspect", target, "--json")],
            env=run.env,
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
        ).stdout
    )
    return shown


def test_a_recorded_run_is_repeated_elsewhere(
    run: Runner, elsewhere: Runner, cid: str, tmp_path: Path
) -> None:
    target = tmp_path / "run.car"
    done = record(run, target, READER, f"/ipfs/{cid}/dir/file")
    assert lines(done.stdout)[0] == "content"
    again = elsewhere("--replay", target)
    assert lines(again.stdout) == SAME
    assert again.returncode == 0


def test_what_was_read_by_path(run: Runner, cid: str, tmp_path: Path, habits: Path) -> None:
    target = tmp_path / "run.car"
    record(run, target, habits, "cat", f"/ipfs/{cid}/dir/file")
    rows = [
        (each["path"], each["type"], each["size"], each["read"]) for each in inspected(run, target)["paths"]
    ]
    assert rows == [
        (f"/ipfs/{cid}", "directory", 0, 0),
        (f"/ipfs/{cid}/dir", "directory", 0, 0),
        (f"/ipfs/{cid}/dir/file", "file", 8, 8),
    ]
    table = run("inspect", target).stdout.decode()
    assert f"/ipfs/{cid}/dir/file" in table
    assert "not read" not in table


def test_the_receipt_alone(run: Runner, cid: str, tmp_path: Path, habits: Path) -> None:
    target = tmp_path / "run.json"
    record(run, target, "--env", "A=1", "-W", "fuel=100000000", habits, "cat", f"/ipfs/{cid}/big")
    told = json.loads(target.read_text())
    assert told["argv"] == ["habits.wasm", "cat", f"/ipfs/{cid}/big"]
    assert (told["limits"], told["results"]["exit_code"]) == ({"fuel": 100000000}, 0)
    (variable,) = told["env"]["variables"]
    assert (variable["name"], "value" in variable) == ("A", False)
    assert told["read"][0] == cid
    # the folder, the file's root, its leaves: the first two are one block
    assert len(told["read"]) == 1 + 1 + 2
    assert (told["results"]["stdout"]["size"], told["stdin"]["size"]) == (256 * 12_000, 0)
    assert "clocks" in told["differs"]


def test_standard_input_arguments_environment_and_exit_code_are_recorded(
    run: Runner, elsewhere: Runner, tmp_path: Path, habits: Path
) -> None:
    for number, (args, stdin) in enumerate(
        [(["cat"], b"some input"), (["exit", "7"], b""), (["env"], b""), (["abort"], b"")]
    ):
        target = tmp_path / f"run{number}.car"
        done = record(
            run, target, "--record-env", "--env", "A=1", "--argv0", "me", habits, *args, stdin=stdin
        )
        assert done.stdout == {"cat": stdin, "env": b"A=1\n"}.get(args[0], b"")
        assert elsewhere("--replay", target).returncode == 0


def test_a_guest_from_standard_input_or_the_mount(
    run: Runner, elsewhere: Runner, home: Home, tmp_path: Path, habits: Path
) -> None:
    guest = home.add(habits)
    record(run, tmp_path / "a.car", "-", "args", stdin=habits.read_bytes())
    record(run, tmp_path / "b.car", f"/ipfs/{guest}", "args")
    for name in ("a.car", "b.car"):
        assert elsewhere("--replay", tmp_path / name).returncode == 0


@pytest.mark.parametrize("kind", ["p1", "p2"])
def test_chance_is_fixed_where_it_is_asked_for(
    run: Runner, elsewhere: Runner, tmp_path: Path, habits: Path, kind: str
) -> None:
    guest = [habits, "chance"] if kind == "p1" else [GUESTS / "chance-p2.wat"]
    first = record(run, tmp_path / "a.car", "--deterministic", *guest).stdout
    assert record(run, tmp_path / "b.car", "--deterministic", *guest).stdout == first
    assert elsewhere("--replay", tmp_path / "a.car").returncode == 0
    assert record(run, tmp_path / "c.car", *guest).stdout != first
    again = elsewhere("--replay", tmp_path / "c.car")
    assert again.returncode == 3
    assert b"stdout: DIFFERENT" in again.stdout
    assert b"clocks" in again.stdout


def test_a_replay_says_how_many_blocks_are_on_one_side_alone(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    """The guest asks for one block that nobody has. The receipt names two others, and one that it read."""
    blocks, guest = recorded.Blocks(), habits.read_bytes()
    asked, other, another = (recorded.Blocks().put(data).cid for data in (b"asked", b"other", b"another"))
    empty, read = blocks.folder([]), blocks.put(b"read")
    told = recorded.receipt_2(
        guest,
        empty.cid,
        argv=["habits.wasm", "cat", f"/ipfs/{cids.text(asked)}"],
        read=[cids.text(read.cid)],
        missing=[cids.text(other), cids.text(another)],
    )
    streams = {"stdin": recorded.STDIN, "stdout": recorded.STDIN, "stderr": b""}
    target = recorded.write(
        tmp_path / "run.car", told, blocks, guest=guest, out=empty, ipfs=empty, read=read, **streams
    )
    done = run("--replay", target)
    assert done.returncode == 3, done
    said = lines(done.stdout)
    assert "read: DIFFERENT, recorded 1 block, now 0 blocks (1 only recorded)" in said
    assert "missing: DIFFERENT, recorded 2 blocks, now 1 block (2 only recorded, 1 only now)" in said


def test_more_random_numbers_than_wasmtime_gives_are_a_trap(run: Runner, tmp_path: Path) -> None:
    guest = tmp_path / "greedy.wat"
    guest.write_text(
        """(module (import "wasi_snapshot_preview1" "random_get" (func $random (param i32 i32) (result i32)))
        (memory (export "memory") 3200) (func (export "_start") (drop (call $random (i32.const 0) (i32.const 104857600)))))"""
    )
    for options in ([], ["--deterministic"]):
        done = record(run, tmp_path / "run.json", *options, guest)
        assert (done.returncode, b"requested len 104857600 exceeds limit 67108864" in done.stderr) == (
            134,
            True,
        ), done


def test_a_given_folder_is_part_of_the_record_if_it_is_read_only(
    run: Runner, elsewhere: Runner, tmp_path: Path, habits: Path
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    (given / "file").write_text("from the host\n")
    refused = run("--record", tmp_path / "run.car", "--dir", f"{given}::/data", habits, "cat", "/data/file")
    assert (refused.returncode, len(lines(refused.stderr))) == (2, 1)
    assert b"--out DIR" in refused.stderr
    record(run, tmp_path / "run.car", "--dir", f"{given}::/data::ro", habits, "cat", "/data/file")
    (given / "file").unlink()
    assert elsewhere("--replay", tmp_path / "run.car").returncode == 0


def test_a_given_file_that_says_it_is_empty_is_recorded_as_it_reads(
    run: Runner, elsewhere: Runner, tmp_path: Path, habits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, target = Path("/proc/sys/kernel/random"), tmp_path / "run.car"
    assert (given / "boot_id").stat().st_size == 0
    done = record(run, target, "--dir", f"{given}::/data::ro", habits, "cat", "/data/boot_id")
    assert done.stdout == (given / "boot_id").read_bytes()
    assert elsewhere("--replay", target).returncode == 0
    monkeypatch.setattr(records, "MAX_UNSIZED", 10)
    with target.open("w+b") as out, pytest.raises(StoreFailed, match=r"random/.*' says that it is empty"):
        records.add_tree(RecordWriter(out), str(given), None)


def test_the_record_mounts_as_a_folder(run: Runner, elsewhere: Runner, cid: str, tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    done = record(run, target, READER, f"/ipfs/{cid}/dir/file")
    other = Home(tmp_path / "third")
    with other.mounted("--from", target, "--offline") as mount:
        (root,) = [path for path in mount.path.iterdir() if (path / "receipt.json").exists()]
        assert root.parent == mount.path
        assert json.loads((root / "receipt.json").read_text())["results"]["exit_code"] == done.returncode
        names = ["guest.wasm", "ipfs", "receipt.json", "stderr", "stdin", "stdout"]
        assert sorted(path.name for path in root.iterdir()) == names
        assert (root / "stdout").read_bytes() == done.stdout
        assert (root / "ipfs" / cid / "dir" / "file").read_text() == "content\n"


def test_a_record_that_was_changed_is_refused(run: Runner, cid: str, tmp_path: Path) -> None:
    target = tmp_path / "run.car"
    record(run, target, READER, f"/ipfs/{cid}/dir/file")
    whole = target.read_bytes()
    spoiled = {
        "flipped": whole.replace(b"content\n", b"Content\n"),
        "short": whole[:-10],
        "empty": b"",
        "no car": b"{}",
        "headless": whole[:30],
    }
    for what, data in spoiled.items():
        target.write_bytes(data)
        done = run("--replay", target)
        assert (done.returncode, done.stdout, len(lines(done.stderr))) == (125, b"", 1), (what, done)
        assert b"run.car" in done.stderr


@pytest.mark.parametrize("command", ["--replay", "inspect"])
def test_a_pipe_is_no_record(run: Runner, tmp_path: Path, command: str) -> None:
    pipe = tmp_path / "run.car"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that reading it would have to wait
    try:
        done = run(command, pipe)
    finally:
        os.close(writer)
    assert done.returncode == (125 if command == "--replay" else 1)
    assert lines(done.stderr) == [f"ipfsfuse-run: {pipe} is not a file"]


def with_receipt(target: Path, data: bytes, **files: bytes) -> None:
    """A record whose blocks are all right, and whose receipt is `data`."""
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        writer.close(
            writer.add_folder(
                [
                    (name, writer.add_file(io.BytesIO(held)))
                    for name, held in {"receipt.json": data, **files}.items()
                ]
            )
        )


def test_a_record_whose_parts_are_others_than_its_receipt_says_is_refused(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    told = recorded.receipt(habits.read_bytes(), b"input", argv=["habits.wasm", "cat"], env=[])
    guest, folder = habits.read_bytes(), [{"guest": "/data", "writable": False, "cid": told["guest"]["cid"]}]
    right = {"guest.wasm": guest, "stdin": b"input"}
    wrong = {
        "its guest": (told, {"guest.wasm": guest + b"\0", "stdin": b"input"}),
        "its standard input": (told, {"guest.wasm": guest, "stdin": b"Input"}),
        "its folder /data": (told | {"dirs": folder}, right),
    }
    for named, (receipt_, files) in wrong.items():
        with_receipt(tmp_path / "run.car", json.dumps(receipt_).encode(), **files)
        done = run("--replay", tmp_path / "run.car")
        assert (done.returncode, done.stdout, len(lines(done.stderr))) == (125, b"", 1), done
        assert named in done.stderr.decode()
    with_receipt(tmp_path / "run.car", json.dumps(told).encode(), **right)
    assert run("--replay", tmp_path / "run.car").returncode == 0


def test_limits_of_a_record_hold_again_and_others_can_be_given(
    run: Runner, elsewhere: Runner, tmp_path: Path, habits: Path
) -> None:
    target = tmp_path / "run.car"
    done = record(run, target, "-W", "max-stdout=4500", habits, "flood", "1000000")
    assert (done.returncode, len(done.stdout)) == (134, 4500)
    assert elsewhere("--replay", target).returncode == 0
    again = elsewhere("--replay", target, "-W", "max-stdout=4499")
    assert (again.returncode, lines(again.stdout)[1:3]) == (3, ["stderr: the same", "exit code: the same"])


RECEIPT_HEAD = b'{"kind": "ipfsfuse-run receipt", "format": '
BAD_RECEIPTS = {
    "not JSON": (b"receipt: yes", "not JSON"),
    "empty": (b"", "not JSON"),
    "cut short": (RECEIPT_HEAD + b'1, "argv": ["a', "cut short"),
    "not text": (b"\xff\xfe\x00", "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "of another kind": (b'{"kind": "shopping list"}', "not a receipt"),
    "no object": (b"[1, 2]", "not a receipt"),
    "of a newer format": (RECEIPT_HEAD + b"3}", "format 3"),
    "of no format": (b'{"kind": "ipfsfuse-run receipt"}', "format None"),
    "without its fields": (RECEIPT_HEAD + b"1}", "no usable field"),
    "with fields of a wrong kind": (RECEIPT_HEAD + b'1, "guest": 7}', "no usable field"),
    "with what is no CID": (
        json.dumps(recorded.receipt(b"") | {"guest": {"cid": "bafy?", "name": "x"}}).encode(),
        "not a CID",
    ),
}


@pytest.mark.parametrize("what", BAD_RECEIPTS)
@pytest.mark.parametrize("command", ["--replay", "inspect"])
def test_a_receipt_that_can_not_be_read_is_one_line(
    run: Runner, tmp_path: Path, what: str, command: str
) -> None:
    data, named = BAD_RECEIPTS[what]
    with_receipt(tmp_path / "run.car", data)
    done = run(command, tmp_path / "run.car")
    assert (done.returncode, done.stdout, len(lines(done.stderr))) == (
        125 if command == "--replay" else 1,
        b"",
        1,
    ), done
    assert named in done.stderr.decode()


def test_a_receipt_with_a_field_that_can_not_be_is_refused(run: Runner, tmp_path: Path, habits: Path) -> None:
    record(run, tmp_path / "run.json", "-W", "timeout=60s", habits, "args")
    whole = json.loads((tmp_path / "run.json").read_text())
    receipts.decode(json.dumps(whole).encode())
    limits: list[object] = [{"fuel": "much"}, {"fuel": -1}, {"time": 1}, []]
    wrong: dict[str, list[object]] = {
        "argv": [[], "cat"],
        "env": [[["A"]], {"salt": "", "variables": []}],
        "results": [{}, whole["results"] | {"exit_code": 256}, whole["results"] | {"limit": "luck"}],
        "paths": [[{}], 1],
        "root": ["", "/x", 1],
        "limits": limits,
        "read": [7],
        "stdin": [{"size": 1}],
    }
    for field, values in wrong.items():
        for value in values:
            with pytest.raises(ReceiptRefused):
                receipts.decode(json.dumps(whole | {field: value}).encode())


def test_a_record_is_for_its_owner_alone(run: Runner, tmp_path: Path, habits: Path) -> None:
    """It holds what was in variables and on standard input; and a name that was planted leads nowhere."""
    (tmp_path / "other").write_text("untouched")
    for form in ("json", "car"):
        target = tmp_path / f"run.{form}"
        target.symlink_to(tmp_path / "other")
        (tmp_path / f".run.{form}.part").symlink_to(tmp_path / "other")
        record(run, target, "--env", "TOKEN=secret", habits, "env")
        assert (target.is_symlink(), target.stat().st_mode & 0o777) == (False, 0o600)
    assert (tmp_path / "other").read_text() == "untouched"


def test_standard_input_of_a_record_can_be_bounded(run: Runner, tmp_path: Path, habits: Path) -> None:
    done = run("--record", tmp_path / "run.car", "-W", "max-stdin=10", habits, "cat", stdin=b"x" * 11)
    assert (done.returncode, len(lines(done.stderr))) == (125, 1)
    assert b"max-stdin=10" in done.stderr
    assert not list(tmp_path.glob("*run.car*"))
    assert (
        run("--record", tmp_path / "run.car", "-W", "max-stdin=10", habits, "cat", stdin=b"x" * 10).returncode
        == 0
    )
    assert run("-W", "max-stdin=10", habits, "cat").returncode == 2


def test_a_receipt_alone_is_no_record_to_replay(run: Runner, tmp_path: Path, habits: Path) -> None:
    record(run, tmp_path / "run.json", habits, "args")
    done = run("--replay", tmp_path / "run.json")
    assert (done.returncode, len(lines(done.stderr))) == (125, 1)


def test_a_run_that_could_not_begin_leaves_no_record(run: Runner, tmp_path: Path) -> None:
    done = run("--record", tmp_path / "run.car", "-", stdin=b"(module)")
    assert done.returncode == 125
    assert not list(tmp_path.glob("*run.car*"))


@pytest.mark.parametrize("name", ["run.txt", "run"])
def test_a_record_needs_a_name_that_says_its_form(run: Runner, name: str, tmp_path: Path) -> None:
    assert run("--record", tmp_path / name, "-", stdin=b"(module)").returncode == 2
