"""Records that were changed, or are hostile: `inspect` and `--replay` end soon, use little memory, print
nothing that controls a terminal, and never say "the same" of different results.

IPFSFUSE_MUTATIONS is the number of changed records that are tried in one process (400 by default).
IPFSFUSE_COMMAND_MUTATIONS is the number that are tried by the commands (3 by default)."""

import copy
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
MAX_SECONDS, MAX_MEMORY = 5.0, 300 << 20

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
        """Asserts what must hold for every record."""
        assert "Traceback" not in self.err
        assert "fault of the runner" not in self.err
        assert not any(ord(each) < 32 and each != "\n" for each in self.out + self.err), self.err
        assert self.seconds < MAX_SECONDS
        assert self.memory < MAX_MEMORY
        return self

    def refused(self, *names: str) -> str:
        self.check()
        assert (self.out, self.err.count("\n")) == ("", 1), (self.out, self.err)
        assert self.code in (1, 125)
        assert all(name in self.err for name in names), self.err
        return self.err


# -- many changed records, in one process --------------------------------------------------------------------

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


def nasty(rng: random.Random) -> Any:
    """One of NASTY. It is a copy, because later changes may be made in it."""
    return copy.deepcopy(rng.choice(NASTY))


def changed(rng: random.Random, whole: dict[str, Any]) -> bytes:
    """A receipt with random changes."""
    receipt = json.loads(json.dumps(whole))
    if rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            _change(rng, receipt)
    data = json.dumps(receipt).encode()
    if rng.random() < 0.4:
        data = damaged(rng, data)
    return data


def _change(rng: random.Random, receipt: dict[str, Any]) -> None:
    place: Any = receipt
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
            break
        place = place[key]
    choice = rng.random()
    if choice < 0.1:
        del place[key]
    elif choice < 0.2 and isinstance(place, dict):
        place[rng.choice(("cpu", "name", "size", "\x1b]0;x\a"))] = nasty(rng)
    else:
        place[key] = nasty(rng)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, doubled, or left out."""
    whole = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(whole) + 1), rng.choice((1, 1, 4, 40, 400))
        choice = rng.randrange(4)
        if choice == 0:
            whole[at : at + length] = b""
        elif choice == 1:
            whole[at:at] = whole[at : at + length]
        elif choice == 2:
            whole[at : at + 1] = rng.randbytes(1)
        else:
            del whole[max(at, 1) :]
    return bytes(whole)


def check_record(path: Path) -> receipts.Receipt:
    """Checks a record as `inspect` and `--replay` do before a guest runs. Returns its receipt."""
    with open_record(path) as (record, receipt):
        limits_for(path, receipt, NO_LIMITS)
        inspecting.checked_rows(record, receipt)
        return receipt


def receipt_if_accepted(path: Path) -> receipts.Receipt | None:
    """The receipt, or None if the record is refused. Any short message will do."""
    try:
        return check_record(path)
    except ReceiptRefused as exc:
        assert len(str(exc)) < 3000
        return None


def test_many_changed_records_in_one_process(tmp_path: Path) -> None:
    blocks, target = Blocks(), tmp_path / "run.car"
    tree, empty = _tree(blocks), blocks.folder([])
    second = recorded.receipt_2(GUEST, tree.cid)
    parts = {"guest": GUEST, "stdin": STDIN, "stdout": STDIN, "stderr": b"", "out": tree, "ipfs": empty}
    accepted, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    for seed in range(MUTATIONS):
        rng, begun = random.Random(seed), time.process_time()
        if seed % 4 == 1:
            receipt_if_accepted(
                recorded.write(target, changed(rng, WHOLE), blocks, guest=GUEST, stdin=STDIN, ipfs=tree)
            )
        elif seed % 4:
            data = changed(rng, second)
            receipt = receipt_if_accepted(recorded.write(target, data, blocks, **parts))
            if receipt is not None:  # then no value in it was read as another one
                accepted += 1
                again = json.loads(receipts.encode(receipt))
                assert _exact(again) == _exact(json.loads(data) | {"differs": again["differs"]}), (
                    f"seed {seed}"
                )
        else:
            recorded.write(target, second, blocks, **parts)
            target.write_bytes(damaged(rng, target.read_bytes()))
            receipt_if_accepted(target)
        assert time.process_time() - begun < MAX_SECONDS, f"seed {seed}"
    assert accepted
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MAX_MEMORY


def _exact(value: Any) -> Any:
    """A value for comparisons: 1 and 1.0 are equal in it, but 1 and True are not. Fields without a value are
    left out."""
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


# -- a few changed records, by the commands ------------------------------------------------------------------


@pytest.mark.fuse
def test_an_unchanged_record_gives_the_same_results(run: Runner, tmp_path: Path) -> None:
    target = recorded.write(tmp_path / "run.car", WHOLE, guest=GUEST, stdin=STDIN)
    ended = Ended(run, "--replay", target).check()
    assert (ended.code, ended.err) == (0, "")


def receipt_in(path: Path) -> dict[str, Any]:
    """The receipt that a record holds, as JSON."""
    with open_record(path) as (record, _receipt):
        cid = record.find(receipts.RECEIPT)
        assert cid is not None
        found: dict[str, Any] = json.loads(record.receipt(cid))
        return found


@pytest.mark.fuse
def test_changed_records_by_the_commands(run: Runner, tmp_path: Path) -> None:
    """If a replay finds all the same, the results in the receipt are the recorded ones. A replay only shows
    the other fields."""
    blocks, target = Blocks(), tmp_path / "run.car"
    empty = blocks.folder([])
    second = recorded.receipt_2(GUEST, empty.cid)
    parts = {"guest": GUEST, "stdin": STDIN, "stdout": STDIN, "stderr": b"", "out": empty, "ipfs": empty}
    for seed in range(COMMAND_MUTATIONS):
        rng = random.Random(seed)
        if seed % 3 == 0:
            recorded.write(target, changed(rng, second), blocks, **parts)
        elif seed % 3 == 1:
            other = second["results"] | {"exit_code": rng.randrange(1, 126)}
            recorded.write(target, second | {"results": other}, blocks, **parts)
        else:
            recorded.write(target, second, blocks, **parts)
            target.write_bytes(damaged(rng, target.read_bytes()))
        for command in ("inspect", "--replay"):
            ended = Ended(run, command, target).check()
            assert ended.code in ((0, 1) if command == "inspect" else (0, 3, 125)), (seed, command, ended.err)
            if command == "--replay" and ended.code == 0:
                assert _exact(receipt_in(target)["results"]) == _exact(second["results"]), seed


OTHER_RESULTS: dict[str, dict[str, Any]] = {
    "stdout's size": {"stdout": digest(STDIN) | {"size": 12}},
    "stdout": {"stdout": digest(b"other")},
    "stderr's size": {"stderr": digest(b"") | {"size": 1}},
    "exit code": {"exit_code": 1},
    "trapped": {"exit_code": 134, "trapped": True},
}


@pytest.mark.fuse
@pytest.mark.parametrize("result", OTHER_RESULTS)
def test_a_receipt_with_another_result_is_reported_as_different(
    run: Runner, tmp_path: Path, result: str
) -> None:
    target = recorded.write(tmp_path / "run.car", WHOLE | OTHER_RESULTS[result], guest=GUEST, stdin=STDIN)
    ended = Ended(run, "--replay", target).check()
    assert (ended.code, ended.out.count("DIFFERENT")) == (3, 1), ended.out


def encoded(**changed: Any) -> bytes:
    return json.dumps(WHOLE | changed).encode()


IMPOSSIBLE: dict[str, tuple[bytes, str]] = {
    "an exit code of 0.7": (encoded(exit_code=0.7), "exit_code"),
    "an exit code of false": (encoded(exit_code=False), "exit_code"),
    "an exit code of 256": (encoded(exit_code=256), "exit_code"),
    "an infinite exit code": (encoded(exit_code=float("inf")), "Infinity"),
    "an infinite size": (encoded(stdout=digest(STDIN) | {"size": float("inf")}), "Infinity"),
    "a size that JSON reads as infinite": (
        encoded().replace(b'"seconds": 0.25', b'"seconds": 1e999'),
        "seconds",
    ),
    "a key twice": (encoded().replace(b'"exit_code": 0', b'"exit_code": 1, "exit_code": 0'), "twice"),
    "a timeout of 1e300": (encoded(limits={"timeout": 1e300}), "timeout"),
    "a timeout that no float can hold": (encoded(limits={"timeout": 10**400}), "timeout"),
    "a timeout of 0": (encoded(limits={"timeout": 0}), "timeout"),
    "a limit that is a flag": (encoded(limits={"fuel": True}), "fuel"),
    "a limit beyond 64 bits": (encoded(limits={"max_table_elements": 1 << 63}), "max-table-elements"),
    "too few open files": (encoded(limits={"max_open_files": 3}), "max-open-files"),
    "a stack of 2 GiB": (encoded(limits={"max_wasm_stack": 2 << 30}), "max-wasm-stack"),
    "an unknown limit": (encoded(limits={"max_\x1b[1m": 1}), "is not a limit"),
    "arguments of 15 MB": (encoded(argv=["guest.wat", *map(str, range(2_000_000))]), "argv, env"),
    "an argument of 3 MB": (encoded(argv=["guest.wat", "x" * 3_000_000]), "argv"),
    "millions of lists": (encoded(ahead=[[number] for number in range(2_000_000)]), "larger than any"),
    "a relative working folder": (encoded(cwd="ipfs"), "cwd"),
    "a zero byte": (encoded(argv=["guest.wat", "a\0b"]), "argv"),
    "a trap with exit code 0": (encoded(trapped=True), "exit_code"),
    "a number of many digits": (
        encoded().replace(b'"fuel": 1000000', b'"fuel": ' + b"9" * 100_000),
        "not JSON",
    ),
    "UTF-16": (encoded().decode().encode("utf-16"), "not JSON"),
}


BY_COMMAND = (
    "a timeout that no float can hold",
    "an exit code of 0.7",
    "an infinite exit code",
    "a key twice",
    "a timeout of 1e300",
    "an unknown limit",
    "arguments of 15 MB",
)


@pytest.mark.parametrize("fault", IMPOSSIBLE)
def test_a_receipt_that_no_run_can_have_is_refused(run: Runner, tmp_path: Path, fault: str) -> None:
    data, named = IMPOSSIBLE[fault]
    target = recorded.write(tmp_path / "run.car", data, guest=GUEST, stdin=STDIN)
    with pytest.raises(ReceiptRefused, match=named):
        check_record(target)
    if fault in BY_COMMAND:
        Ended(run, "--replay", target, "-W", "timeout=1s").refused(named)


@pytest.mark.fuse
def test_a_working_folder_with_escape_codes_forges_no_line(run: Runner, tmp_path: Path) -> None:
    target = recorded.write(
        tmp_path / "run.car", WHOLE | {"cwd": "/ipfs/\x1b[2K\nstdout: the same"}, guest=GUEST, stdin=STDIN
    )
    message = Ended(run, "--replay", target).refused("\\x1b[2K\\nstdout")
    assert "\nstdout" not in message


def bomb_of_stdin(blocks: Blocks) -> dict[str, Any]:
    """2^50 bytes in 30 blocks."""
    file = blocks.doubled(bytes(1 << 20), 30)
    return {"receipt": WHOLE | {"stdin": {"sha256": "0" * 64, "size": file.size}}, "stdin": file}


def bomb_of_a_guest(blocks: Blocks) -> dict[str, Any]:
    file = blocks.doubled(GUEST + b"\0" * (1 << 20), 30)
    return {"receipt": WHOLE | {"guest": {"cid": cids.text(file.cid), "name": "bomb"}}, "guest": file}


def bomb_of_a_receipt(blocks: Blocks) -> dict[str, Any]:
    return {"receipt": blocks.doubled(b" " * (1 << 20), 12)}


def stdin_of_single_bytes(blocks: Blocks) -> dict[str, Any]:
    """64 MiB in which each byte is a leaf."""
    one = blocks.put(b"x")
    row = blocks.file([(one.cid, 1)] * 8192)
    file = blocks.file([(row.cid, 8192)] * 8192)
    return {"receipt": WHOLE | {"stdin": digest(b"x" * (64 << 20))}, "stdin": file}


def stdin_of_a_long_chain(blocks: Blocks) -> dict[str, Any]:
    """A file of one byte below a chain of 20,000 nodes."""
    node = blocks.put(b"x")
    for _ in range(20_000):
        node = blocks.file([(node.cid, 1)])
    return {"receipt": WHOLE | {"stdin": digest(b"x")}, "stdin": node}


def a_changed_stdin(_blocks: Blocks) -> dict[str, Any]:
    return {"receipt": WHOLE, "stdin": b"some Input\n"}


def a_longer_stdin(_blocks: Blocks) -> dict[str, Any]:
    return {"receipt": WHOLE, "stdin": STDIN + b"\n"}


CLAIMS: dict[Callable[[Blocks], dict[str, Any]], str] = {
    bomb_of_stdin: "standard input",
    bomb_of_a_guest: "bytes",
    bomb_of_a_receipt: "bytes",
    stdin_of_single_bytes: "pieces",
    stdin_of_a_long_chain: "pieces",
    a_changed_stdin: "standard input",
    a_longer_stdin: "standard input",
}


@pytest.mark.parametrize("make", CLAIMS, ids=lambda make: make.__name__)
def test_a_record_that_claims_more_than_it_holds_is_refused(
    run: Runner, tmp_path: Path, make: Callable[[Blocks], dict[str, Any]]
) -> None:
    blocks = Blocks()
    parts = make(blocks)
    target = recorded.write(
        tmp_path / "run.car", parts.pop("receipt"), blocks, **{"guest": GUEST, "stdin": STDIN} | parts
    )
    assert target.stat().st_size < 5 << 20
    if make is bomb_of_stdin:
        Ended(run, "inspect", target).refused("bytes")
        Ended(run, "--replay", target, "-W", "timeout=1s").refused("-W max-stdin=1024TiB")
    else:
        Ended(run, "--replay", target, "-W", "timeout=1s").refused(CLAIMS[make])


def a_billion_paths(blocks: Blocks) -> Built:
    folder = blocks.folder([(b"file", blocks.put(b"x").cid)])
    for _ in range(30):
        folder = blocks.folder([(b"a", folder.cid), (b"b", folder.cid)])
    return folder


def paths_of_a_megabyte(blocks: Blocks) -> Built:
    """Paths of a megabyte."""
    folder = blocks.folder([(b"file", blocks.put(b"x").cid)])
    for _ in range(4000):
        folder = blocks.folder([(b"n" * 250, folder.cid)])
    return folder


def one_block_under_many_names(blocks: Blocks) -> Built:
    file = blocks.put(bytes(1 << 20))
    return blocks.folder([(b"%05d" % number, file.cid) for number in range(30_000)])


def endless_shards(blocks: Blocks) -> Built:
    """A sharded folder whose every slot leads to the next node, eight levels deep."""
    node = blocks.put(b"x")
    for _ in range(8):
        links = [Link(node.cid, b"%02X" % slot, 1) for slot in range(256)]
        message = UnixFS(type=Type.HAMT_SHARD, data=b"\xff" * 32, hash_type=0x22, fanout=256)
        node = blocks.put(dagpb.encode(links, unixfs.encode(message)), cids.DAG_PB)
    return node


TREES = (a_billion_paths, paths_of_a_megabyte, one_block_under_many_names, endless_shards)


@pytest.mark.parametrize("make", TREES, ids=lambda make: make.__name__)
def test_inspect_ends_for_a_tree_with_too_many_or_too_long_paths(
    run: Runner, tmp_path: Path, make: Callable[[Blocks], Built]
) -> None:
    blocks = Blocks()
    root = make(blocks)
    receipt = WHOLE | {"read": [cids.text(cid) for cid in blocks.all]}
    top = blocks.folder([(cids.text(root.cid).encode(), root.cid)])
    target = recorded.write(tmp_path / "run.car", receipt, blocks, guest=GUEST, stdin=STDIN, ipfs=top)
    ended = Ended(run, "inspect", target).check()
    if make is endless_shards:
        assert "made as none can be" in ended.err
    else:
        assert "the rest is left out" in ended.err
        assert ended.out.count("\n") > 30


# -- what a replay may use -----------------------------------------------------------------------------------

NEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "memory": ({"limits": {"max_memory_size": 2 << 30}}, "-W max-memory-size=2GiB"),
    "time": ({"seconds": 700.5}, "-W timeout=701s"),
    "a timeout": ({"limits": {"timeout": 3600}}, "-W timeout=3600s"),
    "stack": ({"limits": {"max_wasm_stack": 16 << 20}}, "-W max-wasm-stack=16MiB"),
    "output": ({"stdout": digest(b"") | {"size": 65 << 20}}, "-W max-stdout=65MiB"),
    "errors": ({"stderr": digest(b"") | {"size": 65 << 20}}, "-W max-stdout=65MiB"),
    "input": ({"stdin": digest(b"") | {"size": 65 << 20}}, "-W max-stdin=65MiB"),
}


@pytest.mark.parametrize("need", NEEDS)
def test_a_refusal_names_the_option_that_the_recording_needs(run: Runner, tmp_path: Path, need: str) -> None:
    fields, option = NEEDS[need]
    target = recorded.write(tmp_path / "run.car", WHOLE | fields, guest=GUEST, stdin=STDIN)
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
    assert done.returncode == 3  # a limit that the user sets makes the output different
    done = run("--replay", target)
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"-W max-stdout" in done.stderr.splitlines()[-1]


GROW = b"""(module (memory 1) %s (func (export "_start")
  (if (i32.eq (memory.grow (i32.const 15000)) (i32.const -1)) (then unreachable)) %s))"""


@pytest.mark.fuse
@pytest.mark.parametrize("many", [False, True])
def test_all_memories_of_a_replay_share_one_limit(run: Runner, tmp_path: Path, many: bool) -> None:
    grow = b"(if (i32.eq (memory.grow %d (i32.const 15000)) (i32.const -1)) (then unreachable))"
    more = b"(memory 1)" * 3, b" ".join(grow % number for number in (1, 2, 3))
    guest = bytes(wasmtime.wat2wasm(GROW % more if many else GROW % (b"", b"")))
    receipt = recorded.receipt(guest, b"", limits={}, stdout=digest(b""))
    target = recorded.write(tmp_path / "run.car", receipt, guest=guest, stdin=b"")
    done = run("--replay", target)
    assert done.returncode == (3 if many else 0), done
    if many:
        assert b"limits of this replay alone: timeout=600s, max-memory-size=1GiB" in done.stdout
        assert run("--replay", target, "-W", "max-memory-size=4GiB").returncode == 0


@pytest.mark.fuse
def test_a_refused_replay_leaves_no_files(run: Runner, tmp_path: Path) -> None:
    blocks = Blocks()
    parts = bomb_of_a_guest(blocks)
    target = recorded.write(tmp_path / "run.car", parts["receipt"], blocks, guest=parts["guest"], stdin=STDIN)
    Ended(run, "--replay", target).refused()
    wait_until(lambda: not list((tmp_path / "tmp").iterdir()), "nothing is left")
