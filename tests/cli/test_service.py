"""What a service manager and a monitor see: the notify socket, reload, the units, metrics."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.mounting import PATIENCE, Home, wait_until

TOP = Path(__file__).parents[2]
UNITS = TOP / "packaging" / "systemd"


@contextmanager
def service(
    user: Home, *options: str, watchdog: float = 1.0
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A mount in the foreground, as systemd starts it, and the socket that it tells how it does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(user.folder / "notify"))
        manager.settimeout(PATIENCE)
        env = {
            **user.env,
            "NOTIFY_SOCKET": str(user.folder / "notify"),
            "WATCHDOG_USEC": str(int(watchdog * 1e6)),
        }
        command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", *options, str(user.mountpoint)]
        with subprocess.Popen(command, env=env, start_new_session=True, stderr=subprocess.DEVNULL) as process:
            try:
                yield process, manager
            finally:
                process.terminate()
                try:
                    process.wait(PATIENCE)
                finally:
                    process.kill()


def until(manager: socket.socket, line: str) -> list[str]:
    """The lines of the messages up to the one that has `line`."""
    seen: list[str] = []
    while line not in seen:
        seen += manager.recv(4096).decode().splitlines()
    return seen


@pytest.mark.fuse
def test_the_service_manager_is_told_ready_alive_reloading_and_stopping(user: Home) -> None:
    with service(user) as (process, manager):
        assert "WATCHDOG=1" not in until(manager, "READY=1")
        assert os.path.ismount(user.mountpoint)
        for _ in range(2):
            assert any(line.startswith("STATUS=status: up") for line in until(manager, "WATCHDOG=1"))
        process.send_signal(signal.SIGHUP)
        told = until(manager, "RELOADING=1")
        told += until(manager, "READY=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in told)
        process.terminate()
        until(manager, "STOPPING=1")


@pytest.mark.fuse
def test_sighup_reads_the_budget_again_and_a_broken_file_changes_nothing(user: Home) -> None:
    folder = user.folder / ".config/ipfsfuse"
    folder.mkdir(parents=True)
    file = folder / "config.toml"
    file.write_text('budget = "64MiB"\n')

    def budget() -> int:
        return int(user.json("status", "--json")["cache"]["budget"])

    with service(user, "--log-file", str(user.folder / "log")) as (process, manager):
        until(manager, "READY=1")
        assert budget() == 64 << 20
        file.write_text('budget = "32MiB"\n')
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: budget() == 32 << 20, "the new budget")
        file.write_text("bugdet = 1\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "did you mean budget" in (user.folder / "log").read_text(), "the complaint")
        file.unlink()
        assert budget() == 32 << 20


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("unit", sorted(str(path.relative_to(UNITS)) for path in UNITS.rglob("*.*")))
def test_systemd_takes_the_units(tmp_path: Path, unit: str) -> None:
    folder = tmp_path / Path(unit).parent
    folder.mkdir(exist_ok=True)
    for path in (UNITS / unit).parent.glob("*.*"):
        text = (
            path.read_text().replace("/usr/bin/ipfsfuse", "/bin/true").replace("man:", "https://example.org/")
        )
        (folder / path.name.replace("@", "@x")).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(folder / Path(unit).name.replace("@", "@x"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    about = [line for line in done.stderr.splitlines() if Path(unit).stem.partition("@")[0] in line]
    assert (done.returncode, about) == (0, [])


@pytest.mark.fuse
def test_metrics_are_openmetrics(user: Home) -> None:
    (user.folder / "f").write_bytes(os.urandom(300_000))
    cid = user.add(user.folder / "f")
    user.run("export", cid, user.folder / "f.car")
    with user.mounted("--from", user.folder / "f.car") as mount:
        (mount.path / cid).read_bytes()
        text = user.run("metrics").stdout
        families = {family.name: family for family in text_string_to_metric_families(text)}
        [budget] = families["ipfsfuse_cache_budget_bytes"].samples
        assert budget.value == user.json("status", "--json")["cache"]["budget"]
        looked_up = [
            sample.value
            for sample in families["ipfsfuse_operation_seconds"].samples
            if sample.name.endswith("_count") and sample.labels == {"operation": "lookup"}
        ]
        assert looked_up[0] >= 1
        assert [each.labels["source"] for each in families["ipfsfuse_source_requests"].samples] == ["f.car"]
        dashboard = json.loads((TOP / "packaging" / "grafana.json").read_text())
        asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
        names = set(re.findall(r"ipfsfuse_\w+", " ".join(asked)))
        assert len(names) > 8
        assert {re.sub("_total$|_bucket$", "", name) for name in names} <= set(families)
        user.run("metrics", "--textfile", user.folder / "node.prom")
        assert (user.folder / "node.prom").read_text().endswith("# EOF\n")
        assert user.json("metrics", "--json")["lag"]["bounds"]


@pytest.mark.fuse
def test_metrics_over_http(user: Home) -> None:
    command = [sys.executable, "-m", "ipfsfuse", "metrics", "--listen", "127.0.0.1:0"]
    with user.mounted(), subprocess.Popen(command, env=user.env, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().decode().split()[-1]
            with urllib.request.urlopen(url) as answer:
                assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
                assert answer.read().endswith(b"# EOF\n")
        finally:
            server.terminate()
