"""A real tree that was not made for these tests: the standard library of the running Python."""

import subprocess
import sysconfig
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
LEAVE_OUT = ("__pycache__", "site-packages", "dist-packages", "*.so", "*.a")


def copy_of_the_standard_library(copy: Path) -> Path:
    """Copies the standard library without what is compiled or installed into it. Follows symlinks."""
    without = [f"--exclude={name}" for name in LEAVE_OUT]
    subprocess.run(
        f"mkdir {copy} && tar -C {STDLIB} {' '.join(without)} -chf - . | tar -C {copy} -xf -",
        shell=True,
        check=True,
    )
    return copy
