"""`get`, `pin ls`, completions and man pages."""

import base64
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from ipfsfuse.cli import parser
from tests.mounting import Home

CID = "bafkreihdwdcefgh4dqkjv67uzcmw7ojee6xedzdetojuzjevtenxquvyku"
TOP = Path(__file__).parents[2]


@pytest.fixture
def tree(user: Home) -> tuple[Path, str]:
    folder = user.folder / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "big").write_bytes(os.urandom(3_000_000))
    (folder / "hello").write_text("hello\n")
    (folder / "link").symlink_to("hello")
    return folder, user.add(folder)


def test_get_copies_a_tree_and_overwrites_nothing(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    target = user.folder / "copy"
    assert user.json("get", cid, "-o", target, "--json")["files"] == 2
    subprocess.run(["diff", "-r", "--no-dereference", folder, target], check=True)
    user.refused("get", cid, "-o", target / "hello", names="exists already", code=2)
    user.run("get", f"{cid}/hello", "-o", user.folder)
    assert (user.folder / "hello").read_text() == "hello\n"


@pytest.mark.fuse
def test_get_uses_the_mount_of_the_cache_folder(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    with user.mounted():
        user.run("get", cid, "-o", user.folder / "copy")
        subprocess.run(["diff", "-r", "--no-dereference", folder, user.folder / "copy"], check=True)


@pytest.mark.fuse
def test_get_does_not_follow_symlinks_out_of_the_mount(user: Home) -> None:
    """Such a link leads to a file of this machine, and that is not verified content."""
    folder = user.folder / "hostile"
    folder.mkdir()
    (user.folder / "secret").write_text("a file of this machine\n")
    (folder / "out").symlink_to(user.folder)
    (folder / "in").symlink_to("sub")
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("right\n")
    cid = user.add(folder)
    for number, mounted in enumerate((nullcontext(), user.mounted())):
        with mounted:
            made = user.folder / f"made-{number}"
            user.refused_while_mounted("get", f"{cid}/out/secret", "-o", made, names="leads out of")
            user.run("get", f"{cid}/in/file", "-o", made)
            assert made.read_text() == "right\n"
            user.run("get", f"{cid}/out", "-o", user.folder / f"link-{number}")
            assert os.readlink(user.folder / f"link-{number}") == str(user.folder)


@pytest.mark.fuse
def test_get_leaves_no_part_of_a_file(user: Home) -> None:
    (user.folder / "large").write_bytes(content := os.urandom(6 << 20))
    cid = user.add(user.folder / "large")
    [pack] = user.library.glob("*.car")
    pack.write_bytes(pack.read_bytes().replace(content[5 << 20 :][:1000], bytes(1000)))
    for mounted in (nullcontext(), user.mounted()):
        with mounted:
            assert user.run("get", cid, "-o", user.folder / "copy", check=False).returncode == 1
            assert not (user.folder / "copy").exists()


@pytest.mark.fuse
def test_get_copies_a_tree_that_is_deeper_than_python_can_recurse(user: Home) -> None:
    names = "/".join("d" * 1200)
    subprocess.run(["mkdir", "-p", user.folder / "deep" / names], check=True)
    try:
        (user.folder / "deep" / names / "file").write_text("deep\n")
        cid = user.add(user.folder / "deep")
        for number, mounted in enumerate((nullcontext(), user.mounted())):
            with mounted:
                user.run("get", cid, "-o", user.folder / f"copy-{number}")
                assert (user.folder / f"copy-{number}" / names / "file").read_text() == "deep\n"
    finally:  # Python can't remove it either
        subprocess.run(
            ["rm", "-rf", *(user.folder / each for each in ("deep", "copy-0", "copy-1"))], check=True
        )


@pytest.mark.fuse
def test_get_uses_the_mount_though_sources_are_configured(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    user.run("export", cid, user.folder / "tree.car")
    user.run("rm", cid)
    with user.mounted("--from", user.folder / "tree.car"):
        user.env["IPFSFUSE_FROM"] = "library"
        user.run("get", cid, "-o", user.folder / "copy")
        assert user.run("cat", f"{cid}/hello").stdout == "hello\n"
    subprocess.run(["diff", "-r", "--no-dereference", folder, user.folder / "copy"], check=True)


@pytest.mark.fuse
def test_pin_takes_many_cids_and_pin_ls_lists_them(user: Home) -> None:
    cids = []
    for number in range(2):
        (user.folder / "f").write_text(str(number))
        cids.append(user.add(user.folder / "f"))
    with user.mounted():
        assert [each["pinned"] for each in user.json("pin", *cids, "--json")] == cids
        assert sorted(user.json("pin", "ls", "--json")["pinned"]) == sorted(cids)
        user.run("unpin", *cids)
        assert user.json("pin", "ls", "--json") == {"pinned": [], "paths": {}}


def test_completions_know_the_commands(user: Home) -> None:
    for shell in ("bash", "zsh"):
        assert "unmount" in user.run("completion", shell).stdout
    script = user.folder / "completion"
    script.write_text(user.run("completion", "bash").stdout)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("module", ["ipfsfuse.cli.parser:build", "ipfsfuse_run.options:_parser"])
def test_man_pages_have_every_option(tmp_path: Path, module: str) -> None:
    """As `scripts/package man` makes them."""
    name, function = module.split(":")
    page = tmp_path / "page.1"
    tool = str(Path(sys.executable).with_name("argparse-manpage"))
    command = [tool, "--module", name, "--function", function, "--prog", "x", "--output", str(page)]
    env = {**os.environ, "PYTHONPATH": f"{TOP}:{TOP / 'runner'}"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    text = page.read_text().replace("\\-", "-")
    options = {"--budget", "--bwlimit", "--watch"} if "cli" in name else {"--record", "--deterministic"}
    assert [each for each in sorted(options) if each not in text] == []


def test_every_command_reports_failures_in_json_too(user: Home, tree: tuple[Path, str]) -> None:
    folder, cid = tree
    failing = [
        ["status"], ["rm", CID], ["unmount", str(user.folder)], ["mount", "x", "--budget", "0"], ["cat", f"{cid}/none"],
        ["import", "/none"], ["completion", "ksh"], ["help", "none"], ["get", f"{cid}/none"], ["logs"], ["metrics"],
    ]  # fmt: skip
    commands = parser.build().commands
    assert [name for name, each in commands.items() if "--json" not in each._option_string_actions] == []
    for command in failing:
        done = user.run(*command, "--json", check=False)
        answer = json.loads(done.stdout)
        assert (answer["code"], f"ipfsfuse: {answer['error']}\n") == (done.returncode, done.stderr)
    (user.folder / "f").write_text("x")
    assert [each["name"] for each in user.json("add", "--json", user.folder / "f")] == ["f"]
    assert user.json("export", cid, user.folder / "x.car", "--json")["exported"] == cid
    [added] = [each["added"] for each in user.json("library", "--json") if each["cid"] == cid]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:]{8}\+00:00", added)
    assert (
        user.json("completion", "bash", "--json")["script"].strip()
        == user.run("completion", "bash").stdout.strip()
    )
    assert user.json("import", user.folder / "x.car", "--json")[0]["cid"] == cid
    *pieces, whole = map(json.loads, user.run("cat", f"{cid}/sub/big", "--json").stdout.splitlines())
    content = b"".join(base64.b64decode(each["data"]) for each in pieces)
    assert content == (folder / "sub" / "big").read_bytes()
    assert (whole["path"], whole["bytes"]) == (f"/ipfs/{cid}/sub/big", len(content))
    assert user.json("rm", cid, "--json") == {"removed": cid, "name": "tree"}


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
@pytest.mark.parametrize("added", [253_402_300_799, 0])
def test_the_first_and_the_last_time_are_shown_in_every_zone(user: Home, zone: str, added: float) -> None:
    (user.folder / "f").write_text("x")
    cid = user.add(user.folder / "f")
    [root] = (user.library / "roots").iterdir()
    root.write_text(json.dumps(json.loads(root.read_text()) | {"added": added}))
    user.env["TZ"] = zone
    assert user.run("library").stdout.startswith(cid)


def test_names_are_bytes_in_every_locale(user: Home) -> None:
    folder = user.folder / "names"
    folder.mkdir()
    (folder / "é").write_text("x")
    (folder / "link").symlink_to("é")
    cid = user.add(folder)
    user.env |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert user.add(folder) == cid
    user.run("get", cid, "-o", user.folder / "copy")
    subprocess.run(["diff", "-r", "--no-dereference", folder, user.folder / "copy"], check=True)


@pytest.mark.fuse
def test_paths_are_bytes_in_a_locale_that_is_not_utf8(user: Home) -> None:
    """Once, paths were decoded by the locale and encoded as UTF-8, so names in IPFS were not found."""
    folder = user.folder / "names"
    folder.mkdir()
    (folder / "é").write_text("x")
    cid = user.add(folder)
    locale = user.folder / "locales" / "en_US.ISO-8859-1"
    locale.parent.mkdir()
    if subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", locale], check=False).returncode:
        pytest.skip("needs localedef and the sources of locales (Debian's package locales)")
    user.env |= {"LC_ALL": locale.name, "LOCPATH": str(locale.parent), "PYTHONUTF8": "0"}
    encoding = "import sys; print(sys.getfilesystemencoding())"
    ran = subprocess.run([sys.executable, "-c", encoding], env=user.env, capture_output=True, check=True)
    assert ran.stdout == b"iso8859-1\n"
    assert user.run("cat", f"{cid}/é").stdout == "x"
    user.run("get", f"{cid}/é", "-o", user.folder / "ö")
    assert (user.folder / "ö").read_text() == "x"
    with user.mounted() as mount:
        assert user.run("cat", f"{cid}/é").stdout == "x"
        user.run("get", f"{cid}/é", "-o", user.folder / "ä")
        assert (user.folder / "ä").read_text() == "x"
        user.run("prefetch", f"{cid}/é")
        user.run("prefetch", mount.path / cid / "é")


def test_add_accepts_the_options_of_ipfs_add(user: Home) -> None:
    (user.folder / "d").mkdir()
    (user.folder / "d" / "f").write_text("x")
    plain = user.run("add", user.folder / "d").stdout.split()[1::3]
    assert user.run("add", "-r", "-q", user.folder / "d").stdout.split() == plain
    versions = [
        user.run("add", "-Q", f"--cid-version={number}", user.folder / "d").stdout for number in (0, 1)
    ]
    by_profile = [
        user.run("add", "-Q", f"--profile={name}", user.folder / "d").stdout
        for name in ("unixfs-v0-2015", "unixfs-v1-2025")
    ]
    assert versions == by_profile
    assert versions[0].startswith("Qm")
    user.env["IPFSFUSE_CID_VERSION"] = "0"
    assert user.run("add", "-Q", user.folder / "d").stdout == versions[0]
    assert user.run("add", "-Q", "--profile=unixfs-v1-2025", user.folder / "d").stdout == versions[1]
