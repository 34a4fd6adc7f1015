"""Names and messages from outside, in the output of each command and in the log of a real daemon: they don't
control the terminal, and forge no line."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.cli.logs import LOG_FORMAT, PrintableFormatter
from ipfsfuse.text import printable
from tests.cli.conftest import Ipfsfuse, on_terminal
from tests.mounting import PATIENCE, Home, wait_until

FORGED = "2026-01-01 00:00:00,000 ERROR ipfsfuse.mount: forged"
NAMES = [
    "\x1b[31mred", "\x1b]0;a title\x07", "\x1b[2J\x1b[H", "\x9b2J", "two\nlines", f"x\n{FORGED}", "back\rfront", "\x08\x08\x7f", "a\tb",
    "\u202egnp.exe", "\u2066x\u2069", "a\u2028b\u2029c", "\x85next", "plain ünï 🦊",
]  # fmt: skip
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""All characters that `printable` escapes, except the line end."""
LOG_LINE = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d\d\d [A-Z]+ [\w.]+: |{' ' * 4}")


def check(text: str, lines: int | None = None) -> None:
    assert CONTROL.search(text) is None, ascii(text)
    assert not re.search(rf"(?m)^{re.escape(FORGED)}", text), ascii(text)
    if lines is not None:
        assert text.count("\n") == lines, ascii(text)


# -- printable -----------------------------------------------------------------------------------------------


def test_printable_escapes_control_characters_and_nothing_else() -> None:
    assert printable("plain ünï 🦊 \\ ~") == "plain ünï 🦊 \\ ~"
    assert printable("\x1b[31m\n\x7f\x9b\u202e\u2028\udcff") == "\\x1b[31m\\n\\x7f\\x9b\\u202e\\u2028\\xff"


@given(st.text(st.characters(exclude_categories=[])))
def test_printable_text_is_one_line_can_be_encoded_and_is_escaped_once(text: str) -> None:
    once = printable(text)
    assert CONTROL.search(once) is None
    assert "\n" not in once
    assert len(once.splitlines()) <= 1
    assert printable(once) == once
    once.encode()


# -- commands ------------------------------------------------------------------------------------------------


def test_file_names_in_add_library_and_rm(user: Home) -> None:
    tree = user.folder / "tree"
    tree.mkdir()
    for name in NAMES:
        (tree / name).write_text(name)
    added = user.run("add", tree)
    check(added.stdout + added.stderr, len(NAMES) + 1)
    assert all(line.startswith("added ") for line in added.stdout.splitlines())
    assert f"tree/{printable(NAMES[0])}\n" in added.stdout
    roots = [
        line.split()[1] for line in user.run("add", *(tree / name for name in NAMES)).stdout.splitlines()
    ]
    check(user.run("library").stdout, len(NAMES) + 1)
    raw = user.run("library", "--json").stdout
    check(raw)
    assert {entry["name"] for entry in json.loads(raw)} == {"tree", *NAMES}
    for cid in roots[3:6]:
        check(user.run("rm", cid).stdout, 1)
    exported = user.run("export", user.add(tree), user.folder / f"{NAMES[0]}.car")
    check(exported.stdout + exported.stderr, 1)


COMMANDS: list[list[str]] = [
    ["add", "{}"],
    ["add", "--profile", "{}", "x"],
    ["{}"],
    ["rm", "{}"],
    ["pin", "{}"],
    ["pin", "/ipns/{}"],
    ["prefetch", "{}"],
    ["prefetch", "x", "--depth", "{}"],
    ["export", "{}", "x.car"],
    ["export", "bafkqaaa", "{}/none/x.car"],
    ["library", "--library", "/proc/{}\udcff", "--compact"],
    ["mount", "{}"],
    ["mount", "ipfs", "--from", "{}"],
    ["mount", "ipfs", "--from", "https://{}"],
    ["mount", "ipfs", "--allow", "{}"],
    ["mount", "ipfs", "--budget", "{}"],
    ["mount", "ipfs", "--record", "{}/none/record"],
    ["mount", "ipfs", "--cache-dir", "/proc/{}"],
    ["unmount", "{}"],
    ["status", "--mount", "{}"],
    ["status", "--cache-dir", "{}"],
]


@pytest.mark.fuse
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_arguments_in_error_messages(
    ipfsfuse: Ipfsfuse, home: Path, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    ran = ipfsfuse(*(word.replace("{}", "".join(NAMES)) for word in command))
    assert ran.code in (1, 2), ran
    assert ran.err.startswith("ipfsfuse: ")
    assert "unexpected error" not in ran.err
    check(ran.out, 0)
    check(ran.err, 1)


def test_a_traceback_that_was_asked_for(user: Home) -> None:
    user.env["IPFSFUSE_TRACEBACK"] = "1"
    ran = user.run("add", f"none\n{FORGED}\x1b[31m", check=False)
    assert "Traceback" in ran.stderr
    assert CONTROL.search(ran.stderr) is None
    assert ran.returncode == 1


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}],
    ids=["ASCII", "UTF-8"],
)
def test_names_that_can_not_be_encoded_are_escaped(user: Home, locale: dict[str, str]) -> None:
    user.env |= locale
    file = os.fsencode(user.folder) + b"/caf\xe9"
    Path(os.fsdecode(file)).write_text("x")
    command = [sys.executable, "-m", "ipfsfuse", "add", file]
    ran = subprocess.run(command, env=user.env, capture_output=True, timeout=PATIENCE)
    assert (ran.returncode, ran.stderr.count(b"\n")) == (1, 1)
    assert b"caf\\xe9" in ran.stderr
    (user.folder / "tree").mkdir()
    cid = user.add(user.folder / "tree")
    out = os.fsencode(user.folder) + b"/\xff\xc3\xbc\xf0\x9f\xa6\x8a.car"
    ran = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "export", cid, out],
        env=user.env,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"\\xff" in ran.stdout
    assert os.path.exists(out)


def test_a_name_in_the_bar_of_a_terminal(user: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user.folder)
    file = "\x1b[31mred\x1b]0;title\x07"
    Path(file).write_bytes(bytes(50_000_000))
    shown = on_terminal(user, "add", file)
    assert "\\x1b[31mred" in shown
    assert "\x1b[31m" not in shown
    assert "\x07" not in shown


# -- a daemon, its sources and its log -----------------------------------------------------------------------


MESSAGE = f"no\n{FORGED}\r\x1b[31m\x9b2J\u202e\u2028 {'y' * 10}"
PAGE_TYPE = b"text/html; \x9b31m"


class _Hostile(BaseHTTPRequestHandler):
    """An RPC API that fails with a message, and a gateway that sends a page with a control character in its
    type."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._send(
            b"500 no",
            b"application/json",
            json.dumps({"Message": MESSAGE, "Code": 0}, ensure_ascii=False).encode(),
        )

    def do_GET(self) -> None:
        self._send(b"200 OK", PAGE_TYPE, MESSAGE.encode())

    def _send(self, status: bytes, kind: bytes, body: bytes) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        head = b"HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (
            status,
            kind,
            len(body),
        )
        self.wfile.write(head + body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hostile_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hostile)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.fuse
def test_messages_of_sources_in_status_in_doctor_and_in_the_log(user: Home) -> None:
    tree = user.folder / "tree"
    tree.mkdir()
    for name in NAMES:
        (tree / name).write_text(name)
    root = user.add(tree)
    (user.folder / "large").write_bytes(os.urandom(100_000))
    car = user.folder / f"x\n{FORGED}\x1b[31m.car"
    missing = user.add(user.folder / "large")
    user.run("export", root, car)
    car.write_bytes(car.read_bytes() + b"\x99damage")
    with (
        hostile_server() as url,
        user.mounted("--from", car, "--from", url, "--from", f"kubo+{url}", "--deadline", "1s") as mount,
    ):
        assert set(os.listdir(mount.path / root)) == set(NAMES)  # a reader gets them as they are
        for path in (root, *NAMES), (missing,):
            with pytest.raises(OSError):
                mount.path.joinpath(*path).read_bytes()
        check(user.run("ls").stdout)
        wait_until(
            lambda: "forged" in json.dumps(user.json("status", "--json")["pins"]),
            "status shows the message of the node",
        )
        shown = user.run("status", check=False).stdout
        check(shown)
        assert "\\n2026" in shown
        found = user.run("doctor", "--from", car, "--from", url, "--from", f"kubo+{url}", check=False).stdout
        check(found)
        assert f"{url}: " in found
        log = mount.log()
    check(log)
    assert "is damaged or cut short" in log
    assert re.search("pins wait until .* takes them", log)
    assert "\\n2026" in log
    assert [line for line in log.splitlines() if not LOG_LINE.match(line)] == []


def test_a_traceback_in_the_log_forges_no_line(caplog: pytest.LogCaptureFixture) -> None:
    formatter = PrintableFormatter(LOG_FORMAT)
    try:
        raise ExceptionGroup(f"one\n{FORGED}", [ValueError(f"two\x1b[31m\n{FORGED}\u2028{FORGED}")])
    except ExceptionGroup as exc:
        info = (type(exc), exc, exc.__traceback__)
        record = logging.LogRecord("ipfsfuse.x", logging.ERROR, "x.py", 1, "failed: %s", (MESSAGE,), info)
    text = formatter.format(record)
    check(text)
    first, *others = text.splitlines()
    assert first.endswith(f"ERROR ipfsfuse.x: failed: {printable(MESSAGE)}")
    assert len(others) > 5
    assert [line for line in others if not line.startswith("    ")] == []


HOOKS = """
import logging, sys, threading, warnings
from ipfsfuse.cli.logs import escape_the_log
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
escape_the_log()
message = sys.argv[1]
def fail():
    raise ValueError(message)
thread = threading.Thread(target=fail)
thread.start()
thread.join()
class Finalized:
    def __del__(self):
        raise ValueError(message)
Finalized()
warnings.warn(message)
"""


def test_errors_that_python_itself_prints_go_through_the_log() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", HOOKS, MESSAGE], capture_output=True, text=True, timeout=PATIENCE
    )
    check(ran.stderr)
    assert ran.stderr.count("ValueError: no") == 2
    assert "UserWarning: no\\n2026" in ran.stderr
    assert [line for line in ran.stderr.splitlines() if not LOG_LINE.match(line)] == []
