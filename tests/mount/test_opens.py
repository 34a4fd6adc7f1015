"""Opens of small files, and reads of large ones, that C answers without asking Python."""

import errno
import os
import random
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ipfsfuse.dag import cid as cids
from ipfsfuse.fuse.open_files import OFFERED
from tests.counting import Counted, counted
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import Home

FILES = 200
MAX_OPENS = 2
"""Opens that may reach Python: another program may open a file, and Python may be late to drain."""


@pytest.fixture
def small(home: Home) -> dict[str, bytes]:
    """The contents of small files by name. The files are in one folder, which is added to the library."""
    dice = random.Random(3)
    tree = home.folder / "tree"
    tree.mkdir()
    made = {f"{number:03}": dice.randbytes(dice.randrange(1, 30_000)) for number in range(FILES)}
    for name, content in made.items():
        (tree / name).write_bytes(content)
    return made


@pytest.fixture
def root(home: Home, small: dict[str, bytes]) -> Path:
    return home.mountpoint / home.add(home.folder / "tree")


@pytest.fixture
def kernel(home: Home, root: Path) -> Iterator[Counted]:
    with counted(home, "library") as kernel:
        yield kernel


def read_all(root: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in names}


def test_a_small_file_that_was_opened_once_is_opened_again_without_python(
    kernel: Counted, root: Path, small: dict[str, bytes]
) -> None:
    assert read_all(root, small) == small
    before = kernel.now()
    assert read_all(root, small) == small
    asked = kernel.since(before)
    assert asked["open"] <= MAX_OPENS + asked["lookup"], (
        "files that the kernel has forgotten are opened by Python"
    )


@pytest.mark.parametrize(
    "how",
    [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDONLY | os.O_TRUNC, os.O_WRONLY | os.O_CREAT],
)
def test_an_open_for_writing_fails_after_opens_for_reading(
    kernel: Counted, root: Path, small: dict[str, bytes], how: int
) -> None:
    names = list(small)[:3]
    for _ in range(2):
        assert read_all(root, names) == {name: small[name] for name in names}
    for name in names:
        with pytest.raises(OSError, match=name) as refused:
            os.open(root / name, how)
        assert refused.value.errno == errno.EPERM


def test_pages_that_the_kernel_dropped_are_read_through_an_open_without_python(
    kernel: Counted, root: Path, small: dict[str, bytes]
) -> None:
    names = list(small)[:20]
    read_all(root, names)
    for _ in range(3):
        opened = {name: [os.open(root / name, os.O_RDONLY) for _ in range(3)] for name in names}
        before = kernel.now()
        for name, files in opened.items():
            os.posix_fadvise(files[0], 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(files.pop())
            assert [os.pread(file, 1 << 20, 0) for file in files] == [small[name]] * 2
        assert kernel.since(before)["read"] >= len(names)
        for file in (file for files in opened.values() for file in files):
            os.close(file)


def test_many_threads_open_read_and_close_in_any_order(
    kernel: Counted, root: Path, small: dict[str, bytes]
) -> None:
    names = list(small)[:30]
    read_all(root, names)

    def use_at_random(seed: int) -> None:
        dice = random.Random(seed)
        opened: list[tuple[str, int]] = []
        for _ in range(600):
            if dice.random() < 0.5 or not opened:
                name = dice.choice(names)
                opened.append((name, os.open(root / name, os.O_RDONLY)))
            name, file = dice.choice(opened)
            if dice.random() < 0.3:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(file, 1 << 20, 0) == small[name]
            if dice.random() < 0.6:
                opened.remove((name, file))
                os.close(file)
        for _name, file in opened:
            os.close(file)

    with ThreadPoolExecutor(4) as crowd:
        for each in [crowd.submit(use_at_random, seed) for seed in range(4)]:
            each.result()
    assert read_all(root, names) == {name: small[name] for name in names}


def test_a_file_that_was_looked_up_is_opened_and_its_beginning_is_read_without_python(home: Home) -> None:
    """Its block has just come from the source, because the kernel asked for its size."""
    dag, dice = Dag(), random.Random(4)
    sizes = (1, 4095, 4097, OFFERED - 1, OFFERED, OFFERED + 1, 300_001, 1 << 20)
    contents = {f"{size:07}": dice.randbytes(size) for size in sizes}
    cid = dag.directory({name.encode(): (dag.block(each), len(each)) for name, each in contents.items()})
    with Gateway(dag.blocks).serving() as gateway, counted(home, gateway.url) as kernel:
        root = home.mountpoint / cids.text(cid)
        for name, content in contents.items():
            before = kernel.now()
            file = os.open(root / name, os.O_RDONLY)
            assert os.pread(file, 1000, 0) == content[:1000]
            asked = kernel.since(before)
            assert (asked["lookup"] > 0, asked["open"], asked["read"]) == (True, 0, 0)
            for at in (OFFERED - 10, 0, OFFERED):
                assert os.pread(file, 1 << 20, at) == content[at:]
            os.close(file)
            assert (root / name).read_bytes() == content


USES = """
import os
from ipfsfuse.vfs.tree import Tree
real = Tree.used
uses = open(os.environ["COUNTED"], "a", buffering=1)
def used(tree, *arguments):
    uses.write("used\\n")
    real(tree, *arguments)
Tree.used = used
"""


def test_each_open_without_python_just_before_the_end_is_counted_as_a_use(
    home: Home, root: Path, small: dict[str, bytes]
) -> None:
    names = list(small)[:30]
    with counted(home, "library", USES) as kernel:
        read_all(root, names)
        before = kernel.now()
        assert read_all(root, names) == {name: small[name] for name in names}
    since = kernel.since(before)
    assert since["used"] + since["open"] == len(names)


# -- directories ---------------------------------------------------------------------------------------------


@pytest.fixture
def folders(home: Home) -> dict[str, list[str]]:
    """The names in each of some directories. They are in one folder, which is added to the library."""
    made = {
        f"folder-{number}": [f"{number}-{place:04}" for place in range(size)]
        for number, size in enumerate((1, 7, 300, 2500))
    }
    for folder, names in made.items():
        (home.folder / "folders" / folder).mkdir(parents=True)
        for name in names:
            (home.folder / "folders" / folder / name).write_text(name)
    return made


def test_a_directory_that_was_listed_is_opened_again_without_python(
    home: Home, folders: dict[str, list[str]]
) -> None:
    root = home.mountpoint / home.add(home.folder / "folders")
    with counted(home, "library") as kernel:
        asked: list[tuple[int, bool]] = []
        for _ in range(10):
            before = kernel.now()
            for folder, names in folders.items():
                assert sorted(os.listdir(root / folder)) == names
            counts = kernel.since(before)
            asked.append((counts["opendir"], counts["readdir"] > 0))
            if asked[-1] == (0, False):
                break  # sooner or later: another test may make the kernel drop the listings
        assert asked[0] == (len(folders), True)
        assert asked[-1] == (0, False)


def test_a_listing_that_the_kernel_dropped_is_read_through_an_open_without_python(
    home: Home, folders: dict[str, list[str]]
) -> None:
    root = home.mountpoint / home.add(home.folder / "folders")
    with counted(home, "library") as kernel:
        for folder in folders:
            os.listdir(root / folder)
        before = kernel.now()
        opened = {folder: [os.open(root / folder, os.O_RDONLY) for _ in range(3)] for folder in folders}
        assert not kernel.since(before)["opendir"]
        for folder, files in opened.items():
            drop_listing(files[0])
            os.close(files.pop())
            with ThreadPoolExecutor(2) as readers:
                assert [sorted(names) for names in readers.map(os.listdir, files)] == [folders[folder]] * 2
        assert kernel.since(before)["readdir"] >= len(folders)
        for file in (file for files in opened.values() for file in files):
            os.close(file)
        before = kernel.now()
        for folder, names in folders.items():
            assert sorted(os.listdir(root / folder)) == names
        assert not kernel.since(before)["opendir"], "the kernel has the listings again"


def test_many_threads_list_directories_in_any_order(home: Home, folders: dict[str, list[str]]) -> None:
    root = home.mountpoint / home.add(home.folder / "folders")

    def use_at_random(seed: int) -> None:
        dice = random.Random(seed)
        opened: list[tuple[str, int]] = []
        for _ in range(150):
            if dice.random() < 0.5 or not opened:
                folder = dice.choice(list(folders))
                opened.append((folder, os.open(root / folder, os.O_RDONLY)))
            folder, file = dice.choice(opened)
            if dice.random() < 0.3:
                drop_listing(file)
            os.lseek(file, 0, os.SEEK_SET)
            assert sorted(os.listdir(file)) == folders[folder]
            if dice.random() < 0.6:
                opened.remove((folder, file))
                os.close(file)
        for _folder, file in opened:
            os.close(file)

    with counted(home, "library"), ThreadPoolExecutor(4) as crowd:
        for each in [crowd.submit(use_at_random, seed) for seed in range(4)]:
            each.result()


def drop_listing(directory: int) -> None:
    """Makes the kernel forget the listing of an open directory, as it does when memory is short."""
    os.posix_fadvise(directory, 0, 0, os.POSIX_FADV_DONTNEED)


# -- reads of large files ------------------------------------------------------------------------------------

LARGE = 24 << 20


def test_most_reads_of_bytes_fetched_ahead_do_not_reach_python(home: Home) -> None:
    """In each round the reader waits longer, so that more bytes are fetched ahead of it."""
    content = random.Random(5).randbytes(LARGE)
    (home.folder / "large").write_bytes(content)
    path = home.mountpoint / home.add(home.folder / "large")
    with counted(home, "library") as kernel:
        fewest = LARGE
        for patience in (0, 0.01, 0.05, 0.2, 1):
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            # turns off the kernel's read-ahead: it asks for each piece when that is read
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            before = kernel.now()
            for at in range(0, LARGE, 128 << 10):
                assert os.pread(file, 128 << 10, at) == content[at : at + (128 << 10)]
                time.sleep(0 if at % (1 << 20) else patience)
            os.close(file)
            fewest = min(fewest, kernel.since(before)["read"])
            if fewest < LARGE >> 20:
                break
        assert fewest < LARGE >> 20, "fewer than one read for each leaf, which is 8 reads long"
