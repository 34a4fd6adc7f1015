"""Arguments become frozen values, or one line that names the error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse import units
from ipfsfuse.cli import folders, mounting, parser
from ipfsfuse.config import MountConfig
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import UsageError
from tests.cli.conftest import Ipfsfuse

CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
V0 = "QmdfTbBqBPQ7VNxZEYEj14VmRuZBkqFbiwReogJgS1zR1n"
COMMANDS = [
    "add",
    "library",
    "rm",
    "export",
    "mount",
    "unmount",
    "doctor",
    "status",
    "ls",
    "pin",
    "unpin",
    "prefetch",
    "evict",
    "fsck",
    "budget",
    "mounts",
    "config",
    "logs",
    "metrics",
    "cat",
    "get",
    "completion",
    "help",
    "import",
    "serve",
]

SIZES = {
    "1": 1, "10GiB": 10 << 30, "500MB": 500_000_000, "64K": 65536, "64k": 65536, "64Ki": 65536, "64kb": 64000, "1.5 MiB": 3 << 19,
    "2T": 2 << 40, "512B": 512, " 7 ": 7, "1P": 1 << 50,
}  # fmt: skip
DURATIONS = {"30s": 30, "5m": 300, "250ms": 0.25, "2h": 7200, "30": 30, "0.5": 0.5, "1d": 86400, "2min": 120}


@pytest.mark.parametrize(("text", "count"), SIZES.items())
def test_sizes(text: str, count: int) -> None:
    assert units.size(text) == count


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_durations(text: str, seconds: float) -> None:
    assert units.duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "-1",
        "0",
        "1e9",
        "1_000",
        "10 GiBs",
        "٣",
        "9" * 20,
        "1P" * 2,
        "5EiB",
        "nan",
        "inf",
        "1,5M",
        "99999P",
    ],
)
def test_texts_that_are_not_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a size|too small a size|too large a size"):
        units.size(text)


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "0s", "1y", "s", "nan", "9999d", "1:30"])
def test_texts_that_are_not_durations(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a duration|be used as a duration"):
        units.duration(text)


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for convert in (units.size, units.duration):
        try:
            assert convert(text) > 0
        except UsageError as exc:
            assert "\n" not in str(exc)


@given(st.integers(min_value=1, max_value=1 << 50))
def test_a_shown_size_can_be_typed_again(count: int) -> None:
    assert units.size(units.human(count)) == pytest.approx(count, rel=0.06)


# -- whole command lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_its_usage(
    ipfsfuse: Ipfsfuse, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        ipfsfuse(command, "--help")
    assert f"usage: ipfsfuse {command}" in capfd.readouterr().out


USAGE = [
    ([], "COMMAND"),
    (["fly"], "'fly' is not a command: `ipfsfuse help` lists the commands"),
    (["mount"], "MOUNTPOINT"),
    (["mount", "x", "--budget", "much"], "'much' is not a size"),
    (["mount", "x", "--budget", "0"], "'0' is too small a size"),
    (["mount", "x", "--deadline", "soon"], "'soon' is not a duration"),
    (["mount", "x", "--fro", "kubo"], "--fro"),
    (["mount", "x", "--from", ""], "empty SOURCE"),
    (["mount", ""], "empty path"),
    (["mount", "x", "--pins", "all"], "'all'"),
    (["mount", "x", "--allow", "nonsense"], "--allow 'nonsense' is neither a CID nor a file"),
    (["mount", "x", "--allow", CID + "/../../etc"], "neither a CID nor a file"),
    (["pin", "nonsense"], "'nonsense' is not a CID"),
    (["pin", f"/ipfs/{CID}/.."], "'..' is not the name of an entry"),
    (["unpin", CID, "/tmp"], "'/tmp': not a path below /ipfs, nor is it in a mount of ipfsfuse"),
    (["help", "muont"], "'muont' is not a command: did you mean mount?"),
    (["add", "x", "--cid-version", "0", "--profile", "unixfs-v1-2025"], "give one of both"),
    (["status", "--watch", "--html", "x"], "not both"),
    (["prefetch", CID[:-1] + "1"], "is not a CID"),
    (
        ["prefetch", CID, "--depth", "-1"],
        "--depth: '-1' is not a number: it must be a whole number, 0 or more",
    ),
    (["mount", "x", "--reserve", "-1"], "--reserve: '-1' is not a size"),
    (["evict"], "CIDs or paths, or --all"),
    (["evict", CID, "--all"], "CIDs or paths, or --all"),
    (["rm", "nonsense"], "'nonsense' is not a CID"),
    (["rm", "../../etc"], "'../../etc' is not a CID"),
    (["add", "x", "--profile", "mine"], "'mine'"),
]


@pytest.mark.parametrize(
    ("arguments", "named"), USAGE, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else ""
)
def test_usage_errors_are_one_line_and_exit_code_2(
    ipfsfuse: Ipfsfuse, home: Path, arguments: list[str], named: str
) -> None:
    ran = ipfsfuse(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("ipfsfuse: ")
    assert ran.err.count("\n") == 1
    assert named in ran.err
    assert list(home.rglob("*")) == [home / "ipfs"]  # the empty folder to mount at


def test_python_m_ipfsfuse_works(home: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "--version"], capture_output=True, text=True, check=True
    )
    assert ran.stdout.startswith("ipfsfuse 0.")


def test_status_loads_no_large_module() -> None:
    script = (
        "import sys; from ipfsfuse.cli.main import main; code = main(['status', '--cache-dir', "
        "'/nonexistent']); print(code, *sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded[0] == "1"
    assert not {"trio", "pyfuse3", "httpx", "wasmtime", "multiformats", "tqdm", "sqlite3"} & set(loaded)


def test_a_command_ends_silently_if_its_output_pipe_is_closed(home: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        [sys.executable, "-m", "ipfsfuse", "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["help"], ["config", "--json"]])
def test_output_that_can_not_be_written_gives_one_line_of_error(home: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ipfsfuse", *arguments]
    with open("/dev/full", "w") as full:
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "ipfsfuse: standard output can't be written: No space left on device\n"
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


# -- configuration -------------------------------------------------------------------------------------------


def config(*arguments: str) -> MountConfig:
    return mounting.config(parser.parse(["mount", *arguments]))


def test_mount_config_by_default(home: Path, tmp_path: Path) -> None:
    made = config(str(tmp_path / "m"))
    assert made == MountConfig(
        mountpoint=tmp_path / "m",
        cache_dir=home / ".cache/ipfsfuse",
        library=home / ".local/share/ipfsfuse/library",
    )
    assert (made.sources, made.budget, made.deadline) == (("library",), 10 << 30, 30.0)


def test_mount_config_in_full(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.car").touch()
    made = config(
        *[
            "m",
            "--from",
            "x.car",
            "--from",
            "kubo",
            "--from",
            "https://a.example",
            "--offline",
            "--cache-dir=c",
            "--library=l",
            "--budget=1MiB",
        ],
        *[
            "--deadline",
            "5s",
            "--allow",
            CID,
            "--allow",
            V0,
            "--record",
            "r",
            "--allow-other",
            "--isolated",
            "--while-held",
            "--pins",
            "none",
        ],
        *["--header-file", "h", "--header-file", "https://a.example=g", "--reserve", "0"],
    )
    assert made == MountConfig(
        mountpoint=tmp_path / "m",
        cache_dir=tmp_path / "c",
        library=tmp_path / "l",
        sources=(str(tmp_path / "x.car"), "kubo", "https://a.example"),
        offline=True,
        budget=1 << 20,
        reserve=0,
        deadline=5.0,
        allow=frozenset({cids.parse(CID), cids.canonical(cids.parse(V0))}),
        record=tmp_path / "r",
        allow_other=True,
        isolated=True,
        while_held=True,
        pins="none",
        header_files=(("", tmp_path / "h"), ("https://a.example", tmp_path / "g")),
    )


def test_allow_lists_from_a_file(home: Path, tmp_path: Path) -> None:
    listed = tmp_path / "allowed"
    listed.write_text(f"# what may be read\n{CID}  # a file\n\n/ipfs/{V0}/\n")
    assert config("m", "--allow", str(listed)).allow == {cids.parse(CID), cids.canonical(cids.parse(V0))}
    listed.write_text(f"{CID}\nbroken\n")
    with pytest.raises(UsageError, match="allowed, line 2: 'broken' is not a CID"):
        config("m", "--allow", str(listed))
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="can't be read"):
        config("m", "--allow", str(listed))


@pytest.mark.parametrize("spelling", [CID, f"/ipfs/{CID}", f"ipfs://{CID}", f"/ipfs/{CID}/"])
def test_spellings_of_a_cid(spelling: str) -> None:
    assert cids.text(cid_alone(spelling)) == CID


def test_folders_by_flag_variable_and_xdg(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xc"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xd"))
    assert (folders.cache_dir(None), folders.library(None)) == (
        tmp_path / "xc/ipfsfuse",
        tmp_path / "xd/ipfsfuse/library",
    )
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert folders.cache_dir(None) == home / ".cache/ipfsfuse"
    monkeypatch.setenv("IPFSFUSE_CACHE_DIR", str(tmp_path / "ec"))
    monkeypatch.setenv("IPFSFUSE_LIBRARY", str(tmp_path / "el"))
    assert (folders.cache_dir(None), folders.library(None)) == (tmp_path / "ec", tmp_path / "el")
    assert (folders.cache_dir(str(tmp_path / "f")), folders.library(str(tmp_path / "g"))) == (
        tmp_path / "f",
        tmp_path / "g",
    )
