"""SECURITY.md matches the suite: every promise names a test, and every named test exists."""

import re
from pathlib import Path

TOP = Path(__file__).parents[1]
PAGE = (TOP / "SECURITY.md").read_text()


def test_every_promise_names_its_test() -> None:
    promises = PAGE[PAGE.index("## Malicious content") : PAGE.index("## How to report")]
    bullets = re.findall(r"(?m)^- .*(?:\n  .*)*", promises)
    assert len(bullets) > 30
    assert [bullet for bullet in bullets if not re.search(r"`test_\w+`", bullet)] == []


def test_every_named_test_exists() -> None:
    suite = "\n".join(path.read_text() for path in (TOP / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert sorted(name for name in named if f"def {name}(" not in suite) == []
