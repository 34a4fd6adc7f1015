"""Receipts: runs are recorded, inspected, and repeated offline from the CAR alone. Bad records are
refused."""

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

SAME = [f"{part}: the same" for part in ("stdout", "stderr", "exit code", "read", "missing")]
READER = DEMO / "reader-p2.wat"


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg")})


@pytest.fixture
def elsewhere(tmp_path: Path) -> Runner:
    """A runner of another user, who has only the CAR."""
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


def test_a_record_lists_what_was_read_by_path(run: Runner, cid: str, tmp_path: Path, habits: Path) -> None:
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


def test_a_receipt_can_be_written_without_its_record(
    run: Runner, cid: str, tmp_path: Path, habits: Path
) -> None:
    target = tmp_path / "run.json"
    record(run, target, "--env", "A=1", "-W", "fuel=100000000", habits, "cat", f"/ipfs/{cid}/big")
    receipt = json.loads(target.read_text())
    assert receipt["argv"] == ["habits.wasm", "cat", f"/ipfs/{cid}/big"]
    assert (receipt["limits"], receipt["results"]["exit_code"]) == ({"fuel": 100000000}, 0)
    (variable,) = receipt["env"]["variables"]
    assert (variable["name"], "value" in variable) == ("A", False)
    assert receipt["read"][0] == cid
    # the folder, the file's root, and its three leaves, of which the first two are the same block
    assert len(receipt["read"]) == 1 + 1 + 2
    assert (receipt["results"]["stdout"]["size"], receipt["stdin"]["size"]) == (256 * 12_000, 0)
    assert "clocks" in receipt["differs"]


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


def test_a_guest_from_standard_input_or_the_mount_is_recorded(
    run: Runner, elsewhere: Runner, home: Home, tmp_path: Path, habits: Path
) -> None:
    guest = home.add(habits)
    record(run, tmp_path / "a.car", "-", "args", stdin=habits.read_bytes())
    record(run, tmp_path / "b.car", f"/ipfs/{guest}", "args")
    for name in ("a.car", "b.car"):
        assert elsewhere("--replay", tmp_path / name).returncode == 0


@pytest.mark.parametrize("kind", ["p1", "p2"])
def test_clocks_and_random_numbers_are_fixed_only_with_deterministic(
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


def test_a_replay_counts_the_blocks_that_only_one_of_the_runs_asked_for(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    """The guest asks for a block that no source has. The receipt lists two others as missing, and one as
    read."""
    blocks, guest = recorded.Blocks(), habits.read_bytes()
    asked, other, another = (recorded.Blocks().put(data).cid for data in (b"asked", b"other", b"another"))
    empty, read = blocks.folder([]), blocks.put(b"read")
    receipt = recorded.receipt_2(
        guest,
        empty.cid,
        argv=["habits.wasm", "cat", f"/ipfs/{cids.text(asked)}"],
        read=[cids.text(read.cid)],
        missing=[cids.text(other), cids.text(another)],
    )
    streams = {"stdin": recorded.STDIN, "stdout": recorded.STDIN, "stderr": b""}
    target = recorded.write(
        tmp_path / "run.car", receipt, blocks, guest=guest, out=empty, ipfs=empty, read=read, **streams
    )
    done = run("--replay", target)
    assert done.returncode == 3, done
    output = lines(done.stdout)
    assert "read: DIFFERENT, recorded 1 block, now 0 blocks (1 only recorded)" in output
    assert "missing: DIFFERENT, recorded 2 blocks, now 1 block (2 only recorded, 1 only now)" in output


def test_a_guest_that_asks_for_too_many_random_bytes_traps(run: Runner, tmp_path: Path) -> None:
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


def test_a_given_file_with_a_false_size_of_0_is_recorded_with_its_content(
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


def test_a_record_mounts_as_a_folder(run: Runner, elsewhere: Runner, cid: str, tmp_path: Path) -> None:
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
    damaged = {
        "flipped": whole.replace(b"content\n", b"Content\n"),
        "short": whole[:-10],
        "empty": b"",
        "not a CAR": b"{}",
        "cut in the header": whole[:30],
    }
    for damage, data in damaged.items():
        target.write_bytes(data)
        done = run("--replay", target)
        assert (done.returncode, done.stdout, len(lines(done.stderr))) == (125, b"", 1), (damage, done)
        assert b"run.car" in done.stderr


@pytest.mark.parametrize("command", ["--replay", "inspect"])
def test_a_pipe_is_refused_as_a_record(run: Runner, tmp_path: Path, command: str) -> None:
    pipe = tmp_path / "run.car"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that reading the pipe would block
    try:
        done = run(command, pipe)
    finally:
        os.close(writer)
    assert done.returncode == (125 if command == "--replay" else 1)
    assert lines(done.stderr) == [f"ipfsfuse-run: {pipe} is not a file"]


def with_receipt(target: Path, data: bytes, **files: bytes) -> None:
    """Writes a record whose blocks are all right, with the receipt `data`."""
    with target.open("w+b") as out:
        writer = RecordWriter(out)
        writer.close(
            writer.add_folder(
                [
                    (name, writer.add_file(io.BytesIO(content)))
                    for name, content in {"receipt.json": data, **files}.items()
                ]
            )
        )


def test_a_record_whose_parts_do_not_match_its_receipt_is_refused(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    receipt = recorded.receipt(habits.read_bytes(), b"input", argv=["habits.wasm", "cat"], env=[])
    guest = habits.read_bytes()
    folder = [{"guest": "/data", "writable": False, "cid": receipt["guest"]["cid"]}]
    right = {"guest.wasm": guest, "stdin": b"input"}
    wrong = {
        "its guest": (receipt, {"guest.wasm": guest + b"\0", "stdin": b"input"}),
        "its standard input": (receipt, {"guest.wasm": guest, "stdin": b"Input"}),
        "its folder /data": (receipt | {"dirs": folder}, right),
    }
    for part, (changed, files) in wrong.items():
        with_receipt(tmp_path / "run.car", json.dumps(changed).encode(), **files)
        done = run("--replay", tmp_path / "run.car")
        assert (done.returncode, done.stdout, len(lines(done.stderr))) == (125, b"", 1), done
        assert part in done.stderr.decode()
    with_receipt(tmp_path / "run.car", json.dumps(receipt).encode(), **right)
    assert run("--replay", tmp_path / "run.car").returncode == 0


def test_a_replay_has_the_limits_of_the_record_unless_others_are_given(
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
    "nested too deeply": (b"[" * 100_000, "not JSON"),
    "of another kind": (b'{"kind": "shopping list"}', "not a receipt"),
    "not an object": (b"[1, 2]", "not a receipt"),
    "of a newer format": (RECEIPT_HEAD + b"3}", "format 3"),
    "without a format": (b'{"kind": "ipfsfuse-run receipt"}', "format None"),
    "without its fields": (RECEIPT_HEAD + b"1}", "no usable field"),
    "with fields of a wrong kind": (RECEIPT_HEAD + b'1, "guest": 7}', "no usable field"),
    "with an invalid CID": (
        json.dumps(recorded.receipt(b"") | {"guest": {"cid": "bafy?", "name": "x"}}).encode(),
        "not a CID",
    ),
}


@pytest.mark.parametrize("fault", BAD_RECEIPTS)
@pytest.mark.parametrize("command", ["--replay", "inspect"])
def test_a_receipt_that_can_not_be_read_is_refused_in_one_line(
    run: Runner, tmp_path: Path, fault: str, command: str
) -> None:
    data, named = BAD_RECEIPTS[fault]
    with_receipt(tmp_path / "run.car", data)
    done = run(command, tmp_path / "run.car")
    assert (done.returncode, done.stdout, len(lines(done.stderr))) == (
        125 if command == "--replay" else 1,
        b"",
        1,
    ), done
    assert named in done.stderr.decode()


def test_a_receipt_with_an_impossible_field_is_refused(run: Runner, tmp_path: Path, habits: Path) -> None:
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


def test_only_its_owner_can_read_a_record(run: Runner, tmp_path: Path, habits: Path) -> None:
    """It can hold variables and standard input. A symlink that has its name already is not followed."""
    (tmp_path / "other").write_text("untouched")
    for form in ("json", "car"):
        target = tmp_path / f"run.{form}"
        target.symlink_to(tmp_path / "other")
        (tmp_path / f".run.{form}.part").symlink_to(tmp_path / "other")
        record(run, target, "--env", "TOKEN=secret", habits, "env")
        assert (target.is_symlink(), target.stat().st_mode & 0o777) == (False, 0o600)
    assert (tmp_path / "other").read_text() == "untouched"


def test_the_standard_input_in_a_record_can_be_bounded(run: Runner, tmp_path: Path, habits: Path) -> None:
    done = run("--record", tmp_path / "run.car", "-W", "max-stdin=10", habits, "cat", stdin=b"x" * 11)
    assert (done.returncode, len(lines(done.stderr))) == (125, 1)
    assert b"max-stdin=10" in done.stderr
    assert not list(tmp_path.glob("*run.car*"))
    assert (
        run("--record", tmp_path / "run.car", "-W", "max-stdin=10", habits, "cat", stdin=b"x" * 10).returncode
        == 0
    )
    assert run("-W", "max-stdin=10", habits, "cat").returncode == 2


def test_a_receipt_alone_can_not_be_replayed(run: Runner, tmp_path: Path, habits: Path) -> None:
    record(run, tmp_path / "run.json", habits, "args")
    done = run("--replay", tmp_path / "run.json")
    assert (done.returncode, len(lines(done.stderr))) == (125, 1)


def test_a_run_that_could_not_begin_leaves_no_record(run: Runner, tmp_path: Path) -> None:
    done = run("--record", tmp_path / "run.car", "-", stdin=b"(module)")
    assert done.returncode == 125
    assert not list(tmp_path.glob("*run.car*"))


@pytest.mark.parametrize("name", ["run.txt", "run"])
def test_a_record_needs_a_known_file_extension(run: Runner, name: str, tmp_path: Path) -> None:
    assert run("--record", tmp_path / name, "-", stdin=b"(module)").returncode == 2
