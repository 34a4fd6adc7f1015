"""Takes files, folders and CAR files into the library, writes DAGs to CAR files and to nodes, and
checks what is there."""

from ipfsfuse.importer.add import Added, AddOptions, AddProgress, add
from ipfsfuse.importer.cars import (
    GetBlock,
    car_damage,
    content,
    export,
    export_to_stream,
    import_car,
    library_damage,
    verified,
)
from ipfsfuse.importer.push import push

__all__ = [
    "AddOptions",
    "AddProgress",
    "Added",
    "GetBlock",
    "add",
    "car_damage",
    "content",
    "export",
    "export_to_stream",
    "import_car",
    "library_damage",
    "push",
    "verified",
]
