"""Recorded runs that were changed, or made to do harm: `inspect` and `--replay` end soon, use little, print
nothing that a terminal acts on, and never say "the same" for what is not.

IPFSFUSE_MUTATIONS is how many changed records are tried in one process (400 by default),
IPFSFUSE_COMMAND_MUTATIONS how many by the commands (3)."""

import json
import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from ipfsfuse.dag import cid as cids
from ipfsfuse.dag import dagpb, unixfs
from ipfsfuse.dag.builder import Built
from ipfsfuse.dag.nodes import Link
from ipfsfuse.dag.unixfs import Type, UnixFS
from ipfsfuse_run import inspecting, receipts
from ipfsfuse_run.errors import ReceiptRefused
from ipfsfuse_run.limits import NO_LIMITS
from ipfsfuse_run.record import open_record
from ipfsfuse_run.replaying import limits_for
from tests.mounting import Home, wait_until
from tests.runner import recorded
from tests.runner.conftest import Measured, Runner
from tests.runner.recorded import STDIN, Blocks, digest

MUTATIONS = int(os.environ.get("IPFSFUSE_MUTATIONS", "400"))
COMMAND_MUTATIONS = int(os.environ.get("IPFSFUSE_COMMAND_MUTATIONS", "3"))
SECONDS, BYTES = 5.0, 300 << 20

GUEST = bytes(wasmtime.wat2wasm(recorded.GUEST))
WHOLE = recorded.receipt(GUEST)


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    (tmp_path / "tmp").mkdir()
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "TMPDIR": str(tmp_path / "tmp")})


class Ended(Measured):
    """How a command ended, and what it cost."""

    def __init__(self, run: Runner, *args: str | Path) -> None:
        super().__init__(run.command(*args), run.env)

    def check(self) -> "Ended":
        """What holds for any record."""
        assert "Traceback" not in self.err
        assert "fault of the runner" not in self.err
        assert not any(ord(each) < 32 and each != "\n" for each in self.out + self.err), self.err
        assert self.seconds < SECONDS
        assert self.memory < BYTES
        return self

    def refused(self, *names: str) -> str:
        self.check()
        assert (self.out, self.err.count("\n")) == ("", 1), (self.out, self.err)
        assert self.code in (1, 125)
        assert all(name in self.err for name in names), self.err
        return self.err


# -- many changes, in one process ----------------------------------------------------------------------------

NASTY: list[Any] = [
    *(
        float("inf"),
        float("nan"),
        -1,
        0.7,
        1e300,
        1 << 31,
        1 << 50,
        1 << 63,
        1 << 64,
        10**400,
        True,
        False,
        None,
    ),
    *(
        "",
        "x",
        "\x1b[2J",
        "a\nstdout: the same",
        "\ud800",
        "\0",
        "../..",
        "/ipfs",
        "x" * 100_000,
        "bafy?",
        "1e400",
    ),
    *([], {}, [[]], [{}] * 1000, {"size": 1 << 50}, ["a"] * 100_000),
]


def changed(rng: random.Random, whole: dict[str, Any]) -> bytes:
    """A receipt of which something was changed."""
    told = json.loads(json.dumps(whole))
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _change(rng, told)
    data = json.dumps(told).encode()
    if rng.random() < 0.4:
        data = damaged(rng, data)
    return data


def _change(rng: random.Random, told: dict[str, Any]) -> None:
    place: Any = told
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    how = rng.random()
    if how < 0.1:
        del place[key]
    elif how < 0.2 and isinstance(place, dict):
        place[rng.choice(("cpu", "name", "size", "\x1b]0;x\a"))] = rng.choice(NASTY)
    else:
        place[key] = rng.choice(NASTY)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, doubled, or left out."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(whole) + 1), rng.choice((1, 1, 4, 40, 400))
        how = rng.randrange(4)
        if how == 0:
            whole[at : at + length] = b""
        elif how == 1:
            whole[at:at] = whole[at : at + length]
        elif how == 2:
            whole[at : at + 1] = rng.randbytes(1)
        else:
            del whole[max(at, 1) :]
    return bytes(whole)


def looked_at(path: Path) -> receipts.Receipt:
    """What `inspect` and `--replay` do before a guest runs."""
    with open_record(path) as (record, told):
        limits_for(path, told, NO_LIMITS)
        inspecting.checked_rows(record, told)
        return told


def accepted(path: Path) -> receipts.Receipt | None:
    """None for a record that is refused, for which any sentence will do."""
    try:
        return looked_at(path)
    except ReceiptRefused as exc:
        assert len(str(exc)) < 3000
        return None


def test_many_changed_records_in_one_process(tmp_path: Path) -> None:
    blocks, target = Blocks(), tmp_path / "run.car"
    tree, empty = _tree(blocks), blocks.folder([])
    second = recorded.receipt_2(GUEST, tree.cid)
    parts = {"guest": GUEST, "stdin": STDIN, "stdout": STDIN, "stderr": b"", "out": tree, "ipfs": empty}
    taken, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for seed in range(MUTATIONS):
        rng, begun = random.Random(seed), time.process_time()
        if seed % 4 == 1:
            accepted(recorded.write(target, changed(rng, WHOLE), blocks, guest=GUEST, stdin=STDIN, ipfs=tree))
        elif seed % 4:
            data = changed(rng, second)
            told = accepted(recorded.write(target, data, blocks, **parts))
            if told is not None:  # then nothing in it was taken for something else
                taken += 1
                again = json.loads(receipts.encode(told))
                assert _exact(again) == _exact(json.loads(data) | {"differs": again["differs"]}), (
                    f"seed {seed}"
                )
        else:
            recorded.write(target, second, blocks, **parts)
            target.write_bytes(damaged(rng, target.read_bytes()))
            accepted(target)
        assert time.process_time() - begun < SECONDS, f"seed {seed}"
    assert taken
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < BYTES


def _exact(value: Any) -> Any:
    """A value that differs from others which Python takes for equal: 1, 1.0 and True."""
    if isinstance(value, dict):
        return {name: _exact(each) for name, each in value.items() if value is not None}
    if isinstance(value, list):
        return [_exact(each) for each in value]
    return (
        (type(value).__name__, value)
        if not isinstance(value, int | float) or isinstance(value, bool)
        else ("number", value)
    )


def _tree(blocks: Blocks) -> Built:
    return blocks.folder([(b"a", blocks.folder([(b"file", blocks.put(b"content").cid)]).cid)])


# -- some, by the command ------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_a_record_that_is_right_is_the_same(run: Runner, tmp_path: Path) -> None:
    target = recorded.write(tmp_path / "run.car", WHOLE, guest=GUEST, stdin=STDIN)
    ended = Ended(run, "--replay", target).check()
    assert (ended.code, ended.err) == (0, "")


@pytest.mark.fuse
def test_changed_records_by_the_commands(run: Runner, tmp_path: Path) -> None:
    """What is replayed as the same is what was recorded, but for words that a replay only shows."""
    blocks, target = Blocks(), tmp_path / "run.car"
    empty = blocks.folder([])
    second = recorded.receipt_2(GUEST, empty.cid)
    parts = {"guest": GUEST, "stdin": STDIN, "stdout": STDIN, "stderr": b"", "out": empty, "ipfs": empty}
    for seed in range(COMMAND_MUTATIONS):
        rng = random.Random(seed)
        data = changed(rng, second)
        recorded.write(target, data, blocks, **parts)
        if seed % 4 == 3:
            data = json.dumps(second).encode()
            recorded.write(target, data, blocks, **parts)
            target.write_bytes(damaged(rng, target.read_bytes()))
        for word in ("inspect", "--replay"):
            ended = Ended(run, word, target).check()
            assert ended.code in ((0, 1) if word == "inspect" else (0, 3, 125)), (seed, word, ended.err)
            if word == "--replay" and ended.code == 0:
                results = json.loads(data)["results"]
                assert _exact(results) == _exact(second["results"]), seed


OTHER: dict[str, dict[str, Any]] = {
    "stdout's size": {"stdout": digest(STDIN) | {"size": 12}},
    "stdout": {"stdout": digest(b"other")},
    "stderr's size": {"stderr": digest(b"") | {"size": 1}},
    "exit code": {"exit_code": 1},
    "trapped": {"exit_code": 134, "trapped": True},
}


@pytest.mark.fuse
@pytest.mark.parametrize("what", OTHER)
def test_a_receipt_that_tells_of_another_end_is_different(run: Runner, tmp_path: Path, what: str) -> None:
    target = recorded.write(tmp_path / "run.car", WHOLE | OTHER[what], guest=GUEST, stdin=STDIN)
    ended = Ended(run, "--replay", target).check()
    assert (ended.code, ended.out.count("DIFFERENT")) == (3, 1), ended.out


def text(**changed: Any) -> bytes:
    return json.dumps(WHOLE | changed).encode()


UNFIT: dict[str, tuple[bytes, str]] = {
    "an exit code of 0.7": (text(exit_code=0.7), "exit_code"),
    "an exit code of false": (text(exit_code=False), "exit_code"),
    "an exit code of 256": (text(exit_code=256), "exit_code"),
    "an infinite exit code": (text(exit_code=float("inf")), "Infinity"),
    "an infinite size": (text(stdout=digest(STDIN) | {"size": float("inf")}), "Infinity"),
    "a size that JSON reads as infinite": (
        text().replace(b'"seconds": 0.25', b'"seconds": 1e999'),
        "seconds",
    ),
    "a key twice": (text().replace(b'"exit_code": 0', b'"exit_code": 1, "exit_code": 0'), "twice"),
    "a timeout of 1e300": (text(limits={"timeout": 1e300}), "timeout"),
    "a timeout that no float can hold": (text(limits={"timeout": 10**400}), "timeout"),
    "no time": (text(limits={"timeout": 0}), "timeout"),
    "a limit that is a flag": (text(limits={"fuel": True}), "fuel"),
    "a limit beyond 64 bits": (text(limits={"max_table_elements": 1 << 63}), "max-table-elements"),
    "too few open files": (text(limits={"max_open_files": 3}), "max-open-files"),
    "a stack of 2 GiB": (text(limits={"max_wasm_stack": 2 << 30}), "max-wasm-stack"),
    "no such limit": (text(limits={"max_\x1b[1m": 1}), "is not a limit"),
    "arguments of 15 MB": (text(argv=["guest.wat", *map(str, range(2_000_000))]), "argv, env"),
    "an argument of 3 MB": (text(argv=["guest.wat", "x" * 3_000_000]), "argv"),
    "empty lists by the million": (text(ahead=[[number] for number in range(2_000_000)]), "larger than any"),
    "a relative working folder": (text(cwd="ipfs"), "cwd"),
    "a zero byte": (text(argv=["guest.wat", "a\0b"]), "argv"),
    "a trap that ended well": (text(trapped=True), "exit_code"),
    "a number of many digits": (text().replace(b'"fuel": 1000000', b'"fuel": ' + b"9" * 100_000), "not JSON"),
    "UTF-16": (text().decode().encode("utf-16"), "not JSON"),
}


BY_COMMAND = (
    "a timeout that no float can hold",
    "an exit code of 0.7",
    "an infinite exit code",
    "a key twice",
    "a timeout of 1e300",
    "no such limit",
    "arguments of 15 MB",
)


@pytest.mark.parametrize("what", UNFIT)
def test_a_receipt_that_no_run_can_have_is_refused(run: Runner, tmp_path: Path, what: str) -> None:
    data, named = UNFIT[what]
    target = recorded.write(tmp_path / "run.car", data, guest=GUEST, stdin=STDIN)
    with pytest.raises(ReceiptRefused, match=named):
        looked_at(target)
    if what in BY_COMMAND:
        Ended(run, "--replay", target, "-W", "timeout=1s").refused(named)


@pytest.mark.fuse
def test_a_working_folder_with_escape_codes_forges_no_line(run: Runner, tmp_path: Path) -> None:
    target = recorded.write(
        tmp_path / "run.car", WHOLE | {"cwd": "/ipfs/\x1b[2K\nstdout: the same"}, guest=GUEST, stdin=STDIN
    )
    said = Ended(run, "--replay", target).refused("\\x1b[2K\\nstdout")
    assert "\nstdout" not in said


def bomb_of_stdin(blocks: Blocks) -> dict[str, Any]:
    """2^50 bytes in 30 blocks."""
    held = blocks.doubled(bytes(1 << 20), 30)
    return {"told": WHOLE | {"stdin": {"sha256": "0" * 64, "size": held.size}}, "stdin": held}


def bomb_of_a_guest(blocks: Blocks) -> dict[str, Any]:
    held = blocks.doubled(GUEST + b"\0" * (1 << 20), 30)
    return {"told": WHOLE | {"guest": {"cid": cids.text(held.cid), "name": "bomb"}}, "guest": held}


def bomb_of_a_receipt(blocks: Blocks) -> dict[str, Any]:
    return {"told": blocks.doubled(b" " * (1 << 20), 12)}


def stdin_of_single_bytes(blocks: Blocks) -> dict[str, Any]:
    """64 MiB of which each byte is a leaf."""
    one = blocks.put(b"x")
    row = blocks.file([(one.cid, 1)] * 8192)
    held = blocks.file([(row.cid, 8192)] * 8192)
    return {"told": WHOLE | {"stdin": digest(b"x" * (64 << 20))}, "stdin": held}


def stdin_of_a_long_chain(blocks: Blocks) -> dict[str, Any]:
    """A chain of nodes that is as long as it can be."""
    held = blocks.put(b"x")
    for _ in range(20_000):
        held = blocks.file([(held.cid, 1)])
    return {"told": WHOLE | {"stdin": digest(b"x")}, "stdin": held}


def a_stdin_that_is_another(_blocks: Blocks) -> dict[str, Any]:
    return {"told": WHOLE, "stdin": b"some Input\n"}


def a_stdin_that_is_longer(_blocks: Blocks) -> dict[str, Any]:
    return {"told": WHOLE, "stdin": STDIN + b"\n"}


MADE: dict[Callable[[Blocks], dict[str, Any]], str] = {
    bomb_of_stdin: "standard input",
    bomb_of_a_guest: "bytes",
    bomb_of_a_receipt: "bytes",
    stdin_of_single_bytes: "pieces",
    stdin_of_a_long_chain: "pieces",
    a_stdin_that_is_another: "standard input",
    a_stdin_that_is_longer: "standard input",
}


@pytest.mark.parametrize("make", MADE, ids=lambda make: make.__name__)
def test_a_record_that_claims_more_than_it_holds_is_refused(
    run: Runner, tmp_path: Path, make: Callable[[Blocks], dict[str, Any]]
) -> None:
    blocks = Blocks()
    made = make(blocks)
    target = recorded.write(
        tmp_path / "run.car", made.pop("told"), blocks, **{"guest": GUEST, "stdin": STDIN} | made
    )
    assert target.stat().st_size < 5 << 20
    if make is bomb_of_stdin:
        Ended(run, "inspect", target).refused("bytes")
        Ended(run, "--replay", target, "-W", "timeout=1s").refused("-W max-stdin=1024TiB")
    else:
        Ended(run, "--replay", target, "-W", "timeout=1s").refused(MADE[make])


def paths_without_end(blocks: Blocks) -> Built:
    held = blocks.folder([(b"file", blocks.put(b"x").cid)])
    for _ in range(30):
        held = blocks.folder([(b"a", held.cid), (b"b", held.cid)])
    return held


def names_without_end(blocks: Blocks) -> Built:
    """Paths of a megabyte."""
    held = blocks.folder([(b"file", blocks.put(b"x").cid)])
    for _ in range(4000):
        held = blocks.folder([(b"n" * 250, held.cid)])
    return held


def one_block_under_many_names(blocks: Blocks) -> Built:
    held = blocks.put(bytes(1 << 20))
    return blocks.folder([(b"%05d" % number, held.cid) for number in range(30_000)])


def shards_without_end(blocks: Blocks) -> Built:
    """A sharded folder whose every slot leads to the next node, eight levels deep."""
    held = blocks.put(b"x")
    for _ in range(8):
        links = [Link(held.cid, b"%02X" % slot, 1) for slot in range(256)]
        message = UnixFS(type=Type.HAMT_SHARD, data=b"\xff" * 32, hash_type=0x22, fanout=256)
        held = blocks.put(dagpb.encode(links, unixfs.encode(message)), cids.DAG_PB)
    return held


TREES = (paths_without_end, names_without_end, one_block_under_many_names, shards_without_end)


@pytest.mark.parametrize("make", TREES, ids=lambda make: make.__name__)
def test_inspect_of_a_tree_with_paths_without_end(
    run: Runner, tmp_path: Path, make: Callable[[Blocks], Built]
) -> None:
    blocks = Blocks()
    root = make(blocks)
    told = WHOLE | {"read": [cids.text(cid) for cid in blocks.all]}
    top = blocks.folder([(cids.text(root.cid).encode(), root.cid)])
    target = recorded.write(tmp_path / "run.car", told, blocks, guest=GUEST, stdin=STDIN, ipfs=top)
    ended = Ended(run, "inspect", target).check()
    if make is shards_without_end:
        assert "made as none can be" in ended.err
    else:
        assert "the rest is left out" in ended.err
        assert ended.out.count("\n") > 30


# -- what a replay may use -----------------------------------------------------------------------------------

NEEDY: dict[str, tuple[dict[str, Any], str]] = {
    "memory": ({"limits": {"max_memory_size": 2 << 30}}, "-W max-memory-size=2GiB"),
    "time": ({"seconds": 700.5}, "-W timeout=701s"),
    "a timeout": ({"limits": {"timeout": 3600}}, "-W timeout=3600s"),
    "stack": ({"limits": {"max_wasm_stack": 16 << 20}}, "-W max-wasm-stack=16MiB"),
    "output": ({"stdout": digest(b"") | {"size": 65 << 20}}, "-W max-stdout=65MiB"),
    "errors": ({"stderr": digest(b"") | {"size": 65 << 20}}, "-W max-stdout=65MiB"),
    "input": ({"stdin": digest(b"") | {"size": 65 << 20}}, "-W max-stdin=65MiB"),
}


@pytest.mark.parametrize("what", NEEDY)
def test_a_recording_that_needs_more_names_the_option(run: Runner, tmp_path: Path, what: str) -> None:
    told, option = NEEDY[what]
    target = recorded.write(tmp_path / "run.car", WHOLE | told, guest=GUEST, stdin=STDIN)
    ended = Ended(run, "--replay", target)
    ended.refused(option)
    assert ended.code == 125


FLOOD = bytes(
    wasmtime.wat2wasm(
        """(module (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 2)
        (func (export "_start") (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (i32.const 100000))
          (loop (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 16))) (br 0))))"""
    )
)
"""Writes without end."""


@pytest.mark.fuse
def test_a_replay_has_limits_that_the_recording_did_not_have(run: Runner, tmp_path: Path) -> None:
    target = recorded.write(
        tmp_path / "run.car", recorded.receipt(FLOOD, limits={}), guest=FLOOD, stdin=STDIN
    )
    done = run("--replay", target, "-W", "max-stdout=1MiB")
    assert done.returncode == 3  # what was asked for here is not what the recording lacks
    done = run("--replay", target)
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"-W max-stdout" in done.stderr.splitlines()[-1]


GROW = b"""(module (memory 1) %s (func (export "_start")
  (if (i32.eq (memory.grow (i32.const 15000)) (i32.const -1)) (then unreachable)) %s))"""


@pytest.mark.fuse
@pytest.mark.parametrize("many", [False, True])
def test_memory_of_a_replay(run: Runner, tmp_path: Path, many: bool) -> None:
    grow = b"(if (i32.eq (memory.grow %d (i32.const 15000)) (i32.const -1)) (then unreachable))"
    more = b"(memory 1)" * 3, b" ".join(grow % number for number in (1, 2, 3))
    guest = bytes(wasmtime.wat2wasm(GROW % more if many else GROW % (b"", b"")))
    told = recorded.receipt(guest, b"", limits={}, stdout=digest(b""))
    target = recorded.write(tmp_path / "run.car", told, guest=guest, stdin=b"")
    done = run("--replay", target)
    assert done.returncode == (3 if many else 0), done
    if many:
        assert b"limits of this replay alone: timeout=600s, max-memory-size=1GiB" in done.stdout
        assert run("--replay", target, "-W", "max-memory-size=4GiB").returncode == 0


@pytest.mark.fuse
def test_a_hostile_replay_leaves_nothing(run: Runner, tmp_path: Path) -> None:
    blocks = Blocks()
    made = bomb_of_a_guest(blocks)
    target = recorded.write(tmp_path / "run.car", made["told"], blocks, guest=made["guest"], stdin=STDIN)
    Ended(run, "--replay", target).refused()
    wait_until(lambda: not list((tmp_path / "tmp").iterdir()), "nothing is left")
