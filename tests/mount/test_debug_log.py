"""`--log-level debug`: each request of the kernel can be followed to the source that it waited for."""

import os
import re

from tests.mounting import Home, wait_until


def test_the_log_tells_which_source_a_request_waited_for(home: Home) -> None:
    folder = home.folder / "tree"
    folder.mkdir()
    (folder / "file").write_bytes(content := os.urandom(300_000))
    cid = home.add(folder)
    with home.mounted("--from", "library", "--log-level", "debug") as mount:
        assert (mount.path / cid / "file").read_bytes() == content
        wait_until(lambda: re.search(r"request \d+: read ", mount.log()), "the read is logged")
        log = mount.log()
    calls = {
        name: number
        for number, name in re.findall(
            r"request (\d+): (\w+) .*: answered in [\d.]+ ms, after [\d.]+ ms", log
        )
    }
    assert calls.keys() >= {"lookup", "open", "read"}
    assert len(set(calls.values())) == len(calls)
    root = re.search(rf"request (\d+): library gave {cid}, after [\d.]+ ms", log)
    assert root is not None
    assert re.search(rf"request {root[1]}: lookup b'{cid}' of user {os.getuid()}: answered", log)


def test_without_the_debug_level_no_request_is_logged(home: Home) -> None:
    (home.folder / "file").write_bytes(b"x")
    cid = home.add(home.folder / "file")
    with home.mounted("--from", "library") as mount:
        assert (mount.path / cid).read_bytes() == b"x"
        log = mount.log()
    assert not re.search(r"request \d+:", log)
