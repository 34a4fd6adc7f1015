"""Records a trace for `arc`: every open of a file below a folder, while a command and all that it starts run.

    python scripts/benches/trace.py FOLDER OUT COMMAND...

Needs strace. OUT holds one open a line, in order: a number for the file and, where it comes first, its size
in bytes.
"""

import argparse
import os
import re
import stat
import subprocess
import tempfile
from pathlib import Path

OPEN = re.compile(r'open(?:at)?\((?:[^,"]+, )?"[^"]*", [^)]*\) = \d+<(?P<path>[^>]+)>')


def opens(folder: Path, command: list[str]) -> list[Path]:
    """Each open of a regular file that succeeded."""
    with tempfile.NamedTemporaryFile() as log:
        subprocess.run(
            ["strace", "-f", "-qq", "-y", "-e", "trace=open,openat", "-o", log.name, *command], check=True
        )
        found = (
            OPEN.search(line) for line in Path(log.name).read_text(errors="surrogateescape").splitlines()
        )
    paths = (Path(match["path"]) for match in found if match)
    return [path for path in paths if path.is_relative_to(folder) and stat.S_ISREG(os.stat(path).st_mode)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="record every open below a folder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args(argv)
    numbers: dict[Path, int] = {}
    with arguments.out.open("w", encoding="ascii") as out:
        for path in opens(arguments.folder.resolve(), arguments.command):
            first = path not in numbers
            number = numbers.setdefault(path, len(numbers))
            out.write(f"{number} {os.stat(path).st_size}\n" if first else f"{number}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
