"""`ipfs://` and `ipns://` with fsspec: in the program itself, through a mount, in several programs."""

import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.mounting import Home
from tests.sources.ipns import NameServer, make, name_of

TOP = Path(__file__).parents[2]
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def python(home: Home, program: str, *arguments: str) -> str:
    """Runs a Python program that finds ipfsfuse only by its environment. Returns its output."""
    ran = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program, *arguments],
        env=home.env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.stdout


def tree(home: Home) -> str:
    folder = home.folder / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "large").write_bytes(bytes(range(256)) * 50000)
    (folder / "sub" / "a b%20c").write_text("small\nlines\n")
    return home.add(folder)


PROGRAM = """
import fsspec, sys, threading
cid = sys.argv[1]
with fsspec.open(f"ipfs://{cid}/sub/a b%20c", "r") as file:
    assert file.read() == "small\\nlines\\n"
fs = fsspec.filesystem("ipfs")
assert fs.info(f"ipfs://{cid}")["type"] == "directory"
assert fs.ls(cid, detail=False) == [f"{cid}/large", f"{cid}/sub"], fs.ls(cid, detail=False)
assert {each["type"] for each in fs.ls(cid)} == {"file", "directory"}
assert fs.size(f"{cid}/large") == 256 * 50000
assert fs.isdir(f"{cid}/sub") and fs.isfile(f"{cid}/large") and not fs.exists(f"{cid}/none")
assert fs.cat_file(f"{cid}/large", 255, 258) == b"\\xff\\0\\1"
assert fs.cat_file(f"{cid}/large", -2) == b"\\xfe\\xff"
assert fs.find(cid) == [f"{cid}/large", f"{cid}/sub/a b%20c"]
assert fs.glob(f"{cid}/*/a*") == [f"{cid}/sub/a b%20c"]
assert cid in fs.ls("", detail=False)
with fs.open(f"{cid}/large") as file:
    assert len(file.read()) == 256 * 50000
    file.seek(-1, 2)
    assert file.read() == b"\\xff"
assert fs.ukey(f"{cid}/large").startswith("baf")
for call in (lambda: fs.open(f"{cid}/new", "wb"), lambda: fs.rm(cid), lambda: fs.mkdir("x"), lambda: fs.pipe("x", b"")):
    try:
        call()
    except PermissionError:
        pass
    else:
        raise AssertionError("it was changed")
for path, kind in ((f"{cid}/none", FileNotFoundError), ("nonsense", FileNotFoundError), (f"{cid}/large/x", OSError), (f"{cid}/../x", FileNotFoundError)):
    try:
        fs.info(path)
    except kind:
        pass
    else:
        raise AssertionError(path)
def read():
    for at in range(0, 256 * 50000, 1 << 20):
        assert fs.cat_file(f"{cid}/large", at, at + 256) == bytes(range(256))
threads = [threading.Thread(target=read) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
print(type(fs._backend).__name__, fs._backend._options.get("isolated") if hasattr(fs._backend, "_options") else "")
"""


def test_fsspec_works_without_options_after_add(home: Home) -> None:
    assert python(home, PROGRAM, tree(home)).split() == ["_OwnThread", "None"]


@pytest.mark.fuse
def test_files_are_read_through_a_mount_that_uses_the_cache_folder(home: Home) -> None:
    cid = tree(home)
    with home.mounted():
        assert python(home, PROGRAM, cid).split() == ["_ThroughMount"]


def test_several_programs_and_forked_children_work_side_by_side(home: Home) -> None:
    cid = tree(home)
    found: list[str] = []
    threads = [Thread(target=lambda: found.append(python(home, PROGRAM, cid))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    forking = """
import fsspec, multiprocessing, sys
def size(path):
    return len(fsspec.open(path, "rb").open().read())
if __name__ == "__main__":
    path = f"ipfs://{sys.argv[1]}/large"
    print(size(path))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(*pool.map(size, [path, path]))
"""
    assert python(home, forking, cid).split() == [str(256 * 50000)] * 3


def test_a_file_that_was_opened_before_a_fork_can_be_read_in_the_child(home: Home) -> None:
    """A data loader does this if its dataset holds the file system."""
    program = """
import fsspec, os, signal, sys
cid = sys.argv[1]
fs = fsspec.filesystem("ipfs")
file = fs.open(f"{cid}/large")
assert file.read(3) == b"\\0\\1\\2"
pid = os.fork()
signal.alarm(60)
assert fs.cat_file(f"{cid}/large", 255, 258) == b"\\xff\\0\\1"
file.seek(8 << 20)
assert file.read(3) == b"\\0\\1\\2"
if not pid:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    python(home, program, tree(home))


LINKS = """
import fsspec, sys
cid = sys.argv[1]
fs = fsspec.filesystem("ipfs")
def fails_with(path, kind):
    try:
        fs.cat_file(path)
    except kind:
        return True
types = {each["name"].rpartition("/")[2]: each["type"] for each in fs.ls(cid)}
found = fs.find(cid)
assert fails_with(f"{cid}/out/secret", PermissionError)
assert fails_with(f"{cid}/file-out", PermissionError)
assert fs.cat_file(f"{cid}/again/file") == b"right"
print(type(fs._backend).__name__, types, [each.removeprefix(cid) for each in found])
"""


@pytest.mark.fuse
def test_links_are_the_same_with_and_without_a_mount(home: Home) -> None:
    folder = home.folder / "links"
    folder.mkdir()
    (home.folder / "secret").write_text("a file of this machine")
    (folder / "file").write_text("right")
    for name, target in (
        ("again", "."), ("more", "."), ("out", ".."), ("file-out", "../secret"), ("gone", "none"),
    ):  # fmt: skip
        (folder / name).symlink_to(target)
    cid = home.add(folder)
    (home.folder / "ipfs.secret").write_text("")
    own = python(home, LINKS, cid).removeprefix("_OwnThread ")
    with home.mounted():
        assert python(home, LINKS, cid) == f"_ThroughMount {own}"


@pytest.mark.fuse
def test_content_stays_readable_when_the_mount_ends(home: Home) -> None:
    cid = tree(home)
    program = """
import fsspec, sys
cid = sys.argv[1]
fs = fsspec.filesystem("ipfs")
file = fs.open(f"{cid}/large")
for _ in range(2):
    assert fs.cat_file(f"{cid}/sub/a b%20c") == b"small\\nlines\\n"
    print(type(fs._backend).__name__, flush=True)
    sys.stdin.readline()
file.seek(8 << 20)
assert file.read(3) == b"\\0\\1\\2"
"""
    command = [sys.executable, "-c", program, cid]
    pipe = subprocess.PIPE
    with (
        home.mounted(),
        subprocess.Popen(command, env=home.env, stdin=pipe, stdout=pipe, text=True) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "_ThroughMount\n"
        home.run("unmount", home.mountpoint)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "_OwnThread\n"
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.mark.fuse
def test_ipns_names_with_fsspec(home: Home) -> None:
    cid = tree(home)
    name = str(name_of(KEY))
    program = """
import fsspec, sys
name, source = sys.argv[1:]
options = {"sources": ("library", source)}
with fsspec.open(f"ipns://{name}/a b%20c", "r", **options) as file:
    assert file.read() == "small\\nlines\\n"
fs = fsspec.filesystem("ipns", **options)
print(*fs.ls(name, detail=False), sep=";")
"""
    with NameServer().serving() as server:
        server.records[name] = make(KEY, f"/ipfs/{cid}/sub")
        assert python(home, program, name, server.url).strip() == f"{name}/a b%20c"
        with home.mounted("--from", "library", "--from", server.url):
            assert python(home, program, name, server.url).strip() == f"{name}/a b%20c"


def example(home: Home, name: str, argument: str) -> str:
    ran = subprocess.run(
        [sys.executable, TOP / "examples" / name, argument], env=home.env, capture_output=True, text=True, timeout=120
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("name", ["with_pandas", "with_zarr"])
def test_an_example_without_an_argument_prints_its_usage(home: Home, name: str) -> None:
    pytest.importorskip(name.removeprefix("with_"))
    ran = subprocess.run(
        [sys.executable, TOP / "examples" / f"{name}.py"], env=home.env, capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith(f"usage: python {name}.py CID/")


def test_the_example_for_pandas(home: Home) -> None:
    pytest.importorskip("pandas")
    (home.folder / "table.csv").write_text("x,y\n" + "".join(f"{n},{2 * n}\n" for n in range(101)))
    cid = home.add("-w", home.folder / "table.csv")
    assert "50.0" in example(home, "with_pandas.py", f"{cid}/table.csv")


def test_the_example_for_zarr(home: Home) -> None:
    zarr = pytest.importorskip("zarr")
    numpy = pytest.importorskip("numpy")
    made = zarr.create_array(
        str(home.folder / "array.zarr"), shape=(100, 100), chunks=(10, 10), dtype="int32"
    )
    made[:] = numpy.arange(10000).reshape(100, 100)
    cid = home.add("-w", "-H", home.folder / "array.zarr")
    assert example(home, "with_zarr.py", f"{cid}/array.zarr").split() == [
        "(100,",
        "100)",
        "[[",
        "0",
        "1]",
        "[100",
        "101]]",
    ]
