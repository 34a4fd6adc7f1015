"""Takes files, folders and CAR files into the library, writes DAGs to CAR files, and checks both."""

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
    "verified",
]
