"""Everything about this package is in pyproject.toml. This file finds libfuse, and says in one line why the
compiled parts could not be built: pip's own output is pages long."""

import shlex
import subprocess

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildExt(build_ext):
    """As setuptools' own, with libfuse's flags from pkg-config."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            if "fuse3" in extension.libraries:
                extension.include_dirs += _flags("--cflags-only-I", "-I")
                extension.library_dirs += _flags("--libs-only-L", "-L")
        try:
            super().build_extensions()
        except Exception as exc:
            raise SystemExit(
                "ipfsfuse can't be installed: its parts in C did not compile (the compiler's "
                "messages are above). They need a C "
                "compiler and the headers of Python and libfuse 3; Debian: gcc libc6-dev "
                "python3-dev libfuse3-dev pkg-config"
            ) from exc


def _flags(wanted: str, prefix: str) -> list[str]:
    try:
        told = subprocess.run(
            ["pkg-config", wanted, "fuse3"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []  # the compiler will say what it does not find
    return [flag.removeprefix(prefix) for flag in shlex.split(told)]


setup(cmdclass={"build_ext": BuildExt})
