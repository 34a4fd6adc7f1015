"""`ipfsfuse add`: files and folders into the library, their CIDs printed as they are known."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from ipfsfuse import adding
from ipfsfuse.cli.library import opened
from ipfsfuse.cli.progress import Progress
from ipfsfuse.dag import cid as cids
from ipfsfuse.dag.builder import PROFILES
from ipfsfuse.sources.files.library import Library


def run(arguments: argparse.Namespace) -> int:
    options = adding.AddOptions(
        profile=PROFILES[arguments.profile],
        wrap=arguments.wrap_with_directory,
        hidden=arguments.hidden,
        preserve_mode=arguments.preserve_mode,
        preserve_mtime=arguments.preserve_mtime,
        only_hash=arguments.only_hash,
    )
    last = None
    with Progress("adding") as progress, _library(arguments) as library:

        def show(done: int, total: int | None, path: str) -> None:
            progress({"done": done, "total": total, "what": path})

        for last in adding.add(arguments.paths, options, library, show):
            if not arguments.quieter:
                progress.line(f"added {cids.text(last.cid)} {last.name}".rstrip())
    if arguments.quieter and last is not None:
        print(cids.text(last.cid))
    return 0


@contextmanager
def _library(arguments: argparse.Namespace) -> Iterator[Library | None]:
    if arguments.only_hash:
        yield None
    else:
        with opened(arguments) as library:
            yield library
