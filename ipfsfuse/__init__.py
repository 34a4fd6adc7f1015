"""ipfsfuse: IPFS as a read-only directory, fetched lazily and checked against its CIDs.

The names in `__all__` are the Python interface (docs/PYTHON.md). Everything else is private.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipfsfuse import errors
    from ipfsfuse.api.filesystem import Entry, File, Filesystem, Stat, open_filesystem

__version__ = "0.1.0"
__all__ = ["Entry", "File", "Filesystem", "Stat", "__version__", "errors", "open_filesystem"]


def __getattr__(name: str) -> object:
    """Imports a public name at its first use: `ipfsfuse --help` needs none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "errors":
        return import_module("ipfsfuse.errors")
    return getattr(import_module("ipfsfuse.api.filesystem"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
