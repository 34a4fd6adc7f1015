"""Files and folders into the library, and DAGs out of it: `add` and `export`."""

from ipfsfuse.adding.exporting import export
from ipfsfuse.adding.importing import Added, AddOptions, AddProgress, add

__all__ = ["AddOptions", "AddProgress", "Added", "add", "export"]
