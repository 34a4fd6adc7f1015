"""`--header-file`, as a user sees it."""

from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from tests.mounting import Home
from tests.sources.content import raw_blocks
from tests.sources.servers import Server

pytestmark = pytest.mark.fuse
BLOCKS = raw_blocks(72, 1)
CID, BLOCK = next(iter(BLOCKS.items()))


@pytest.fixture
def file(user: Home) -> Path:
    path = user.folder / "headers"
    path.touch(0o600)
    path.write_text("Authorization: Bearer s3cret\n")
    return path


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_the_source_gets_its_headers_and_the_old_spelling_gives_a_warning(
    user: Home, file: Path, spelling: str
) -> None:
    with Server(BLOCKS) as server:
        option = f"{server.url}={file}" if spelling == "new" else str(file)
        ran = user.run("mount", "--from", server.url, "--header-file", option, user.mountpoint)
        try:
            assert ("old spelling" in ran.stderr and "write --header-file URL=FILE" in ran.stderr) == (
                spelling == "old"
            )
            assert (user.mountpoint / cids.text(CID)).read_bytes() == BLOCK
            assert {ask.headers.get("authorization") for ask in server.asked} == {"Bearer s3cret"}
        finally:
            user.run("unmount", user.mountpoint)


def test_commands_without_a_mount_send_the_headers_too(user: Home, file: Path, tmp_path: Path) -> None:
    with Server(BLOCKS) as server:
        source = ("--from", server.url, "--header-file", f"{server.url}={file}")
        (user.folder / ".config" / "ipfsfuse").mkdir(parents=True)
        config = user.folder / ".config" / "ipfsfuse" / "config.toml"
        for by in ("arguments", "configuration"):
            options = source if by == "arguments" else ()
            if by == "configuration":
                config.write_text(
                    f'from = "{server.url}"\n'
                    f'header-file = ["{server.url}={file}", "https://other.example={file}"]\n'
                )
            copy, car = tmp_path / f"{by}.copy", tmp_path / f"{by}.car"
            user.run("get", cids.text(CID), "-o", copy, "--cache-dir", tmp_path / by, *options)
            user.run("cat", "--json", cids.text(CID), *options)
            user.run("export", cids.text(CID), car, *options)
            user.run("doctor", *options, check=False)
            assert copy.read_bytes() == BLOCK
        assert len(server.asked) >= 8
        assert {ask.headers.get("authorization") for ask in server.asked} == {"Bearer s3cret"}
    user.refused("cat", cids.text(CID), *source[:2], "--header-file", f"https://a.example={file}",
                 names="no source is there", code=2)  # fmt: skip


def test_a_header_file_that_can_not_be_used_is_refused_in_one_line(user: Home, file: Path) -> None:
    mount = ("mount", "--from", "https://a.example", "--from", "https://b.example", "--header-file")
    user.refused(*mount, file, user.mountpoint, names=f"--header-file https://a.example={file}", code=2)
    user.refused(*mount, f"https://c.example={file}", user.mountpoint, names="no source is there", code=2)
    user.refused(*mount, "https://a.example=", user.mountpoint, names="write https://a.example=FILE", code=2)
    user.refused(
        "mount",
        "--from",
        "http://a.example",
        "--header-file",
        file,
        user.mountpoint,
        names="use https://",
        code=2,
    )
    file.chmod(0o644)
    user.refused(*mount, f"https://a.example={file}", user.mountpoint, names=f"chmod 600 {file}", code=2)
