"""The kernel may limit the time for an answer; the deadline is then shorter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipfsfuse.errors import MountFailed
from ipfsfuse.fuse.mountpoint import SYSCTLS, fitting_deadline, request_timeout
from tests.mounting import Home


def sysctls(folder: Path, default: int | None, most: int | None) -> Path:
    for name, value in (("default_request_timeout", default), ("max_request_timeout", most)):
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    return folder


@pytest.mark.parametrize(
    ("default", "most", "seconds", "by"),
    [
        (0, 0, None, ""),
        (None, None, None, ""),
        (60, 0, 60, "default"),
        (0, 60, 60, "max"),
        (60, 40, 40, "max"),
        (40, 60, 40, "default"),
    ],
)
def test_the_two_limits_are_combined_as_the_kernel_does(
    tmp_path: Path, default: int | None, most: int | None, seconds: int | None, by: str
) -> None:
    found = request_timeout(sysctls(tmp_path, default, most))
    assert (found and found.seconds) == seconds
    assert found is None or found.set_by == tmp_path / f"{by}_request_timeout"


@pytest.mark.parametrize(
    ("limit", "deadline"), [(0, 30.0), (33, 30.0), (32, 30.0), (31, 29.0), (15, 13.0), (3, 1.0)]
)
def test_the_deadline_is_shorter_than_the_kernels_limit(tmp_path: Path, limit: int, deadline: float) -> None:
    found, why = fitting_deadline(30.0, sysctls(tmp_path, 0, limit))
    assert found == deadline
    assert (why == "") == (deadline == 30.0)
    assert not why or why == (
        f"the deadline is {deadline:g} s, not 30 s: {tmp_path}/max_request_timeout has the kernel "
        "end a mount that does not "
        f"answer within {limit} s"
    )


def test_a_limit_that_no_deadline_meets_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(
        MountFailed, match=r"default_request_timeout has the kernel .* 2 s: set it to 0 or to 33"
    ):
        fitting_deadline(30.0, sysctls(tmp_path, 2, 0))


@pytest.mark.fuse
def test_mount_and_doctor_report_the_kernels_limit(tmp_path: Path) -> None:
    """Runs in a namespace with another file in place of the sysctl: the real one would change all mounts."""
    sysctl = SYSCTLS / "max_request_timeout"
    if not os.access(sysctl, os.W_OK) or request_timeout() is not None:
        pytest.skip("needs root, and a kernel that has max_request_timeout (Linux 6.15)")
    home = Home(tmp_path)
    (tmp_path / "25").write_text("25\n")
    script = f"""
    mount --bind {tmp_path}/25 {sysctl}
    {sys.executable} -m ipfsfuse doctor >{tmp_path}/doctor
    {sys.executable} -m ipfsfuse mount {home.mountpoint} 2>{tmp_path}/mount || exit
    {sys.executable} -m ipfsfuse unmount {home.mountpoint}
    """
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    line = (
        f"the deadline is 23 s, not 30 s: {sysctl} has the kernel end a mount that does not answer "
        "within 25 s"
    )
    subprocess.run(command, env=home.env, check=True)
    assert (
        f"note request timeout: {line}\n     to do: as root, if that is too short: echo 0 > {sysctl}\n"
    ) in (tmp_path / "doctor").read_text()
    assert (tmp_path / "mount").read_text().startswith(f"ipfsfuse: {line}\n")
    assert line in (home.store / "log").read_text()
