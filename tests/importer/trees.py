"""Trees to add, made from a description: their bytes are the same on every machine.

A tree is a dict of names to entries. `CASES` are the trees whose CIDs Kubo gave (data/kubo-cids.json, written
by `python -m tests.importer.record`): sizes around each chunk and fan-out boundary, directories around the
threshold, names.
"""

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ipfsfuse.dag.builder import PROFILES, Profile


@dataclass(frozen=True)
class Bytes:
    """A file of `size` bytes: random bytes by `seed`, or zeros (a sparse file) if `seed` is None."""

    size: int
    seed: int | None = 1
    mode: int | None = None
    mtime: int | None = None

    def read(self) -> bytes:
        return bytes(self.size) if self.seed is None else random.Random(self.seed).randbytes(self.size)


@dataclass(frozen=True)
class To:
    """A symlink."""

    target: str
    mtime: int | None = None


@dataclass(frozen=True)
class Dir:
    entries: Mapping[str, "Entry"] = field(default_factory=dict)
    mode: int | None = None
    mtime: int | None = None


Entry = Bytes | To | Dir


@dataclass(frozen=True)
class Case:
    """A tree, and the profile and the options with which `ipfs add` adds it."""

    name: str
    profile: Profile
    top: Mapping[str, Entry]
    """The PATHs, in one folder."""
    options: tuple[str, ...] = ()
    large: bool = False
    """Too large to be written to disk in every run of the tests. Only `tests.importer.pure` gets it."""
    only_root: bool = False
    """Only root can read the files."""


def write(entry: Entry, path: Path) -> None:
    """Makes `entry` on disk."""
    if isinstance(entry, To):
        path.symlink_to(entry.target)
    elif isinstance(entry, Bytes):
        with open(path, "wb") as out:
            out.truncate(entry.size) if entry.seed is None else out.write(entry.read())
    else:
        path.mkdir()
        for name, child in entry.entries.items():
            write(child, path / name)
    if not isinstance(entry, To) and entry.mode is not None:
        path.chmod(entry.mode)
    if entry.mtime is not None:
        os.utime(path, ns=(entry.mtime, entry.mtime), follow_symlinks=False)


EMPTY = Bytes(0)
NEW_YEAR = 1_700_000_000_123_456_789


def deep(levels: int) -> Dir:
    tree = Dir({"bottom": Bytes(10)})
    for level in range(levels):
        tree = Dir({f"level {level}": tree, "beside": Bytes(level)})
    return tree


def many(count: int, template: str = "entry {}") -> Dir:
    return Dir({template.format(index): EMPTY for index in range(count)})


def at_threshold(profile: Profile, over: int) -> Dir:
    """A directory of empty files. Its size, by the estimate of the profile, is the threshold plus `over`."""
    # 4 bytes of data, 145 bytes for a link with a name of 100 bytes, and 125 for one with a name of 81
    if profile.estimate == "block":
        count, last = 1807, 81
    else:  # the name and the CID of a link: 134 bytes, and 34 + 6 for the last one
        count, last = 1956, 6
    entries: dict[str, Entry] = {f"{index:0100}": EMPTY for index in range(count)}
    return Dir(entries | {"x" * (last + over): EMPTY})


NAMES = [
    "plain", "with space", "UPPER", "upper", "a", "aa", "a.b", "a-b", "a0", "ä", "ÄÖÜ", "e\u0301", "é", "日本語", "🦊", "ﬀ",
    "\u202eright to left", "new\nline", "tab\t", "back\\slash", "quote\"'", "%41", "\u00ff", "\ud7ff", "\ue000", "\U0010ffff",
    "x" * 255, "é" * 127 + "x", "🦊" * 63 + "abc", "~", "-", "--help", "...", "..a", "\x7f", "\x01",
]  # fmt: skip

LINKS: dict[str, Entry] = {
    "file": Bytes(5),
    "to file": To("file"),
    "dangling": To("no/such/thing"),
    "absolute": To("/etc/passwd"),
    "loop": To("loop"),
    "up": To(".."),
    "unicode": To("日本語/é"),
    "long": To("x/" * 2000),
    "sub": Dir({"back": To("../file"), "to dir": To("."), "deeper": Dir({"far": To("../../sub/back")})}),
}

HIDDEN = Dir(
    {
        ".hidden": Bytes(3),
        "seen": Bytes(4),
        "sub": Dir({".also": Dir({"in it": EMPTY}), "x": EMPTY}),
        "only hidden": Dir({".a": EMPTY}),
    }
)


def _files(profile: Profile) -> Iterator[Case]:
    chunk, links = profile.chunk_size, profile.file_links
    for size in (0, 1, 100, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 5):
        yield Case(f"file of {size}", profile, {"file": Bytes(size)})
    for count, more in (
        (1, 0),
        (links - 1, 1),
        (links, 0),
        (links, 1),
        (links + 1, 0),
        (2 * links, 0),
        (2 * links, 1),
    ):
        yield Case(
            f"zeros, {count} chunks and {more}",
            profile,
            {"zeros": Bytes(count * chunk + more, None)},
            large=count > 1,
        )
    if links == 174:
        for more in (0, 1):
            yield Case(
                f"zeros, 174 x 174 chunks and {more}",
                profile,
                {"zeros": Bytes(links * links * chunk + more, None)},
                large=True,
            )


def _directories(profile: Profile) -> Iterator[Case]:
    yield Case("empty directory", profile, {"empty": Dir()})
    yield Case("empty directories", profile, {"outer": Dir({"a": Dir(), "b": Dir({"c": Dir()})})})
    yield Case(
        "names", profile, {"names": Dir({name: Bytes(index) for index, name in enumerate(NAMES)})}, ("-H",)
    )
    yield Case("links", profile, {"links": Dir(LINKS)})
    yield Case("a link alone", profile, {"link": To("no/such/thing")})
    yield Case("deep", profile, {"deep": deep(60)})
    yield Case(
        "large and small",
        profile,
        {"mixed": Dir({"large": Bytes(3 * profile.chunk_size + 1), "small": Bytes(10), "same": Bytes(10)})},
    )
    for over in (-1, 0, 1):
        yield Case(f"threshold {over:+}", profile, {"wide": at_threshold(profile, over)}, large=over < 0)
    yield Case(
        "sharded, names of all lengths",
        profile,
        {"wide": Dir({"x" * (1 + index % 200) + str(index): EMPTY for index in range(3000)})},
    )
    yield Case(
        "sharded, with directories",
        profile,
        {"wide": Dir({f"directory {i:0150}": Dir({"x": Bytes(i)}) for i in range(1500)})},
    )
    yield Case("50,000 entries", profile, {"wide": many(50_000)}, large=True)


def _options(profile: Profile) -> Iterator[Case]:
    yield Case("hidden left out", profile, {"tree": HIDDEN})
    yield Case("hidden taken", profile, {"tree": HIDDEN}, ("-H",))
    yield Case("wrapped file", profile, {"file": Bytes(10)}, ("-w",))
    yield Case("wrapped directory", profile, {"tree": HIDDEN}, ("-w",))
    yield Case("wrapped together", profile, {"a": Bytes(10), "b": Dir({"c": EMPTY}), "z": Bytes(3)}, ("-w",))
    kept: dict[str, Entry] = {
        "small": Bytes(10, 1, 0o640, NEW_YEAR),
        "empty": Bytes(0, 1, 0o4755, 0),
        "whole seconds": Bytes(5, 1, 0o600, 1_600_000_000_000_000_000),
        "before 1970": Bytes(5, 1, 0o644, -1_500_000_000),
        "large": Bytes(2 * profile.chunk_size + 7, 1, 0o444, NEW_YEAR),
        "no mode": Bytes(7, 1, 0o000, NEW_YEAR),
        "link": To("small", NEW_YEAR),
        "sub": Dir({"x": Bytes(1, 1, 0o777, NEW_YEAR)}, 0o700, NEW_YEAR),
    }
    mode, mtime = "--preserve-mode", "--preserve-mtime"
    for options in ((mode,), (mtime,), (mode, mtime), (mode, mtime, "-w")):
        yield Case(f"kept {' '.join(options)}", profile, {"tree": Dir(kept, 0o750, NEW_YEAR)}, options)
    wide = {f"{index:0100}": Bytes(0, 1, 0o644, NEW_YEAR) for index in range(2000)}
    yield Case("kept, sharded", profile, {"wide": Dir(wide, 0o711, NEW_YEAR)}, (mode, mtime))
    closed = Dir(
        {"file": Bytes(7, 1, 0o000, NEW_YEAR), "empty": Dir({}, 0, NEW_YEAR), "wide": Dir(wide, 0, NEW_YEAR)},
        0,
        NEW_YEAR,
    )
    for options in ((mode,), (mode, mtime)):
        yield Case(f"mode 0 {' '.join(options)}", profile, {"closed": closed}, options, only_root=True)


CASES = {
    (profile.name, case.name): case
    for profile in PROFILES.values()
    for make in (_files, _directories, _options)
    for case in make(profile)
}
