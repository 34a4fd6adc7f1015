"""Optional parts: the packages that each needs, and the message that says what to install.

The names are those of the extras in pyproject.toml."""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from ipfsfuse.errors import NotInstalled

EXTRAS = {
    "run": ("a guest is run by the package wasmtime", "wasmtime"),
    "keccak": ("keccak hashes need the package pycryptodome", "Crypto"),
    "names": ("IPNS names and domains need the packages cryptography and dnspython", "cryptography", "dns"),
    "sign": ("signed receipts need the package cryptography", "cryptography"),
    "watch": ("the live view needs the package rich", "rich"),
}
"""extra: (start of the message, modules...)"""


@contextmanager
def optional(extra: str) -> Iterator[None]:
    """Import the modules of `extra` in this block. Raises NotInstalled if they are missing."""
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] in EXTRAS[extra][1:]:
            raise NotInstalled(_how_to_install(extra)) from exc
        raise


def require(extra: str) -> None:
    """Raises NotInstalled unless the modules of `extra` are installed. Imports nothing."""
    if not _is_installed(extra):
        raise NotInstalled(_how_to_install(extra))


@functools.cache
def _is_installed(extra: str) -> bool:
    return all(importlib.util.find_spec(module) for module in EXTRAS[extra][1:])


def _how_to_install(extra: str) -> str:
    from importlib import metadata  # 10 ms, and rarely needed

    try:
        stated = metadata.requires("ipfsfuse") or []
    except metadata.PackageNotFoundError:  # a checkout that was not installed
        stated = []
    wanted = [each.partition(";")[0].strip() for each in stated if f'extra == "{extra}"' in each]
    command = "".join(f" '{each}'" for each in wanted)
    by_pip = f"pip install{command}, or " if wanted else ""
    return f"{EXTRAS[extra][0]}, which is not installed: {by_pip}install ipfsfuse with its extra [{extra}]"
