"""How faults are reported: the log, `status`, and the exit codes of `status` and `fsck`."""

import random
import re

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway, errno_of, mounted
from tests.mounting import Home

MIB = 1 << 20
WITHIN = r"no source gave it within (1|0\.\d) s"
"""The message with a deadline of 1 s: a busy machine may spend some of it before a call waits."""


def test_a_read_that_fails_leaves_one_line_with_its_cause(home: Home) -> None:
    dag = Dag()
    absent, silent = dag.block(b"absent\n"), dag.block(b"silent\n")
    root = dag.directory({b"absent": (absent, 7), b"silent": (silent, 7)})
    del dag.blocks[cids.multihash(absent)]
    with (
        Gateway({}).serving() as empty,
        mounted(home, dag, "--deadline", "1s", "--from", empty.url) as (gateway, mount),
    ):
        gateway.stalled.add(cids.text(silent))
        folder = mount.path / cids.text(root)
        assert [errno_of(folder / name) for name in ("absent", "silent")] == ["ETIMEDOUT", "ETIMEDOUT"]
        for _ in range(30):
            assert errno_of(mount.path / cids.text(absent)) == "ETIMEDOUT"
        lines = [line for line in mount.log().splitlines() if "a call was answered" in line]
    (late,) = [line for line in lines if "ETIMEDOUT" in line]
    assert re.search(rf"{cids.text(absent)}: {WITHIN}", late)
    assert all(
        f"{source.url} does not have {cids.text(absent)} (status 404)" in late for source in (gateway, empty)
    )


def test_a_source_that_has_not_answered_is_named_as_the_cause(home: Home) -> None:
    dag = Dag()
    silent, lie = dag.block(b"silent\n"), dag.block(b"lie\n")
    with mounted(home, dag, "--deadline", "1s") as (gateway, mount):
        gateway.stalled.add(cids.text(silent))
        gateway.lying.add(cids.text(lie))
        assert errno_of(mount.path / cids.text(lie)) == "EIO"
        assert f"a call was answered EIO: {cids.text(lie)}" in mount.log()
        assert errno_of(mount.path / cids.text(silent)) == "ETIMEDOUT"
        assert re.search(f"{WITHIN}: {gateway.url} has not answered", mount.log())


def test_a_missing_block_is_named_by_the_cid_that_was_asked_for(home: Home) -> None:
    """The message has the CID with its codec (here not dag-pb), although blocks are kept by hash only."""
    dag = Dag()
    absent = cids.text(cids.make(cids.DAG_CBOR, b"\x12\x20" + bytes(32)))
    with mounted(home, dag, "--deadline", "1s"):
        message = home.run("cat", "--raw", absent, check=False).stderr
        assert re.match(f"ipfsfuse: {absent}: {WITHIN}: ", message)


def test_status_shows_untried_sources_and_its_exit_code_shows_degraded_or_dead_mounts(home: Home) -> None:
    dag = Dag()
    there, absent = dag.block(b"there\n"), cids.make(cids.RAW, b"\x12\x20" + bytes(32))
    dead = home.run("status", check=False)
    assert (dead.returncode, dead.stdout) == (1, "")
    with Gateway(dag.blocks).serving() as gateway:
        nowhere = "http://127.0.0.1:9"
        with (
            home.mounted("--from", gateway.url, "--deadline", "1s") as mount,
            (home.mountpoint / cids.text(there)).open() as file,
        ):
            assert file.read() == "there\n"
            done = home.run("status", "--json")
            assert (done.returncode, mount.status()["sources"][0]["state"]) == (0, "good")
            assert (mount.status()["health"], mount.status()["reasons"]) == ("healthy", [])
        with home.mounted("--from", nowhere, "--deadline", "1s") as mount:
            assert home.run("status", check=False).returncode == 0
            assert mount.status()["sources"][0]["state"] == "untried"
            assert errno_of(mount.path / cids.text(absent)) == "ETIMEDOUT"
            shown = home.run("status", check=False)
            assert shown.returncode == 3
            assert "health: degraded\n" in shown.stdout
            (reason,) = mount.status()["reasons"]
            assert reason.startswith(f"{nowhere} is ")
            assert "takes no connections" in reason
            assert mount.status()["sources"][0]["state"] != "good"


def test_fsck_fails_and_names_blocks_that_it_could_not_fetch_again(home: Home) -> None:
    dag, dice = Dag(), random.Random(4)
    small, leaves = dag.block(dice.randbytes(5000)), [dice.randbytes(MIB) for _ in range(3)]
    file = dag.file(leaves)
    root = dag.directory({b"small": (small, 5000), b"file": (file, 3 * MIB)})
    with mounted(home, dag, "--deadline", "1s") as (gateway, mount):
        for name in ("small", "file"):
            (mount.path / cids.text(root) / name).read_bytes()
        assert home.json("fsck", "--json")["wrong"] == 0
        (staged,) = (home.store / "staging").glob("b*")
        with staged.open("r+b") as damaged:
            damaged.seek(MIB + 5)
            damaged.write(b"wrong")
        pack = next(iter((home.store / "packs").iterdir()))
        data = pack.read_bytes()
        at = data.index(dag.blocks[cids.multihash(small)])
        with pack.open("r+b") as damaged:
            damaged.seek(at)
            damaged.write(b"wrong")
        leaf = cids.make(cids.RAW, cids.multihash(dag.block(leaves[1])))
        gateway.stalled |= {cids.text(leaf), cids.text(small)}
        ran = home.run("fsck", check=False)
        assert ran.returncode == 1
        assert (
            f"\nlost:\n  {cids.text(small)}\n  {cids.text(leaf)} at {MIB} in {cids.text(file)}\n"
            in ran.stdout
        )
        assert ran.stderr.splitlines()[-1].startswith(
            "ipfsfuse: wrong, removed, and not to be had from any source: 2 ("
        )
        gateway.stalled.clear()
        assert home.run("fsck").returncode == 0
