"""A daemon that can't start more threads goes on serving, one task at a time."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import Home, alive, wait_until

MIB = 1 << 20
LIMITED = """
import os, sys, threading
from trio._core import _thread_cache
_thread_cache.IDLE_TIMEOUT = 0.02  # otherwise older threads would go on serving
name = "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread"
start = getattr(threading, name)
def limited(*arguments, **more):
    if os.path.exists("limited"):
        raise RuntimeError("can't start new thread")  # as under RLIMIT_NPROC or a cgroup's pids.max
    return start(*arguments, **more)
setattr(threading, name, limited)
from ipfsfuse.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_daemon_that_cannot_start_threads_goes_on_serving(home: Home) -> None:
    dag, dice = Dag(), random.Random(3)
    contents = [[dice.randbytes(MIB) for _ in range(3)] for _ in range(4)]
    root = cids.text(
        dag.directory(
            {b"file%d" % number: (dag.file(parts), 3 * MIB) for number, parts in enumerate(contents)}
        )
    )
    log = home.folder / "log"
    with Gateway(dag.blocks).serving() as gateway, log.open("w") as out:
        options = ["--foreground", "--json", "--from", gateway.url, "--deadline", "10s", str(home.mountpoint)]
        command = [sys.executable, "-c", LIMITED, "mount", *options]
        with subprocess.Popen(
            command, env=home.env | {"PYTHONPATH": os.getcwd()}, cwd=home.folder, stdout=out, stderr=out
        ) as daemon:
            try:
                wait_until(
                    lambda: '"mountpoint"' in log.read_text() or daemon.poll() is not None, "it is mounted"
                )
                (home.folder / "limited").touch()
                wait_until(
                    lambda: "no more threads can be started" in log.read_text(), "its threads have ended"
                )

                def read(number: int) -> bytes:
                    return (home.mountpoint / root / f"file{number}").read_bytes()

                with ThreadPoolExecutor(4) as readers:
                    assert list(readers.map(read, range(4))) == [b"".join(parts) for parts in contents]
                wait_until(lambda: len(list((home.store / "staging").glob("b*"))) == 4, "all is staged")
                assert home.json("fsck", "--json")["wrong"] == 0
                assert alive(daemon.pid)
                assert log.read_text().count("no more threads can be started") == 1
                assert "Traceback" not in log.read_text()
            finally:
                daemon.terminate()
        assert daemon.returncode == 0, log.read_text()
