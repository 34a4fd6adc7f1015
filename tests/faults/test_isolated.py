"""Isolated mounts share nothing: each sends its own requests for content that another one has read."""

import os
import random
from contextlib import AbstractContextManager

from ipfsfuse.dag import cid as cids
from tests.dagging import Dag
from tests.faults.gateway import Gateway
from tests.mounting import Home, Mounted
from tests.network.nodes import drop_pages


def test_isolated_mounts_learn_nothing_about_each_others_reads_not_even_by_timing(home: Home) -> None:
    """Timing can show only whether a source was asked. The test counts that: every mount asks for every block
    once."""
    dice, dag = random.Random(9), Dag()
    files = {
        b"large": [dice.randbytes(1 << 18) for _ in range(4)],
        b"other": [dice.randbytes(1 << 18) for _ in range(2)],
    }
    entries = {name: (dag.file(leaves), sum(map(len, leaves))) for name, leaves in files.items()}
    small = dice.randbytes(10_000)
    root = cids.text(dag.directory(entries | {b"small": (dag.block(small), len(small))}))
    contents = {name.decode(): b"".join(leaves) for name, leaves in files.items()} | {"small": small}
    gateway = Gateway(dag.blocks)

    def read(mount: Mounted) -> None:
        for name, data in contents.items():
            assert (mount.path / root / name).read_bytes() == data

    def asked() -> set[int]:
        return set(gateway.asked.values())

    def mounted(name: str, *options: str) -> AbstractContextManager[Mounted]:
        return home.mounted("--from", gateway.url, *options, at=home.folder / name)

    with (
        gateway.serving(),
        mounted("shared") as shared,
        mounted("one", "--isolated") as one,
        mounted("two", "--isolated") as two,
    ):
        for times, mount in enumerate((shared, one, two), 1):
            read(mount)
            assert asked() == {times}
            assert len(gateway.asked) == len(dag.blocks)
            read(mount)
            drop_pages(mount.path / root / "large")
            read(mount)
            assert asked() == {times}, "the mount has staged all blocks itself"
        folders = {mount.control.parent for mount in (shared, one, two)}
        assert len(folders) == 3
        assert os.listdir(one.path) == os.listdir(two.path) == [root]
    assert [folder.exists() for folder in sorted(folders)] == [
        folder == home.store for folder in sorted(folders)
    ]
