"""Loads our compiled parts. Each package that has C code has one library of it."""

import ctypes
import importlib.util

from ipfsfuse.errors import IpfsFuseError


def load(name: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL:
    """The library of the extension module `name`. With RTLD_GLOBAL its functions come before those of the
    same names in whatever is loaded later. Raises IpfsFuseError if it is missing or can't be loaded."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise IpfsFuseError(
            f"the compiled part {name} is missing: install ipfsfuse again (in a checkout: scripts/setup)"
        )
    try:
        return ctypes.CDLL(found.origin, mode=mode)
    except OSError as exc:
        raise IpfsFuseError(
            f"the compiled part {name} can't be loaded ({exc}): install ipfsfuse again"
        ) from exc
