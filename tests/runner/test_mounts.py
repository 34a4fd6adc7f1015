"""The mount of a run: the live one, or a new one that ends with the run, however the run ends."""

import fcntl
import os
import signal
import subprocess
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import FolderInUse
from ipfsfuse_run import mounts as run_mounts
from ipfsfuse_run.options import Options
from tests.cache.pinning import mounts
from tests.dagging import Dag
from tests.kubo.node import Node
from tests.mounting import Home, alive, fuse_mounts, wait_until
from tests.network.nodes import source
from tests.runner.conftest import DEMO, Runner, lines

pytestmark = pytest.mark.fuse

READER = DEMO / "reader-p1.wat"


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Runner:
    """A runner without --mount. Its mounts are below the test's own folder."""
    (tmp_path / "tmp").mkdir()
    return Runner({**home.env, "XDG_CACHE_HOME": str(tmp_path / "xdg"), "TMPDIR": str(tmp_path / "tmp")})


@pytest.fixture
def cid(home: Home, tmp_path: Path) -> str:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_text("content\n")
    return home.add(tmp_path / "source")


def nothing_is_left(run: Runner) -> bool:
    folder = Path(run.env["TMPDIR"])
    return not fuse_mounts(folder) and not list(folder.iterdir())


@pytest.mark.parametrize("options", [[], ["--isolated"], ["--offline"], ["--budget", "1MiB"]])
def test_a_mount_that_was_made_for_a_run_ends_with_it(run: Runner, cid: str, options: list[str]) -> None:
    done = run(*options, READER, f"/ipfs/{cid}/file")
    assert (done.returncode, lines(done.stdout)[0]) == (0, "content"), done
    wait_until(lambda: nothing_is_left(run), "the mount ended with its run")


def test_a_live_mount_is_used_and_stays(run: Runner, home: Home, cid: str) -> None:
    with home.mounted() as mount:
        assert lines(run(READER, f"/ipfs/{cid}/file").stdout)[0] == "content"
        assert mount.status()["pid"] == mount.pid
        done = run("--offline", READER, f"/ipfs/{cid}/file")
        assert done.returncode == 2
        assert b"--offline" in done.stderr
    assert nothing_is_left(run)


def test_two_runs_at_once_share_one_mount(run: Runner, cid: str, habits: Path, home: Home) -> None:
    runs = [run.start(habits, "cat", stdin=subprocess.PIPE) for _ in range(2)]
    folder = Path(run.env["TMPDIR"])
    wait_until(
        lambda: len(fuse_mounts(folder)) == 1 and home.json("status", "--json"), "one mount serves both"
    )
    assert lines(run(READER, f"/ipfs/{cid}/file").stdout)[0] == "content"
    for each in runs:
        _stdout, stderr = each.communicate(b"")
        assert (each.returncode, stderr) == (0, b"")
    wait_until(lambda: nothing_is_left(run), "the mount ended with its last run")


def test_a_run_waits_for_a_daemon_that_has_only_locked_the_folder(run: Runner, cid: str, home: Home) -> None:
    """A daemon locks the folder first, and then makes the lock file in it."""
    assert run(READER, f"/ipfs/{cid}/file").returncode == 0
    (home.store / "lock").unlink(missing_ok=True)
    folder = os.open(home.store, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        with run.start(READER, f"/ipfs/{cid}/file") as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(2)  # longer than a daemon waits for the folder
            fcntl.flock(folder, fcntl.LOCK_UN)
            stdout, stderr = process.communicate()
    finally:
        os.close(folder)
    assert process.returncode == 0, stderr
    assert lines(stdout)[0] == "content"


def test_a_run_tries_again_if_the_daemon_in_its_way_has_ended(
    run: Runner, cid: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start fails because another daemon holds the folder. Then that daemon ends."""
    assert run(READER, f"/ipfs/{cid}/file").returncode == 0
    for name, value in run.env.items():
        monkeypatch.setenv(name, value)
    folder = os.open(home.store, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    start, failures = run_mounts._start, []

    def start_noting_failures(options: Options, isolated: bool) -> run_mounts.Mount:
        try:
            return start(options, isolated)
        except FolderInUse as exc:
            failures.append(str(exc))
            os.close(folder)
            raise

    monkeypatch.setattr(run_mounts, "_start", start_noting_failures)
    with run_mounts.open_mount(Options(guest="guest")):
        assert len(failures) == 1
        assert str(home.store.parent) in failures[0]


def test_the_exit_code_says_that_another_mount_has_the_folder(home: Home, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with home.mounted():
        done = home.run("mount", tmp_path / "second", check=False)
    assert done.returncode == os.EX_TEMPFAIL
    assert "is in use by process" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("activity", ["spin", "sleep"])
def test_a_signal_ends_the_guest_and_the_mount(
    run: Runner, habits: Path, number: signal.Signals, activity: str
) -> None:
    with run.start(habits, activity) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(number)
        assert process.wait() == -number
    wait_until(lambda: nothing_is_left(run), "nothing is left")


@pytest.mark.parametrize("options", [[], ["--isolated"]])
def test_kill_9_of_the_runner_leaves_nothing(run: Runner, habits: Path, options: list[str]) -> None:
    with run.start(*options, habits, "spin") as process:
        assert process.stdout is not None
        process.stdout.readline()
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.wait()
    wait_until(lambda: not alive(int(child)), "the guest ended")
    wait_until(lambda: nothing_is_left(run), "nothing is left")


def test_kill_9_of_an_isolated_guest_leaves_nothing(
    run: Runner, home: Home, habits: Path, own_node: Node
) -> None:
    """No mount, no staging files and no folder are left. The node no longer holds what the guest read."""
    cid = own_node.add(b"content\n" * 100_000, "--pin=false", "--cid-version=1")
    with run.start("--isolated", "--from", source(own_node), habits, "spin", f"/ipfs/{cid}") as process:
        assert process.stdout is not None
        assert all(process.stdout.readline() == b"content\n" for _ in range(100_000))
        assert process.stdout.readline() == b"spinning\n"
        (folder,) = Path(run.env["TMPDIR"]).glob("ipfsfuse-isolated-*")
        assert list((folder / "ipfsfuse-cache" / "staging").iterdir())
        status_args = ["status", "--json", "--cache-dir", folder]
        wait_until(
            lambda: home.json(*status_args)["pins"][source(own_node)]["held"],
            "the node holds what was staged",
        )
        own_node.gc()
        assert own_node.has(cid)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait() == 137
    assert nothing_is_left(run)
    assert mounts(own_node) == []
    own_node.gc()
    assert not own_node.has(cid)


def test_only_what_is_allowed_is_reached(run: Runner, home: Home, cid: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    other = home.add(tmp_path / "secret")
    (tmp_path / "list").write_text(f"# the one\n{cid}\n")
    for allowed in (cid, str(tmp_path / "list")):
        assert run("--allow", allowed, READER, f"/ipfs/{cid}/file").returncode == 0
        assert b"can't be read" in run("--allow", allowed, READER, f"/ipfs/{other}").stdout
    done = run("--allow", "no-cid-at-all", READER, f"/ipfs/{cid}/file")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert b"no-cid-at-all" in done.stderr


def test_options_for_the_mount_are_passed_on(run: Runner, home: Home, cid: str, tmp_path: Path) -> None:
    guest = f"/ipfs/{cid}/file"
    car, elsewhere = tmp_path / "all.car", tmp_path / "elsewhere"
    home.run("export", cid, car)
    run.env["IPFSFUSE_LIBRARY"] = str(tmp_path / "empty")
    assert b"can't be read" in run("--offline", READER, guest).stdout
    for options in (["--from", car], ["--library", home.library]):
        done = run(*options, "--deadline", "5s", "--cache-dir", elsewhere, READER, guest)
        assert lines(done.stdout)[0] == "content", done
    assert elsewhere.is_dir()
    done = run("--deadline", "soon", READER, guest)
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert nothing_is_left(run)


def test_a_guest_with_a_missing_block_is_refused_in_one_line(
    run: Runner, tmp_path: Path, habits: Path
) -> None:
    dag, code = Dag(), habits.read_bytes()
    cid, missing = cids.text(dag.file([code[:9000], code[9000:]])), dag.block(code[9000:])
    del dag.blocks[cids.multihash(missing)]
    done = run("--from", dag.car(tmp_path / "part.car"), "--offline", f"/ipfs/{cid}")
    assert (done.returncode, lines(done.stderr)) == (
        125,
        [f"ipfsfuse-run: /ipfs/{cid} can't be read: Connection timed out"],
    )


def test_options_that_the_mount_refuses_give_one_line(run: Runner) -> None:
    done = run("--from", "/nowhere.car", READER, "/ipfs/x")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert b"/nowhere.car" in done.stderr
    done = run("--budget", "much", READER, "/ipfs/x")
    assert (done.returncode, len(lines(done.stderr))) == (2, 1)
    assert nothing_is_left(run)
