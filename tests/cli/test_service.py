"""What a service manager and a monitor see: the notify socket, reload, the units, metrics."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ipfsfuse.dag import cid as cids
from tests.mounting import PATIENCE, Home, wait_until

TOP = Path(__file__).parents[2]
UNITS = TOP / "packaging" / "systemd"


@contextmanager
def service(
    user: Home, *options: str, watchdog: float = 1.0
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A mount in the foreground, as systemd starts it, and the socket to which it reports its state."""
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
def test_a_mount_reports_ready_alive_reloading_and_stopping_to_systemd(user: Home) -> None:
    with service(user) as (process, manager):
        assert "WATCHDOG=1" not in until(manager, "READY=1")
        assert os.path.ismount(user.mountpoint)
        for _ in range(2):
            assert any(line.startswith("STATUS=status: up") for line in until(manager, "WATCHDOG=1"))
        process.send_signal(signal.SIGHUP)
        lines = until(manager, "RELOADING=1")
        lines += until(manager, "READY=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in lines)
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
        user.run("budget", "48MiB")
        process.send_signal(signal.SIGHUP)  # as a log rotation sends it: the file has not changed
        assert any(line == "READY=1" for line in until(manager, "READY=1"))
        assert budget() == 48 << 20
        file.write_text('budget = "64MiB"\n')  # as at the start
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: budget() == 64 << 20, "the budget of the start")
        file.write_text('budget = "32MiB"\n')
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: budget() == 32 << 20, "the smaller budget again")
        file.write_text('budget = "32MiB"\nfrom = "library"\n')
        process.send_signal(signal.SIGHUP)
        later = "a new value of from holds from the next mount on"
        wait_until(
            lambda: later in (user.folder / "log").read_text(), "the log names the setting that can't change"
        )
        file.write_text("bugdet = 1\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "did you mean budget" in (user.folder / "log").read_text(), "the error is logged")
        file.write_text(f"budget = {'1' * 5000}\n")  # Python's TOML parser fails on it
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "is not TOML" in (user.folder / "log").read_text(), "the next error is logged")
        file.unlink()
        assert budget() == 32 << 20


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", sorted(str(path.relative_to(UNITS)) for path in UNITS.rglob("*.*")))
def test_systemd_accepts_the_units(tmp_path: Path, unit: str) -> None:
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


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_rates_the_exposure_of_the_unit_as_low(tmp_path: Path) -> None:
    """The mount needs what the unit leaves open: root, a mount that others see, and the network. systemd
    calls 5 `medium`."""
    unit = (UNITS / "ipfsfuse@.service").read_text().replace("/usr/bin/ipfsfuse", "/bin/true")
    (tmp_path / "ipfsfuse@x.service").write_text(unit)
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=52", "--no-pager"]
    done = subprocess.run(
        [*command, tmp_path / "ipfsfuse@x.service"], capture_output=True, text=True, check=False
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze can only examine running units")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    assert "Overall exposure level" in done.stdout


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
        [read] = families["ipfsfuse_operation_bytes"].samples
        assert (read.labels, read.value) == ({"operation": "read"}, 300_000)
        assert families["ipfsfuse_pins"].samples[0].value == 0
        dashboard = json.loads((TOP / "packaging" / "grafana.json").read_text())
        asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
        names = set(re.findall(r"ipfsfuse_\w+", " ".join(asked)))
        assert len(names) > 8
        assert {re.sub("_total$|_bucket$", "", name) for name in names} <= set(families)
        user.run("metrics", "--textfile", user.folder / "node.prom")
        assert_prometheus((user.folder / "node.prom").read_text())
        assert user.json("metrics", "--json")["lag"]["bounds"]


@pytest.mark.fuse
def test_metrics_of_a_mountpoint_that_is_not_utf_8(user: Home) -> None:
    with user.mounted(at=Path(os.fsdecode(os.fsencode(user.folder / "ipfs") + b"\xff"))):
        text = user.run("metrics").stdout
        [family] = [each for each in text_string_to_metric_families(text) if each.name == "ipfsfuse"]
        assert family.samples[0].labels["mountpoint"] == f"{user.folder}/ipfs\\xff"


def assert_prometheus(text: str) -> None:
    """Prometheus' format 0.0.4 has no other types, and the node exporter refuses a file with another type."""
    types = set(re.findall("^# TYPE \\S+ (.*)$", text, re.MULTILINE))
    assert types == {"counter", "gauge", "histogram"}
    assert "# EOF" not in text
    assert "ipfsfuse_healthy 1.0" in text


@contextmanager
def listening(user: Home, **options: Any) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Runs `metrics --listen` at a free port. Yields its URL and its process."""
    command = [sys.executable, "-m", "ipfsfuse", "metrics", "--listen", "127.0.0.1:0"]
    started: dict[str, Any] = {"env": user.env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **started, **options) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().decode().split()[-1], server
        finally:
            server.kill()


def test_clients_of_metrics_do_no_harm(user: Home) -> None:
    """This needs no mount."""
    with listening(user) as (url, server):
        port = int(url.split(":")[2].partition("/")[0])

        def ask(request: bytes) -> bytes:
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(request + b"\r\n\r\n")
                return client.makefile("rb").read()

        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        wait_until(lambda: threads(server) < 50, "the oldest connections are closed")
        for client in silent:  # they close the connection while they are answered
            with suppress(OSError):
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        for host in (b"127.0.0.1", b"localhost:1", b"[::1]:80", socket.gethostname().encode()):
            assert b" 503 " in ask(b"GET /metrics HTTP/1.1\r\nHost: " + host)
        for host in (b"rebound.example:9710", b"127.0.0.1.example", b"localhost.example", b"[::1", b""):
            assert b" 403 " in ask(b"GET /metrics HTTP/1.1\r\nHost: " + host)
        for path in (b"/", b"/../metrics", b"http://x/metrics", b"//x/metrics", b"/<script>"):
            assert b" 404 " in ask(b"GET " + path + b" HTTP/1.0")
        assert b" 501 " in ask(b"POST /metrics HTTP/1.0")
        for garbage in (b"\x00\xff", b"GET " + b"x" * 70_000, b"GET / HTTP/1.0\r\n" + b"a: b\r\n" * 200):
            with suppress(ConnectionError):
                assert b" 200 " not in ask(garbage)
        server.terminate()
        server.wait(PATIENCE)
        assert server.stderr is not None
        assert server.stderr.read() == b""


def threads(process: "subprocess.Popen[bytes]") -> int:
    return len(os.listdir(f"/proc/{process.pid}/task"))


@pytest.mark.fuse
def test_metrics_over_http(user: Home) -> None:
    """It runs as if a script started it with `&`: it ignores Ctrl-C at the terminal, and SIGTERM ends it."""
    ignored = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    with user.mounted(), listening(user, preexec_fn=ignored) as (url, server):
        try:
            for accept in (
                "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.3",
                "application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
                "application/openmetrics-text; version=abc",
            ):
                request = urllib.request.Request(url, headers={"Accept": accept})
                with urllib.request.urlopen(request) as answer:
                    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
                    assert answer.read().endswith(b"# EOF\n")
            with urllib.request.urlopen(url) as answer:
                assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert_prometheus(answer.read().decode())
            server.send_signal(signal.SIGINT)
            with urllib.request.urlopen(url) as answer:
                assert answer.status == 200
        finally:
            server.terminate()
        assert server.wait(PATIENCE) == 130
        assert b"Traceback" not in (server.stderr or io.BytesIO()).read()


@pytest.mark.fuse
def test_status_watch_is_a_live_view(user: Home) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, 120))
    command = [sys.executable, "-m", "ipfsfuse", "status", "--watch"]
    with user.mounted() as mount:
        user.refused_while_mounted("status", "--watch", names="--watch needs a terminal", code=2)
        env = {**user.env, "TERM": "xterm"}
        with subprocess.Popen(command, env=env, stdout=follower, stderr=follower) as process:
            os.close(follower)
            shown = b""
            while shown.count(str(mount.path).encode()) < 3:
                shown += os.read(leader, 1 << 16)
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
    os.close(leader)
    assert b"healthy" in shown
    assert b"library" in shown


@pytest.mark.fuse
def test_doctor_asks_the_running_mount(user: Home) -> None:
    def running() -> list[dict[str, str]]:
        findings = [each for each in user.json("doctor", "--json") if each["about"] == "running mount"]
        return [each for each in findings if each["found"].startswith(f"{user.mountpoint}: ")]

    assert running() == []
    with user.mounted("--from", "library"):
        assert [(each["state"], each["found"]) for each in running()] == [
            ("ok", f"{user.mountpoint}: healthy")
        ]
    with user.mounted("--budget", "1000TiB"):
        assert any("is cut to" in each["found"] for each in running())


@pytest.mark.fuse
def test_doctor_names_a_mount_that_hangs(user: Home) -> None:
    with user.mounted("--from", "library") as mount:
        os.kill(mount.pid, signal.SIGSTOP)
        try:
            done = user.run("doctor", check=False)
        finally:
            os.kill(mount.pid, signal.SIGCONT)
        assert done.returncode == 1
        assert (
            f"bad  running mount: {mount.path}: the mount did not answer `status` within 5 s\n" in done.stdout
        )
        assert f"look into `ipfsfuse logs`; end it by `ipfsfuse unmount {mount.path}`\n" in done.stdout


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount.fuse3"), reason="needs root and mount.fuse3")
def test_mount_8_mounts_as_it_does_for_fstab(user: Home) -> None:
    """Calls the real mount(8). It calls mount.fuse3, and that looks for `ipfsfuse` in PATH."""
    (user.folder / "f").write_text("hello")
    cid = user.add(user.folder / "f")
    bin_folder = user.folder / "bin"
    bin_folder.mkdir()
    start = bin_folder / "ipfsfuse"
    start.write_text(f'#!/bin/sh\ncd {os.getcwd()} && exec {sys.executable} -m ipfsfuse "$@"\n')
    start.chmod(0o755)
    options = "ro,budget=64MiB,deadline=5s,_netdev,x-systemd.automount"
    script = f"""
    set -e
    mount --bind {bin_folder} /usr/local/bin  # mount.fuse3 has a PATH of its own
    mount -t fuse.ipfsfuse library "$1" -o {options}
    cat "$1/{cid}"
    ipfsfuse status --json
    ! touch "$1/x"
    umount "$1"
    """
    command = ["unshare", "-m", "bash", "-c", script, "bash", user.mountpoint]
    env = {**user.env, "PATH": f"/usr/local/bin:{user.env['PATH']}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello")
    assert json.loads(done.stdout.removeprefix("hello"))["cache"]["budget"] == 64 << 20
    assert "Operation not permitted" in done.stderr


@pytest.mark.fuse
def test_logs_shows_and_follows_the_file_that_the_mount_logs_to(user: Home) -> None:
    log = user.folder / "logs" / "my.log"
    log.parent.mkdir()
    with user.mounted("--log-file", log, "--log-format", "json", "--from", "library") as mount:
        assert user.json("logs", "--json")["log"] == str(log)
        with open(log, "a") as out:  # so that the older file has one more line
            out.write('{"message": "the last of the older file"}\n')
        log.rename(f"{log}.1")
        os.kill(mount.pid, signal.SIGHUP)
        wait_until(lambda: log.exists() and log.stat().st_size, "the new log file")
        lines = user.run("logs", "-n", "500").stdout.splitlines()
        assert json.loads(lines[0])["level"] == "info"
        assert '{"message": "the last of the older file"}' in lines
        assert json.loads(lines[-1])["message"] == "this log was opened anew"
        command = [sys.executable, "-m", "ipfsfuse", "logs", "-f", "-n", "1", "--json"]
        with subprocess.Popen(command, env=user.env, stdout=subprocess.PIPE) as following:
            assert following.stdout is not None
            assert json.loads(following.stdout.readline())["message"] == "this log was opened anew"
            os.kill(mount.pid, signal.SIGUSR1)
            assert json.loads(following.stdout.readline())["message"].startswith("status: up")
            following.terminate()
    with service(user, "--log-format", "journal") as (_process, manager):
        until(manager, "READY=1")
        user.refused_while_mounted("logs", names="logs to no file", code=2)


@pytest.mark.fuse
def test_a_log_that_can_not_be_written_is_refused(user: Home) -> None:
    """Once, such a mount was made without a log, and did not say so."""
    user.refused(
        "mount", "--log-file", user.folder / "none" / "log", user.mountpoint, names="No such", code=2
    )
    os.mkfifo(user.folder / "fifo")
    user.refused(
        "mount",
        "--log-file",
        user.folder / "fifo",
        user.mountpoint,
        names="fifo can't be written: nobody reads",
        code=2,
    )


@pytest.mark.fuse
def test_a_mount_in_the_foreground_with_a_log_file_answers_on_standard_output(user: Home) -> None:
    log = user.mountpoint.with_name("log")
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--json", "--log-file", log]
    with subprocess.Popen([*command, user.mountpoint], env=user.env, stdout=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        try:
            made = json.loads(daemon.stdout.readline())
            assert (made["pid"], made["mountpoint"]) == (daemon.pid, str(user.mountpoint))
            assert user.mountpoint.is_mount()
            assert "mounted at" in log.read_text()
            assert "control" not in log.read_text()
        finally:
            daemon.terminate()
        assert daemon.stdout.read() == b""


@pytest.mark.fuse
def test_a_mount_in_the_foreground_logs_to_a_file_though_its_standard_error_is_closed(user: Home) -> None:
    log = user.folder / "log"
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--log-file", log, user.mountpoint]
    with subprocess.Popen(["bash", "-c", 'exec "$@" 2>&-', "bash", *command], env=user.env) as process:
        try:
            wait_until(
                lambda: os.path.ismount(user.mountpoint) or process.poll() is not None, "it is mounted"
            )
            assert process.poll() is None
            user.run("unmount", user.mountpoint)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()
    assert "unmounted" in log.read_text()


WRITES = """if True:
    import logging, os, sys
    from pathlib import Path
    from ipfsfuse.cli import logs

    log = logs.DaemonLog()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    logs.escape_the_log()
    if len(sys.argv) > 1:
        log.move(Path(sys.argv[1]), 1 << 20, Path("none"), needed=True)
    for number in range(300):
        logging.info("%d %s", number, "x" * 9000)  # the pipe is full in the middle of one of them
    os.write(3, b"done")
    sys.stdin.readline()
    logging.info("the %s", "last")
    """


@pytest.mark.parametrize("named", [True, False])
def test_a_log_pipe_without_a_reader_blocks_nothing_and_counts_what_is_lost(user: Home, named: bool) -> None:
    """Once, a pipe at standard error blocked the mount. A pipe named by --log-file lost messages and parts of
    messages."""
    fifo = user.folder / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    reading, writing = os.pipe()
    with subprocess.Popen(
        ["bash", "-c", 'exec "$@" 3>&1 2>"$FIFO"', "bash", sys.executable, "-c", WRITES, *[str(fifo)] * named],
        env={**user.env, "FIFO": "/dev/null" if named else str(fifo)},
        stdin=subprocess.PIPE, stdout=writing,
    ) as process, open(reader, encoding="utf-8") as log:  # fmt: skip
        assert process.stdin is not None
        try:
            assert select.select([reading], [], [], PATIENCE)[0], "the process waits for a reader of its log"
            # reads what has arrived, so that there is room again
            lines = [log.readline()]
            process.stdin.write(b"\n")
            process.stdin.close()
            lines += log.readlines()
        finally:
            process.kill()
            os.close(reading)
            os.close(writing)
    *kept, lost, last = lines
    assert [line.split(": ")[1] for line in kept] == [
        f"{number} {'x' * 9000}\n" for number in range(len(kept))
    ]
    assert f": {300 - len(kept)} messages before this one are lost" in lost
    assert last.endswith(": the last\n")


def test_logs_that_are_followed_lose_no_line_when_they_are_rotated(user: Home) -> None:
    log = user.folder / "my.log"
    log.write_text("first\n")
    command = [sys.executable, "-m", "ipfsfuse", "logs", "-f", "--log-file", str(log)]
    with subprocess.Popen(command, env=user.env, stdout=subprocess.PIPE, text=True) as following:
        try:
            assert following.stdout is not None
            assert following.stdout.readline() == "first\n"
            with log.open("a") as older:
                older.write("the last of the older file\n")
            log.rename(user.folder / "my.log.1")
            log.write_text("the first of the new file\n")
            assert following.stdout.readline() == "the last of the older file\n"
            assert following.stdout.readline() == "the first of the new file\n"
            log.write_text("it began again\n")  # in place, as if it could not be moved away
            assert following.stdout.readline() == "it began again\n"
        finally:
            following.terminate()


@pytest.mark.fuse
def test_journal_lines_have_priorities(user: Home) -> None:
    """sd-daemon(3): 6 is information, 4 a warning."""
    command = [sys.executable, "-m", "ipfsfuse", "mount", "--foreground", "--log-format", "journal"]
    with subprocess.Popen(
        [*command, "--from", "library", user.mountpoint], env=user.env, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            wait_until(lambda: os.path.ismount(user.mountpoint), "it is mounted")
            with pytest.raises(OSError, match="timed out"):
                (user.mountpoint / cids.text(cids.make(cids.RAW, b"\x12\x20" + bytes(32)))).stat()
        finally:
            process.terminate()
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    assert any(re.fullmatch("<6>ipfsfuse.mount: mounted at .*", line) for line in lines)
    [failed] = [line for line in lines if line.startswith("<4>")]
    assert re.fullmatch(r"<4>ipfsfuse\.fuse: a call was answered ETIMEDOUT: no source has bafkrei.*", failed)
