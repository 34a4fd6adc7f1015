"""The program from which componentize-py makes a component. It reads, lists, and tries every call that would
change something, by Python's own functions and by the descriptors of wasi:filesystem. It prints each result
as one JSON object on a line.

Usage: component look DIR FILE | try DIR FILE | chance | exit CODE | fail; DIR is below /ipfs, FILE in DIR,
which also holds `dir` and `other`.
"""

import json
import os
import sys
import time

from componentize_py_types import Err
from wit_world import exports
from wit_world.imports import exit as leaving
from wit_world.imports import preopens
from wit_world.imports.types import DescriptorFlags, NewTimestamp_Now, OpenFlags, PathFlags

FOLLOW, READ, WRITE = PathFlags.SYMLINK_FOLLOW, DescriptorFlags.READ, DescriptorFlags.WRITE
NOW = NewTimestamp_Now()


def told(**found):
    print(json.dumps(found), flush=True)


def look(folder, file):
    with open(os.path.join(folder, file), encoding="utf-8") as opened:
        content = opened.read()
    told(
        content=content,
        size=os.stat(os.path.join(folder, file)).st_size,
        names=sorted(os.listdir(folder)),
        root=sorted(os.listdir("/")),
    )


def attempt(kind, calls):
    for name, call in calls.items():
        try:
            call()
            came = "done"
        except OSError as exc:
            came = exc.errno
        except Err as exc:
            came = exc.value.name
        told(kind=kind, call=name, came=came)


def by_python(folder, file):
    path, new, below = os.path.join(folder, file), os.path.join(folder, "new"), os.path.join(folder, "dir")
    modes = {
        f"open {mode}": lambda mode=mode, at=at: open(at, mode).close()
        for mode, at in (("w", path), ("a", path), ("r+", path), ("x", new))
    }
    attempt(
        "python",
        modes
        | {
            "mkdir": lambda: os.mkdir(new),
            "rmdir": lambda: os.rmdir(below),
            "unlink": lambda: os.unlink(path),
            "rename": lambda: os.rename(path, new),
            "replace": lambda: os.replace(path, os.path.join(folder, "other")),
            "link": lambda: os.link(path, new),
            "symlink": lambda: os.symlink(file, new),
            "utime": lambda: os.utime(path),
            "truncate": lambda: os.truncate(path, 0),
        },
    )


def by_descriptors(folder, file):
    """`top` is the folder, `one` the file opened for reading."""
    ipfs = next(opened for opened, name in preopens.get_directories() if name == "/ipfs")
    top = ipfs.open_at(FOLLOW, folder.removeprefix("/ipfs/"), OpenFlags.DIRECTORY, READ)
    one = top.open_at(FOLLOW, file, OpenFlags(0), READ)
    attempt(
        "descriptors",
        {
            "open-at to write": lambda: top.open_at(FOLLOW, file, OpenFlags(0), READ | WRITE),
            "open-at to create": lambda: top.open_at(FOLLOW, "new", OpenFlags.CREATE, READ),
            "open-at to truncate": lambda: top.open_at(FOLLOW, file, OpenFlags.TRUNCATE, WRITE),
            "create-directory-at": lambda: top.create_directory_at("new"),
            "remove-directory-at": lambda: top.remove_directory_at("dir"),
            "unlink-file-at": lambda: top.unlink_file_at(file),
            "rename-at": lambda: top.rename_at(file, top, "new"),
            "link-at": lambda: top.link_at(PathFlags(0), file, top, "new"),
            "symlink-at": lambda: top.symlink_at(file, "new"),
            "set-times-at": lambda: top.set_times_at(FOLLOW, file, NOW, NOW),
            "set-times": lambda: one.set_times(NOW, NOW),
            "set-size": lambda: one.set_size(0),
            "write": lambda: one.write(b"x", 0),
            "write-via-stream": lambda: one.write_via_stream(0),
            "append-via-stream": lambda: one.append_via_stream(),
        },
    )


class Run(exports.Run):
    def run(self) -> None:
        what, *args = sys.argv[1:]
        if what == "look":
            look(*args)
        elif what == "try":
            by_python(*args)
            by_descriptors(*args)
        elif what == "chance":
            told(wall=time.time_ns(), monotonic=time.monotonic_ns(), random=os.urandom(8).hex())
        elif what == "exit":
            leaving.exit_with_code(int(args[0]))
        else:
            raise Err(None)
