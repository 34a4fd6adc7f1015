"""Compares two results of `scripts/bench mount --json`.

    scripts/bench compare BEFORE.json AFTER.json

For each row and way: the ratio to the way that the row is measured against, before and after, and how many
times as fast it is now by that ratio. Seconds of two runs compare two machines, or two moments of one; ratios
are taken within one run. Rows and ways that only one of the two has are named at the end.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.benches import _table

Measured = Mapping[tuple[str, str], Mapping[str, Any]]
"""By row and way."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench compare")
    parser.add_argument("before", metavar="BEFORE.json", type=Path)
    parser.add_argument("after", metavar="AFTER.json", type=Path)
    options = parser.parse_args()
    try:
        before, after = measured(options.before), measured(options.after)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        print(f"scripts/bench compare: not a result of scripts/bench mount --json: {exc}", file=sys.stderr)
        return 1
    print(compared(before, after))
    return 0


def measured(path: Path) -> Measured:
    """Raises OSError, ValueError, KeyError, TypeError where `path` is not a result."""
    document = json.loads(path.read_text())
    return {(row["row"], way): of for row in document["rows"] for way, of in row["ways"].items()}


def compared(before: Measured, after: Measured) -> str:
    lines = []
    for key in (key for key in before if key in after):
        ratios = [each[key]["ratio"] for each in (before, after)]
        seconds = [f"{each[key]['seconds']:.4g}" for each in (before, after)]
        if None in ratios:
            lines.append([*key, "", "", "", *seconds])
        else:
            lines.append(
                [*key, f"{ratios[0]:.2f}x", f"{ratios[1]:.2f}x", f"{ratios[1] / ratios[0]:.2f}x", *seconds]
            )
    head = ["row", "way", "ratio before", "after", "change", "seconds before", "after"]
    alone = [
        f"only {where}: {row} {way}"
        for where, some, other in (("before", before, after), ("after", after, before))
        for row, way in some
        if (row, way) not in other
    ]
    return "\n".join([_table.markdown(head, lines), *alone])
