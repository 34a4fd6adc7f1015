"""The library's commands: `add`, `import`, `rm`, `library` and `fsck --library`."""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ipfsfuse import units
from ipfsfuse.cli import console, folders
from ipfsfuse.cli.console import ProgressBar
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import PROFILES
from ipfsfuse.dag.path import cid_alone
from ipfsfuse.errors import UsageError
from ipfsfuse.importer import cars
from ipfsfuse.importer.add import AddOptions
from ipfsfuse.importer.add import add as add_all
from ipfsfuse.sources.local.library import Library


def add(arguments: argparse.Namespace) -> int:
    options = AddOptions(
        profile=PROFILES[_profile(arguments)],
        wrap=arguments.wrap_with_directory,
        hidden=arguments.hidden,
        preserve_mode=arguments.preserve_mode,
        preserve_mtime=arguments.preserve_mtime,
    )
    rows: list[dict[str, str]] = []
    with ExitStack() as exits:
        progress = exits.enter_context(ProgressBar("adding"))
        library = None if arguments.only_hash else exits.enter_context(open_library(arguments))
        for added in add_all(arguments.paths, options, library, progress):
            if arguments.quieter:
                rows.clear()
            rows.append({"cid": cids.text(added.cid), "name": added.name})
            if not arguments.json and not arguments.quieter:
                cid = cids.text(added.cid)
                progress.line((cid if arguments.quiet else f"added {cid} {added.name}").rstrip())
    return console.answer(arguments, rows, *(row["cid"] for row in rows if arguments.quieter))


def _profile(arguments: argparse.Namespace) -> str:
    """The name of the profile, from --profile or --cid-version. An argument takes precedence over a setting.

    Raises UsageError if they contradict each other."""
    profile: str = arguments.profile
    if arguments.cid_version is None:
        return profile
    named = CID_VERSIONS[arguments.cid_version]
    given = {name for name in ("profile", "cid-version") if arguments.origins[name] == "argument"}
    if len(given) == 2 and named != profile:
        raise UsageError(
            f"--cid-version {arguments.cid_version} is the profile {named}, not {profile}: give one of both"
        )
    return profile if given == {"profile"} else named


CID_VERSIONS = ("unixfs-v0-2015", "unixfs-v1-2025")
"""The profile by the version of its CIDs."""


@contextmanager
def open_library(arguments: argparse.Namespace) -> Iterator[Library]:
    library = Library(folders.library(arguments.library))
    try:
        yield library
    finally:
        library.close()


def import_cars(arguments: argparse.Namespace) -> int:
    rows = []
    with ProgressBar("importing") as progress, open_library(arguments) as library:
        for file in arguments.files:
            for root in cars.import_car(Path(file), library, progress):
                rows.append({"cid": cids.text(root.cid), "name": root.name, "file": file})
                if not arguments.json:
                    progress.line(f"imported {cids.text(root.cid)} {root.name}")
    if arguments.json:
        console.values(rows)
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Hashes all blocks of the library or a CAR file. Returns 1 if a block is missing or wrong."""
    with ExitStack() as exits:
        progress = exits.enter_context(ProgressBar("checking"))
        if arguments.file is not None:
            what, damage = arguments.file, cars.car_damage(Path(arguments.file), progress)
        else:
            library = exits.enter_context(open_library(arguments))
            what, damage = library.folder, cars.library_damage(library, progress)
        found = []
        for path, reason in damage:
            found.append({"path": path, "reason": reason})
            if not arguments.json:
                progress.line(f"damaged: {path}: {reason}")
    console.answer(
        arguments, {"damaged": found}, *([] if found else [f"every block of {what} is there and right"])
    )
    return 1 if found else 0


def show(arguments: argparse.Namespace) -> int:
    with open_library(arguments) as library:
        if arguments.compact:
            library.compact()
        entries = library.entries()
    rows = [
        {
            "cid": cids.text(each.cid),
            "name": each.name,
            "size": each.size,
            "added": units.timestamp(each.added),
        }
        for each in entries
    ]
    lines = []
    for each in entries:
        added = console.local_time(units.timestamp(each.added))
        lines.append(f"{cids.text(each.cid)}  {units.human(each.size):>10}  {added}  {each.name}")
    return console.answer(arguments, rows, *lines)


def remove(arguments: argparse.Namespace) -> int:
    cid = cid_alone(arguments.cid)
    with open_library(arguments) as library:
        entry = library.remove(cid)
    removed = cids.text(entry.cid)
    return console.answer(
        arguments, {"removed": removed, "name": entry.name}, f"removed {removed} {entry.name}"
    )
