"""The INIT exchange's bytes."""

import struct

import pytest

from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse import init_patch

OFFERED = init_patch.PARALLEL_DIROPS | init_patch.CACHE_SYMLINKS | 1


def request(opcode: int = init_patch.FUSE_INIT) -> bytes:
    return (
        struct.pack("<IIQQIIIHH", 104, opcode, 2, 0, 0, 0, 0, 0, 0)
        + struct.pack("<IIII", 7, 45, 131072, OFFERED)
        + bytes(48)
    )


def reply(error: int = 0, max_write: int = 1 << 20) -> bytes:
    return (
        struct.pack("<IiQ", 80, error, 2)
        + struct.pack("<IIIIHHIIHHII", 7, 31, 131072, 0x40, 0, 0, max_write, 1, 256, 0, 0, 0)
        + bytes(24)
    )


def test_the_kernels_offer_is_read() -> None:
    assert init_patch.read_init(request()) == (7, 45, OFFERED)


def test_a_reply_gains_what_was_offered_and_room_for_thousands_of_requests() -> None:
    out = init_patch.extend_reply(reply(), OFFERED, readahead=True)
    major, minor, readahead, flags, background, congestion, max_write = struct.unpack_from(
        "<IIIIHHI", out, 16
    )
    assert (major, minor, readahead, max_write) == (7, 31, 131072, 1 << 20)
    assert flags == 0x40 | init_patch.PARALLEL_DIROPS | init_patch.CACHE_SYMLINKS
    assert (background, congestion) == (init_patch.MAX_BACKGROUND, init_patch.CONGESTION)
    assert len(out) == len(reply())


@pytest.mark.parametrize(
    ("libfuses", "ours"), [(128 << 10, 128 << 10), (1 << 20, 1 << 20), (16 << 20, 1 << 20)]
)
def test_no_request_is_larger_than_who_reads_the_device_has_room_for(libfuses: int, ours: int) -> None:
    out = init_patch.extend_reply(reply(max_write=libfuses), OFFERED, readahead=True)
    assert struct.unpack_from("<I", out, 36)[0] == ours


def test_nothing_is_claimed_that_the_kernel_did_not_offer() -> None:
    out = init_patch.extend_reply(reply(), init_patch.CACHE_SYMLINKS, readahead=True)
    assert struct.unpack_from("<I", out, 28)[0] == 0x40 | init_patch.CACHE_SYMLINKS


def test_a_recording_mount_has_no_kernel_read_ahead() -> None:
    assert struct.unpack_from("<I", init_patch.extend_reply(reply(), OFFERED, readahead=False), 24)[0] == 0


@pytest.mark.parametrize("broken", [b"", request(3), request()[:50]])
def test_what_is_no_init_is_refused(broken: bytes) -> None:
    with pytest.raises(MountFailed):
        init_patch.read_init(broken)


@pytest.mark.parametrize("broken", [b"", reply()[:30], reply(-71)])
def test_a_refusal_of_libfuse_is_told(broken: bytes) -> None:
    with pytest.raises(MountFailed):
        init_patch.extend_reply(broken, OFFERED, readahead=True)
