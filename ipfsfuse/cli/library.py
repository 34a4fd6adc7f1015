"""`ipfsfuse library` and `rm`: what lies in the embedded library."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ipfsfuse.cli import folders, units
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.sources.files.library import Library


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[Library]:
    library = Library(folders.library(arguments.library))
    try:
        yield library
    finally:
        library.close()


def show(arguments: argparse.Namespace) -> int:
    with opened(arguments) as library:
        if arguments.compact:
            library.compact()
        entries = library.entries()
    if arguments.json:
        rows = [{"cid": cids.text(each.cid), "name": each.name, "size": each.size, "added": each.added} for each in entries]
        print(json.dumps(rows, indent=2))
        return 0
    for each in entries:
        added = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.added))
        print(f"{cids.text(each.cid)}  {units.human(each.size):>10}  {added}  {each.name}")
    return 0


def remove(arguments: argparse.Namespace) -> int:
    cid = cid_alone(arguments.cid)
    with opened(arguments) as library:
        entry = library.remove(cid)
    print(f"removed {cids.text(entry.cid)} {entry.name}")
    return 0
