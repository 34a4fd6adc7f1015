"""The Python interface: paths, listings, files and names, in trio."""

import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import ipfsfuse
from ipfsfuse import errors
from tests.faults.gateway import Gateway, blocks_of
from tests.mounting import Home
from tests.sources.ipns import NameServer, make, name_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ABSENT = "bafkreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"


def tree(home: Home) -> str:
    folder = home.folder / "tree"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "large").write_bytes(bytes(range(256)) * 20000)
    (folder / "a" / "small é").write_text("small")
    (folder / "a" / "b" / "deep").write_text("deep")
    links = {
        "link": "a/small é",
        "up": "a/b/../b/deep",
        "out": "../x",
        "absolute": "/etc/passwd",
        "loop": "loop",
        "dir": "a",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return home.add(folder)


def run(home: Home, use: Callable[[ipfsfuse.Filesystem], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with ipfsfuse.open_filesystem(cache_dir=home.cache, library=home.library, **options) as fs:
            return await use(fs)

    return trio.run(main)


def test_paths_are_read_listed_and_described(home: Home) -> None:
    cid = tree(home)

    async def use(fs: ipfsfuse.Filesystem) -> None:
        assert cid in await fs.roots()
        assert {entry.name for entry in await fs.ls(cid)} == {
            "a", "large", "link", "up", "out", "absolute", "loop", "dir",
        }  # fmt: skip
        small = next(entry for entry in await fs.ls(f"/ipfs/{cid}/a") if entry.name == "small é")
        assert small.size == 5
        assert await fs.read_bytes(f"/ipfs/{cid}/a/small é") == b"small"
        assert await fs.read_bytes(f"ipfs://{cid}/a/small%20%C3%A9") == b"small"
        assert await fs.read_bytes(small.cid) == b"small"
        found = await fs.stat(f"{cid}/large")
        assert (found.kind, found.size) == ("file", 256 * 20000)
        assert (await fs.stat(cid)).kind == "directory"
        async with await fs.open(f"{cid}/large") as file:
            assert await file.read(255, 3) == b"\xff\x00\x01"
            assert await file.read(file.size - 1) == b"\xff"
            assert await file.read(file.size, 5) == b""
            assert len(await file.read()) == file.size
            for numbers in ((-5, 10), (-5, None), (0, -1)):
                with trio.fail_after(10), pytest.raises(ValueError, match="negative"):
                    await file.read(*numbers)

    run(home, use)


def test_symlinks_are_followed_only_within_their_root(home: Home) -> None:
    cid = tree(home)

    async def use(fs: ipfsfuse.Filesystem) -> None:
        assert await fs.read_bytes(f"{cid}/link") == b"small"
        assert await fs.read_bytes(f"{cid}/up") == b"deep"
        assert await fs.read_bytes(f"{cid}/dir/b/deep") == b"deep"
        assert await fs.readlink(f"{cid}/out") == "../x"
        assert (await fs.stat(f"{cid}/out", follow_symlinks=False)).kind == "symlink"
        for path in ("out", "absolute"):
            with pytest.raises(errors.NotAllowed):
                await fs.read_bytes(f"{cid}/{path}")
        with pytest.raises(errors.NotFound, match="too many"):
            await fs.stat(f"{cid}/loop")

    run(home, use)


def test_each_kind_of_failure_raises_its_own_error(home: Home) -> None:
    cid = tree(home)

    async def use(fs: ipfsfuse.Filesystem) -> None:
        failing = {
            f"{cid}/nowhere": errors.NotFound, f"{cid}/large/x": errors.NotADirectory, f"{cid}/a": errors.IsADirectory,
            "nonsense": errors.NotACid, ABSENT: errors.Unavailable, f"{cid}/../x": errors.UsageError,
            "/ipns/nonsense/x": errors.NotFound,
        }  # fmt: skip
        for path, kind in failing.items():
            with pytest.raises(kind):
                await fs.open(path)
        with pytest.raises(errors.NotADirectory):
            await fs.ls(f"{cid}/large")

    run(home, use, offline=True)


@pytest.mark.logs("wrong bytes")
def test_content_of_a_gateway_is_verified_and_names_are_resolved(home: Home, tmp_path: Path) -> None:
    elsewhere = Home(tmp_path / "elsewhere")
    cid = tree(elsewhere)
    elsewhere.run("export", cid, tmp_path / "all.car")
    name = str(name_of(KEY))
    with Gateway(blocks_of(tmp_path / "all.car")).serving() as gateway, NameServer().serving() as names:
        names.records[name] = make(KEY, f"/ipfs/{cid}/a")

        async def use(fs: ipfsfuse.Filesystem) -> None:
            assert await fs.read_bytes(f"/ipns/{name}/small é") == b"small"
            assert await fs.resolve(f"ipns://{name}/b") == f"/ipfs/{cid}/a/b"
            asked = gateway.asked.total()
            assert await fs.read_bytes(f"/ipns/{name}/small é") == b"small"
            assert gateway.asked.total() == asked
            deep = (await fs.stat(f"{cid}/a/b/deep")).cid
            assert deep

        run(home, use, sources=[gateway.url, names.url], deadline=5.0)
        gateway.lying = {(cid)}

        async def use_wrong_block(fs: ipfsfuse.Filesystem) -> None:
            with pytest.raises((errors.WrongBlock, errors.Unavailable)):
                await fs.stat(cid)

        run(home, use_wrong_block, sources=[gateway.url], isolated=True, deadline=2.0)


def test_an_error_of_the_caller_is_raised_unchanged(home: Home) -> None:
    async def use(_fs: ipfsfuse.Filesystem) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(home, use)


def test_a_folder_that_is_in_use_is_refused(home: Home) -> None:
    async def use(_fs: ipfsfuse.Filesystem) -> None:
        with pytest.raises(errors.StoreFailed):
            async with ipfsfuse.open_filesystem(cache_dir=home.cache, library=home.library):
                pass

    run(home, use)


def test_all_public_names_exist_and_importing_them_loads_no_large_module() -> None:
    for name in ipfsfuse.__all__:
        assert getattr(ipfsfuse, name) is not None
    assert not hasattr(ipfsfuse, "nonsense")
    heavy = "import ipfsfuse, sys; print(sorted({'trio', 'httpx', 'pyfuse3', 'fsspec'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", heavy], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
