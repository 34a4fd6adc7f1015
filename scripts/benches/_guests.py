"""Makes guests for measurements: modules of any size that write a byte first."""

from collections.abc import Iterable

_I32_CONST, _CALL, _DROP, _LOCAL_GET, _END = b"\x41", b"\x10", b"\x1a", b"\x20", b"\x0b"
_ARITHMETIC = (b"\x6a", b"\x6b", b"\x6c", b"\x71", b"\x72", b"\x73")
"""add, sub, mul, and, or, xor of i32."""
_FUNCTION_BYTES = 1000


def large(size: int) -> bytes:
    """A preview 1 command of about `size` bytes, nearly all of them code: `_start` writes one byte and
    ends."""
    functions = size // _FUNCTION_BYTES
    types = [b"\x60\x04\x7f\x7f\x7f\x7f\x01\x7f", b"\x60\x00\x00", b"\x60\x01\x7f\x01\x7f"]
    write = (
        _I32_CONST
        + b"\x01"
        + _I32_CONST
        + b"\x00"
        + _I32_CONST
        + b"\x01"
        + _I32_CONST
        + b"\x10"
        + _CALL
        + b"\x00"
        + _DROP
    )
    sections = {
        1: _vector(types),
        2: _vector([_sized(b"wasi_snapshot_preview1") + _sized(b"fd_write") + b"\x00\x00"]),
        3: _vector([b"\x01"] + [b"\x02"] * functions),
        5: _vector([b"\x00\x01"]),
        7: _vector([_sized(b"memory") + b"\x02\x00", _sized(b"_start") + b"\x00\x01"]),
        10: _vector([_sized(b"\x00" + write + _END), *(_function(seed) for seed in range(functions))]),
        # one buffer: a byte at 32
        11: _vector([b"\x00" + _I32_CONST + b"\x00" + _END + _sized(b"\x20\0\0\0\x01\0\0\0")]),
    }
    return b"\0asm\1\0\0\0" + b"".join(
        bytes([number]) + _sized(content) for number, content in sections.items()
    )


def _function(seed: int) -> bytes:
    """Arithmetic on an argument, which a compiler can't compute in advance."""
    code = bytearray(b"\x00" + _LOCAL_GET + b"\x00")
    while len(code) < _FUNCTION_BYTES:
        seed = (seed * 1103515245 + 12345) & 0x7FFF_FFFF
        code += (
            _I32_CONST
            + bytes([0x80 | seed & 0x7F, 0x80 | seed >> 7 & 0x7F, seed >> 14 & 0x3F])
            + _ARITHMETIC[seed % 6]
        )
    return _sized(bytes(code) + _END)


def _vector(items: Iterable[bytes]) -> bytes:
    items = list(items)
    return _number(len(items)) + b"".join(items)


def _sized(content: bytes) -> bytes:
    return _number(len(content)) + content


def _number(value: int) -> bytes:
    """LEB128."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
