"""Imports local files and folders into the library (`add`), and exports DAGs to CAR files (`export`)."""

from ipfsfuse.importer.add import Added, AddOptions, AddProgress, add
from ipfsfuse.importer.export import GetBlock, export, export_to_stream

__all__ = ["AddOptions", "AddProgress", "Added", "GetBlock", "add", "export", "export_to_stream"]
