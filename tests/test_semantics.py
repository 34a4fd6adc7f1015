"""docs/SEMANTICS.md matches the suite: every statement names a test, and every named test exists."""

import re
from pathlib import Path

TOP = Path(__file__).parents[1]
PAGE = (TOP / "docs" / "SEMANTICS.md").read_text()


def statements() -> list[str]:
    """The bullets, and the rows of the table of errors."""
    lines = PAGE.splitlines()
    errors = PAGE[PAGE.index("## Errors") : PAGE.index("## Answers in C")].splitlines()
    return [line for line in lines if line.startswith("- ")] + [
        line for line in errors if line.startswith("| E")
    ]


def test_every_statement_names_its_test() -> None:
    assert [line for line in statements() if not re.search(r"`test_\w+`", line)] == []


def test_every_named_test_exists() -> None:
    suite = "\n".join(path.read_text() for path in (TOP / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert sorted(name for name in named if f"def {name}(" not in suite) == []
    assert len(named) > 40
