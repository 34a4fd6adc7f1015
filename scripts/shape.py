"""Checks the shape of the code: no file of over 250 lines, no function of over 40, no silenced check without its reason."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE = 250
MAX_FUNCTION = 40
SILENCED = re.compile(r"#\s*(type: ignore|noqa)\S*\s*$|mark\.(xfail|skip)\b(?!if)(?!.*reason=)")


def findings(path: Path) -> Iterator[str]:
    text = path.read_text()
    lines = text.splitlines()
    if len(lines) > MAX_FILE:
        yield f"{path}: {len(lines)} lines, over {MAX_FILE}"
    for number, line in enumerate(lines, 1):
        if SILENCED.search(line):
            yield f"{path}:{number}: a silenced check without its reason"
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION}"


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "*.py"], capture_output=True, text=True, check=False).stdout.splitlines()
    paths = [Path(name) for name in listed] or [path for top in ("ipfsfuse", "runner", "scripts", "tests") for path in Path(top).rglob("*.py")]
    found = [finding for path in paths if path.exists() for finding in findings(path)]
    print("\n".join(found) or f"{len(paths)} files have the shape they should")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
