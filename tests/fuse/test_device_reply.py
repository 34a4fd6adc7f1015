"""The device thread when a reply can't be written: one row for each errno that the kernel may give."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuse.failing_writev import build

SENT, GONE, FAILED = 0, 1, 2
ONE_REPLY = """
import ctypes, os, sys
from ipfsfuse.fuse.device import _LIBRARY
shim = ctypes.CDLL(os.environ["FAILING_WRITEV_LIBRARY"])
out, device = os.pipe()
reply = _LIBRARY.reply_send(device, ctypes.c_uint64(2), b"body", ctypes.c_size_t(4))
print(reply, shim.failing_writev_calls())
if reply == 0:
    assert os.read(out, 100)[16:] == b"body"
"""


@pytest.mark.parametrize(
    ("number", "failures", "outcome", "calls"),
    [
        (errno.EINTR, 50, SENT, 51),
        (errno.ENOMEM, 3, SENT, 4),
        (errno.ENOMEM, 1000, FAILED, 7),
        (errno.ENOENT, 1000, GONE, 1),
        (errno.ENODEV, 1000, GONE, 1),
        (errno.EFAULT, 1000, GONE, 1),
    ],
)
def test_a_reply_whose_write_fails_is_tried_again_or_given_up(
    tmp_path: Path, number: int, failures: int, outcome: int, calls: int
) -> None:
    env = os.environ | build(tmp_path, number, failures) | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", ONE_REPLY], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(outcome), str(calls)], done.stderr


ONE_STORE = """
import ctypes, os
from ipfsfuse.fuse.device import _LIBRARY
_out, device = os.pipe()
print(_LIBRARY.reply_store(device, ctypes.c_uint64(7), b"body", ctypes.c_uint32(4)))
"""


@pytest.mark.parametrize(
    ("number", "outcome"), [(errno.EINTR, 1), (errno.ENOMEM, 0), (errno.ENOENT, 0), (errno.ENODEV, 0)]
)
def test_a_store_that_fails_is_given_up_at_once(tmp_path: Path, number: int, outcome: int) -> None:
    """The open is then answered by Python, and the kernel asks for the bytes."""
    env = os.environ | build(tmp_path, number, 1) | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", ONE_STORE], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(outcome)], done.stderr
