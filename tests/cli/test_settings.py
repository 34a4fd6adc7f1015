"""Settings from IPFSFUSE_* and from configuration files; named mounts; mount(8)'s spelling."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from ipfsfuse.cli import mounting, parser, settings
from ipfsfuse.config import MountConfig
from ipfsfuse.dag import cid as cids
from ipfsfuse.errors import UsageError
from tests.cli.conftest import Ipfsfuse
from tests.dagging import Dag
from tests.faults import gateway
from tests.mounting import Home

Write = Callable[[str], Path]


@pytest.fixture
def write(home: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the user's configuration file. The system's file is in the test's folder."""
    monkeypatch.setattr(settings, "SYSTEM_CONFIG", home / "system.toml")
    path = home / ".config/ipfsfuse/config.toml"
    path.parent.mkdir(parents=True)

    def write(text: str) -> Path:
        path.write_text(text)
        path.chmod(0o600)
        return path

    return write


def config(*words: str) -> MountConfig:
    return mounting.config(parser.parse(["mount", *words]))


def test_arguments_override_variables_and_variables_override_files(
    write: Write, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "system.toml").write_text('budget = "1MiB"\ndeadline = "1s"\nreserve = "1MiB"\npins = "none"\n')
    write('budget = "2MiB"\ndeadline = "2s"\nreserve = "2MiB"\n')
    monkeypatch.setenv("IPFSFUSE_BUDGET", "3MiB")
    monkeypatch.setenv("IPFSFUSE_DEADLINE", "3s")
    made = config("m", "--budget", "4MiB")
    assert (made.budget, made.deadline, made.reserve, made.pins) == (4 << 20, 3.0, 2 << 20, "none")


def test_every_option_of_a_mount_can_be_set(
    write: Write, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the examples of the template, in a file and as variables."""
    known = {
        each.removeprefix("--")
        for action in parser.build().commands["mount"]._actions
        for each in action.option_strings
        if each.startswith("--")
    }
    assert known - set(settings.SETTINGS) == {"help", "all", "foreground", "json", "ready-fd", "while-held"}
    lines = [line[1:] for line in settings.template().splitlines() if line.startswith("#") and " = " in line]
    write("\n".join(lines[: len(settings.SETTINGS)]))
    written = parser.parse(["mount", str(home / "m")])
    assert set(written.origins.values()) == {str(settings.user_file())}
    (home / ".config/ipfsfuse/config.toml").unlink()
    for name, value in tomllib.loads("\n".join(lines[: len(settings.SETTINGS)])).items():
        text = " ".join(value) if isinstance(value, list) else str(value).replace("~", str(home))
        monkeypatch.setenv(
            f"IPFSFUSE_{name.upper().replace('-', '_')}", text.replace("False", "false") or " "
        )
    by_variable = parser.parse(["mount", str(home / "m")])
    skipped = {"origins", "argv", "cache_dir"}
    assert {k: v for k, v in vars(by_variable).items() if k not in skipped} == {
        k: v for k, v in vars(written).items() if k not in skipped
    }


WRONG = [
    ("budgt = 1", "budgt is not a setting: did you mean budget?"),
    ("zzz = 1", "`ipfsfuse config` lists the settings"),
    ("budget =", "is not TOML"),
    ('budget = "much"', "budget: 'much' is not a size"),
    ("budget = [1]", "budget: [1] is not a text or a number"),
    ("from = 1", "from: not a list of texts"),
    ('offline = "perhaps"', "'perhaps' is not true or false"),
    ('pins = "all"', "'all' is not one of kubo, none"),
    ('cache-dir = "here"', "'here' is not an absolute path"),
    ("mount = 1", "[mount.NAME]"),
    ("[mount.x]", "mountpoint is missing"),
    ('[mount.x]\nmountpoint = "/m"\nbugdet = 1', "[mount.x]: bugdet is not a setting: did you mean budget?"),
    ('[mount."a/b"]\nmountpoint = "/m"', "a name has no /"),
    ('umask = "9"', "'9' is not a mode"),
    ("umask = 0o027", 'a mode is written in quotes, as "022"'),
    ("uid = 4294967295", "is not a number of a user or group"),
    (f"budget = {'1' * 5000}", "is not TOML"),
    (f"from = {'[' * 5000}", "is not TOML"),
    ('[mount.x]\nmountpoint = "/a\\u0000b"', r"'/a\x00b' can't be a path"),
    ("a = '\udcff'", "is not UTF-8"),
]


@pytest.mark.parametrize(("text", "named"), WRONG, ids=[text[:40] for text, _named in WRONG[:-1]] + ["bytes"])
def test_an_error_in_a_configuration_file_is_one_line(
    ipfsfuse: Ipfsfuse, write: Write, text: str, named: str
) -> None:
    path = write("")
    path.write_bytes(text.encode(errors="surrogateescape"))
    ran = ipfsfuse("mount", "m")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert str(path) in ran.err
    assert named in ran.err


def test_a_file_that_others_can_change_is_refused(ipfsfuse: Ipfsfuse, write: Write) -> None:
    write("").chmod(0o666)
    ran = ipfsfuse("status")
    assert (ran.code, "chmod go-w" in ran.err) == (2, True)


def test_a_wrong_variable_is_named(ipfsfuse: Ipfsfuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPFSFUSE_BUDGET", "much")
    assert "IPFSFUSE_BUDGET: 'much' is not a size" in ipfsfuse("mount", "m").err


def test_a_named_mount(write: Write, home: Path) -> None:
    write(
        'budget = "1MiB"\npins = "none"\n[mount.media]\nmountpoint = "~/media"\nbudget = "5MiB"\nfrom = ["kubo"]\n'
    )
    made = config("media")
    assert (made.mountpoint, made.budget, made.pins, made.sources) == (
        home / "media",
        5 << 20,
        "none",
        ("kubo",),
    )
    assert config("./media").mountpoint == Path("media").absolute()
    assert config("other").budget == 1 << 20


def test_config_shows_where_each_value_comes_from(
    ipfsfuse: Ipfsfuse, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write('budget = "1MiB"\n[mount.media]\nmountpoint = "/media"\nreserve = 0\n')
    monkeypatch.setenv("IPFSFUSE_PINS", "none")
    monkeypatch.setenv("IPFSFUSE_MAX_FETCH", "3MiB")
    as_json = json.loads(ipfsfuse("config", "media", "--deadline", "3s", "--json").out)
    origins = {name: each["origin"] for name, each in as_json["settings"].items()}
    assert as_json["settings"]["budget"]["value"] == 1 << 20
    assert (origins["budget"], origins["reserve"]) == (str(path), f"{path} [mount.media]")
    assert (origins["pins"], origins["deadline"], origins["dns"]) == ("IPFSFUSE_PINS", "argument", "built in")
    assert as_json["mounts"] == {"media": "/media"}
    shown = ipfsfuse("config", "media").out
    for line in (
        "budget +1MiB",
        "max-fetch +3MiB",
        "deadline +30s",
        "from +library",
        "umask +000",
        "library +/.*/library",
    ):
        assert re.search(rf"(?m)^  {line} ", shown), line
    assert (
        "mdeia is not a mount that the configuration names: did you mean media?"
        in ipfsfuse("config", "mdeia").err
    )
    assert "not both" in ipfsfuse("config", "media", "--init").err


def test_config_init_writes_a_file_that_changes_nothing(ipfsfuse: Ipfsfuse, home: Path) -> None:
    before = config("m")
    assert ipfsfuse("config", "--init").code == 0
    assert config("m") == before
    assert (home / ".config/ipfsfuse/config.toml").stat().st_mode & 0o777 == 0o600
    text = (home / ".config/ipfsfuse/config.toml").read_text()
    for key in ("from", "router"):  # a user without a node and a gateway removes the # before these
        text = text.replace(f"#{key} = ", f"{key} = ", 1)
    (home / ".config/ipfsfuse/config.toml").write_text(text)
    made = config("m")
    assert (made.sources, list(made.routers)) == (("library", "network"), ["https://delegated-ipfs.dev"])
    again = ipfsfuse("config", "--init")
    assert (again.code, "exists already" in again.err) == (2, True)


# -- SOURCE DIR -o OPTIONS -----------------------------------------------------------------------------------


def test_the_spelling_of_mount_8(home: Path, tmp_path: Path) -> None:
    made = mounting.config(
        parser.parse(
            [
                "library",
                str(tmp_path / "m"),
                "-o",
                "rw,nosuid,dev,budget=9MiB,from=kubo",
                "-o",
                "x-a.b=c,_netdev,allow_other",
            ]
        )
    )
    assert (made.sources, made.budget, made.allow_other) == (("library", "kubo"), 9 << 20, True)
    assert mounting.config(parser.parse(["none", str(tmp_path / "m"), "-o", "ro,offline"])).offline
    with pytest.raises(UsageError, match="-o bugdet=1: not an option of a mount: did you mean budget"):
        parser.parse(["none", "/m", "-o", "bugdet=1"])


def test_every_argument_has_a_help_text() -> None:
    for name, command in parser.build().commands.items():
        for action in command._actions:
            assert action.help, f"{name} {action.metavar or action.dest}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mount", "--bugdet", "3", "m"], "--bugdet is not an option of mount: did you mean --budget?"),
        (["ls", "--frob=3"], "--frob is not an option of ls: `ipfsfuse help ls` lists them"),
        (["mounts", "all"], "'all' is one word too many for mounts (see ipfsfuse mounts --help)"),
        (
            ["mount", "medai"],
            "medai is neither a folder nor a mount that the configuration names: did you mean media?",
        ),
    ],
)
def test_a_typing_error_gets_a_suggestion(
    ipfsfuse: Ipfsfuse, write: Write, words: list[str], message: str
) -> None:
    write('[mount.media]\nmountpoint = "/media"\n')
    ran = ipfsfuse(*words)
    assert (ran.code, ran.err) == (2, f"ipfsfuse: {message}\n")


def test_help_explains_a_command_and_lists_all_commands(ipfsfuse: Ipfsfuse) -> None:
    assert ipfsfuse("help", "mount").out.startswith("usage: ipfsfuse mount")
    listed = ipfsfuse("help").out
    assert [name for name in parser.build().commands if f"\n    {name}" not in listed] == []
    as_json = json.loads(ipfsfuse("help", "mount", "--json").out)
    assert (as_json["command"], as_json["help"].splitlines()) == (
        "mount",
        ipfsfuse("help", "mount").out.splitlines(),
    )


# -- real mounts ---------------------------------------------------------------------------------------------


@pytest.mark.fuse
def test_the_mount_shows_the_owner_and_the_mask_that_it_was_given(user: Home) -> None:
    (user.folder / "f").write_text("x")
    cid = user.add(user.folder / "f")
    with user.mounted("--uid", "1234", "--gid", "4321", "--umask", "027") as mount:
        for path, mode in ((mount.path, 0o550), (mount.path / cid, 0o440)):
            info = path.stat()
            assert (info.st_uid, info.st_gid, info.st_mode & 0o777) == (1234, 4321, mode)


@pytest.mark.fuse
def test_a_smaller_budget_evicts_at_once(user: Home) -> None:
    (user.folder / "f").write_bytes(os.urandom(8 << 20))
    cid = user.add(user.folder / "f")
    user.run("export", cid, user.folder / "f.car")
    with user.mounted("--from", "library", "--budget", "64MiB") as mount:
        user.run("prefetch", cid)
        cache = user.json("budget", "3MiB", "--json")
        assert cache["budget"] == 3 << 20
        assert cache["used"] <= 3 << 20
        assert os.statvfs(mount.path).f_blocks == (3 << 20) // 4096
        assert user.json("status", "--json")["cache"]["budget"] == 3 << 20


@pytest.mark.fuse
def test_mounts_lists_the_daemon_its_start_and_whether_it_answers(user: Home) -> None:
    with user.mounted() as mount:
        [listed] = [each for each in user.json("mounts", "--json") if each["mountpoint"] == str(mount.path)]
        assert (listed["pid"], listed["answers"], listed["control"]) == (mount.pid, True, str(mount.control))
        assert listed["since"].startswith("20")
        assert str(mount.path) in user.run("mounts").stdout
        for entry in (user.runtime / "ipfsfuse").iterdir():
            entry.unlink()  # as for a mount of another user, the daemon is not known
        [listed] = [each for each in user.json("mounts", "--json") if each["mountpoint"] == str(mount.path)]
        assert (listed["pid"], listed["answers"], listed["since"]) == (None, None, None)


@pytest.mark.fuse
def test_logs_shows_the_last_lines(user: Home) -> None:
    with user.mounted() as mount:
        assert f"mounted at {mount.path}" in user.run("logs", "-n", "1").stdout
        assert user.json("logs", "--json", "--mount", mount.path)["log"] == str(mount.control.parent / "log")


@pytest.mark.fuse
def test_a_log_file_in_json(user: Home) -> None:
    log = user.folder / "mount.log"
    with user.mounted("--log-file", log, "--log-format", "json") as mount:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert {
            "level": "info",
            "logger": "ipfsfuse.mount",
            "message": f"mounted at {mount.path}",
        }.items() <= {**lines[-1]}.items()


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a mount namespace")
def test_all_named_mounts_at_once(user: Home) -> None:
    """In a mount namespace of its own, because `unmount --all` ends every mount of this user that it sees."""
    folder = user.folder / ".config/ipfsfuse"
    folder.mkdir(parents=True)
    points = [user.folder / name for name in ("one", "two")]
    text = ""
    for point in points:
        point.mkdir()
        text += (
            f'[mount.{point.name}]\nmountpoint = "{point}"\ncache-dir = "{user.folder}/cache-{point.name}"\n'
        )
    (folder / "config.toml").write_text(text)
    script = """
    for fs in $(awk '$3 == "fuse.ipfsfuse" {print $2}' /proc/mounts); do umount -l $fs; done
    set -e
    "$@" mount --all --json; "$@" mounts --json; "$@" status --mount two >/dev/null; "$@" unmount one; "$@" mount --all
    "$@" unmount --all --json; ! grep -q "fuse.ipfsfuse" /proc/mounts
    """
    command = ["unshare", "-m", "bash", "-c", script, "bash", sys.executable, "-m", "ipfsfuse"]
    env = {name: value for name, value in user.env.items() if not name.startswith("IPFSFUSE_")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, listed, ended = json.loads("[" + done.stdout.replace("]\n[", "],\n[") + "]")
    for answers in (made, listed):
        assert {each["mountpoint"] for each in answers} == {str(point) for point in points}
    assert {each["unmounted"] for each in ended} == {str(point) for point in points}
    assert f"two is mounted already at {points[1]}" in done.stderr


@pytest.mark.fuse
def test_bwlimit_limits_the_rate_of_fetching(user: Home) -> None:
    dag = Dag()
    file = dag.file([os.urandom(256 << 10) for _ in range(12)])
    seconds = {}
    for rate in ("1MiB", "1GiB"):
        with gateway.mounted(user, dag, "--isolated", "--bwlimit", rate) as (_gateway, mount):
            begun = time.monotonic()
            assert len((mount.path / cids.text(file)).read_bytes()) == 3 << 20
            seconds[rate] = time.monotonic() - begun
    assert seconds["1MiB"] >= 2.0
    assert seconds["1GiB"] < seconds["1MiB"]
