"""Makes foreign text (of file names, gateways, nodes, receipts) safe for terminals and logs. Pure."""

import re

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (C0, DEL, C1), characters that change the direction of writing (Unicode Standard Annex
9) or begin a new line, and halves of surrogate pairs, which can't be encoded."""
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: str) -> str:
    """`text` on one line. Characters that a terminal would act on are escaped: `\\x1b`, `\\n`, `\\u202e`.

    A byte that Python could not decode (a lone surrogate of `surrogateescape`) is shown as that byte:
    `\\xff`."""
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
