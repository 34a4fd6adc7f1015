"""docs/ARCHITECTURE.md is up to date: each module is in its map, and each name in it exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
MODULES = [path for top in ("ipfsfuse", "runner/ipfsfuse_run") for path in (ROOT / top).rglob("*.py")]
FILE = re.compile(r"\.(py|c|h|yml|txt)$")
SOURCES = [*MODULES, *(ROOT / "ipfsfuse").rglob("*.[ch]")]


def test_each_module_is_in_the_map() -> None:
    named = set(re.findall(r"\w+", PAGE))
    assert [path.stem for path in MODULES if path.stem not in named and not path.stem.startswith("__")] == []


def test_each_name_in_the_page_exists() -> None:
    """Names in backticks: `Class`, `Class.method`, `module.function`, `_private`."""
    names = {name for name in re.findall(r"`((?:\w+\.)*\w+)`", PAGE) if not FILE.search(name)}
    text = "\n".join(path.read_text() for path in SOURCES)
    known = set(re.findall(r"\w+", text)) | {path.stem for path in SOURCES}
    defined = set(re.findall(r"(?:def|class) (\w+)|^\s*(?:self\.)?(\w+)(?:: .*)? = ", text, re.MULTILINE))
    defined_names = {name for pair in defined for name in pair} | {path.stem for path in SOURCES}
    missing = [name for name in names if not set(name.split(".")) <= known]
    assert missing == []
    ours = [name for name in names if re.match(r"_?[A-Z]|_", name.rpartition(".")[2]) or "." in name]
    assert [name for name in ours if name.rpartition(".")[2] not in defined_names] == []
