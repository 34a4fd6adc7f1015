"""Text from outside is shown on one line, without characters that a terminal acts on."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipfsfuse.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain name.txt", "plain name.txt"),
        ("ü 漢字 👩‍💻 שלום", "ü 漢字 👩‍💻 שלום"),
        ("\x1b[2Ja\nb\r\t\x07\x7f", "\\x1b[2Ja\\nb\\r\\t\\x07\\x7f"),
        ("\x9b31m\x85", "\\x9b31m\\x85"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("txt.\u202eexe\u2066\u200f\u061c", "txt.\\u202eexe\\u2066\\u200f\\u061c"),
        (b"\xff name".decode(errors="surrogateescape"), "\\xff name"),
        ("\ud83d", "\\ud83d"),
        ("", ""),
    ],
)
def test_printable_escapes_control_characters_and_keeps_the_rest(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_any_text_becomes_one_line_that_can_be_written(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(each) in ("Cc", "Zl", "Zp", "Cs") for each in shown)
    assert printable(shown) == shown
