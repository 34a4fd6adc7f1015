"""Our C, loaded where it was compiled: with a package comes one library of it. Concurrency: none of its own."""

import ctypes
import importlib.util
import logging

log = logging.getLogger("ipfsfuse.native")


def load(name: str, without: str, mode: int = ctypes.RTLD_LOCAL) -> ctypes.CDLL | None:
    """The library `name`; None where it is not compiled or can't be used: `without` says what that means. With RTLD_GLOBAL its
    functions stand before those of the same names in what is loaded later."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        log.info("%s is not compiled: %s", name, without)
        return None
    try:
        return ctypes.CDLL(found.origin, mode=mode)
    except OSError as exc:
        log.info("%s can't be used (%s): %s", name, exc, without)
        return None
