"""Everything about this package is in pyproject.toml, but for three things: where libfuse is, the README
without links into the checkout, and one line that says why the compiled parts could not be built (pip's own
output is pages long)."""

import re
import shlex
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

OLDEST_LIBFUSE = "3.14"
"""The first with fuse_session_custom_io."""


class BuildExt(build_ext):
    """As setuptools' own, with libfuse's flags from pkg-config."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            if "fuse3" in extension.libraries:
                _check_libfuse()
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


def _check_libfuse() -> None:
    found = _pkg_config("--modversion")
    numbers = [int(part) for part in re.findall(r"\d+", found)[:2]]
    if numbers and numbers < [int(part) for part in OLDEST_LIBFUSE.split(".")]:
        raise SystemExit(
            f"ipfsfuse can't be installed: libfuse {found} is too old, {OLDEST_LIBFUSE} or newer is needed "
            "(Debian 12 and Ubuntu 24.04 have it)"
        )


def _flags(wanted: str, prefix: str) -> list[str]:
    return [flag.removeprefix(prefix) for flag in shlex.split(_pkg_config(wanted))]


def _pkg_config(wanted: str) -> str:
    """Empty where pkg-config or libfuse's headers are missing: the compiler says what it does not find."""
    try:
        done = subprocess.run(["pkg-config", wanted, "fuse3"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _readme() -> str:
    """Links into the checkout lead nowhere from an index's page: their text alone remains."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?://)[^)]*\)", r"\1", text)


setup(
    cmdclass={"build_ext": BuildExt},
    long_description=_readme(),
    long_description_content_type="text/markdown",
)
