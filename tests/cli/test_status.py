"""`status` as a page in a real browser, as a live view, and in colours; and the counters of `history`."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipfsfuse import client
from ipfsfuse.cli import status
from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults import gateway
from tests.mounting import PATIENCE, Home, Mounted, wait_until

pytestmark = pytest.mark.fuse

HOSTILE = b"<img src=x onerror=alert(1)>\x1b[31m\xe2\x80\xae"


@pytest.fixture
def mount_and_root(user: Home) -> Iterator[tuple[Mounted, str]]:
    """A mount in which a file was read twice, and the CID of its directory."""
    dag = Dag()
    file = dag.file([os.urandom(256 << 10) for _ in range(3)]), 3 << 18
    root = dag.directory({HOSTILE: file, b"unread": (dag.file([b"x" * 70_000]), 70_000)})
    with gateway.mounted(user, dag) as (_gateway, mount):
        path = os.fsencode(mount.path) + b"/" + cids.text(root).encode() + b"/" + HOSTILE
        for _ in range(2):
            with open(path, "rb") as opened:
                assert len(opened.read()) == 3 << 18
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # a reader has its bytes before they are staged
        wait_until(
            lambda: [each["complete"] for each in user.json("ls", "--json")["entries"]] == [True],
            "the file is staged",
        )
        yield mount, cids.text(root)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"there is no browser: none of {', '.join(names)} is on PATH")
    with api.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


def test_the_page_shows_cache_sources_and_hit_rate_in_a_browser(
    user: Home, mount_and_root: tuple[Mounted, str], browser: Any, tmp_path: Path
) -> None:
    mount, root = mount_and_root
    file = tmp_path / "page.html"
    assert f"wrote {file}" in user.run("status", "--html", file).stdout
    for width, scheme in ((1200, "light"), (360, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        asked, complaints = list[str](), list[str]()
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("console", lambda message, complaints=complaints: complaints.append(message.text))
        page.on("dialog", lambda dialog, complaints=complaints: complaints.append(dialog.message))
        page.goto(file.as_uri())
        assert (asked, complaints) == ([file.as_uri()], [])  # nothing is loaded, no script ran
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.images.length") == 0
        assert page.locator("h1").inner_text() == f"{mount.path} healthy"
        [row, *_others] = page.locator("#cache tbody tr").all()
        assert re.fullmatch(r"the last hour\s+7\d\d\.0 KiB, 1 file\s*", row.inner_text())
        assert "http://127.0.0.1" in page.locator("#sources tbody").inner_text()
        assert f"/ipfs/{root}/<img src=x" in page.locator("#largest tbody").inner_text()
        point = page.locator("#hits circle").first.bounding_box()
        chart = page.locator("#hits").bounding_box()
        assert chart["x"] <= point["x"] <= chart["x"] + chart["width"]
        assert chart["y"] <= point["y"] <= chart["y"] + chart["height"]
        page.close()


def test_the_page_is_written_to_standard_output_or_a_file(
    user: Home, mount_and_root: tuple[Mounted, str]
) -> None:
    assert user.run("status", "--html", "-").stdout.startswith("<!DOCTYPE html>")
    user.refused_while_mounted("status", "--html", "/proc/none/x", names="/proc/none/x can't be written")
    assert user.json("status", "--html", user.folder / "p", "--json")["written"] == str(user.folder / "p")


def test_the_hit_rate_is_drawn_over_time() -> None:
    """The height of a point is the rate: 0 is at the bottom, 1 at the top."""
    samples = [
        {"time": f"2026-01-01T00:0{minute}:00+00:00", "hits": hits, "misses": misses, "evictions": 0}
        for minute, (hits, misses) in enumerate([(0, 0), (0, 10), (10, 10), (10, 10), (15, 15)])
    ]
    drawn = status._hit_rate(samples)
    points = re.search('points="([^"]*)"', drawn)
    assert points is not None
    xs, ys = zip(*(map(float, each.split(",")) for each in points[1].split()), strict=True)
    bottom = status.HEIGHT - status.BOTTOM
    assert ys == (bottom, 0, bottom / 2)  # all missed, all hit, nothing asked, half of each
    assert list(xs) == sorted(xs)
    assert xs[-1] == status.WIDTH
    assert "Nothing was asked" in status._hit_rate(samples[:1] * 2)


def test_history_has_counters_and_their_times(mount_and_root: tuple[Mounted, str]) -> None:
    mount, _root = mount_and_root
    samples = client.call(mount.control, "history")["samples"]
    assert (samples[0]["hits"], samples[0]["misses"]) == (0, 0)
    assert samples[-1]["misses"] > 0
    assert samples[-1]["fetched"] >= 3 << 18
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", each["time"]) for each in samples)


def test_the_live_view_shows_which_process_reads_which_file(
    user: Home, mount_and_root: tuple[Mounted, str]
) -> None:
    mount, root = mount_and_root
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (40, 240))
    path = os.fsencode(mount.path) + b"/" + root.encode() + b"/unread"
    with open(path, "rb") as opened:
        opened.read(4096)
        watching = subprocess.Popen(
            [sys.executable, "-m", "ipfsfuse", "status", "--watch"],
            env={**user.env, "TERM": "xterm"}, stdout=follower, stderr=follower,
        )  # fmt: skip
        os.close(follower)
        shown, end = b"", time.monotonic() + PATIENCE
        while b"/unread" not in shown and time.monotonic() < end:
            shown += os.read(leader, 1 << 16)
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == 130
    os.close(leader)
    assert f" {os.getpid()} (".encode() in shown
    assert b"/unread" in shown
    assert b"hit rate" in shown
    assert b"Traceback" not in shown


def test_without_a_terminal_the_live_view_is_json_or_refused(
    user: Home, mount_and_root: tuple[Mounted, str]
) -> None:
    user.refused_while_mounted("status", "--watch", names="--watch needs a terminal", code=2)
    command = [sys.executable, "-m", "ipfsfuse", "status", "--watch", "--json"]
    with subprocess.Popen(command, env=user.env, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        first = json.loads(watching.stdout.readline())
        watching.stdout.close()  # it ends, because its output has no reader
        assert watching.wait(PATIENCE) == 141
    assert (first["health"], first["reading"]) == ("healthy", [])


@pytest.mark.parametrize(
    ("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_a_terminal_gets_colours_unless_they_are_switched_off(
    user: Home, variables: dict[str, str], coloured: bool
) -> None:
    shown = in_terminal(user, {"TERM": "xterm", **variables}, 200, "doctor")
    assert ("\x1b[3" in shown) == coloured
    assert re.search("(\x1b\\[32m)?ok( *)(\x1b\\[0m)? */dev/fuse", shown)
    failed = in_terminal(user, {"TERM": "xterm", **variables}, 200, "status")
    assert failed.startswith("\x1b[31mipfsfuse:\x1b[0m " if coloured else "ipfsfuse: no mount uses")


def test_a_narrow_terminal_gets_a_line_for_each_value(
    user: Home, mount_and_root: tuple[Mounted, str]
) -> None:
    narrow = in_terminal(user, {"TERM": "dumb"}, 60, "status")
    assert re.search(r"(?m)^    state: good\r?$", narrow)
    assert re.search(r"(?m)^  name +state  requests", in_terminal(user, {"TERM": "dumb"}, 400, "status"))


def in_terminal(user: Home, variables: dict[str, str], columns: int, *arguments: str) -> str:
    """The output of a command, standard output and error, in a terminal of so many columns."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    command = [sys.executable, "-m", "ipfsfuse", *arguments]
    running = subprocess.Popen(command, env=user.env | variables, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while data := os.read(leader, 1 << 16):
            shown += data
    except OSError:  # EIO: the command has ended
        pass
    running.wait(PATIENCE)
    os.close(leader)
    return shown.decode()
