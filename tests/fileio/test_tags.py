"""Tags, compared with the same polynomial computed in Python's integers."""

import random

import pytest

from ipfsfuse.fileio.tags import KEY, TAG_BYTES, tags_of

PRIME = (1 << 130) - 5
CLAMP = 0x0FFFFFFC0FFFFFFC0FFFFFFC0FFFFFFF


def tag_of(content: bytes) -> int:
    point, last = (int.from_bytes(KEY[at : at + 16], "little") & CLAMP for at in (0, 16))
    content += bytes(-len(content) % 32)
    sums = [0, 0]
    for at in range(0, len(content), 16):
        word = int.from_bytes(content[at : at + 16], "little") + (1 << 128)
        sums[at // 16 % 2] = (sums[at // 16 % 2] + word) * point % PRIME
    return (sums[0] * last + sums[1]) * last % PRIME


@pytest.mark.parametrize("seed", range(3))
def test_a_tag_is_the_polynomial_at_a_secret_point(seed: int) -> None:
    """C keeps the low 128 bits of a sum that may be larger than the remainder by a few times the prime."""
    dice = random.Random(seed)
    for _ in range(200):
        content = dice.randbytes(size := dice.choice([0, 1, 15, 16, 31, 32, 33, 1000, 8192]))
        if dice.random() < 0.2:
            content = b"\xff" * size
        piece = dice.choice([32, 100, 8192])
        tags = tags_of(bytearray(content) if seed and size else content, piece)
        assert len(tags) == -(-size // piece) * TAG_BYTES
        for number, at in enumerate(range(0, size, piece)):
            tag = int.from_bytes(tags[number * TAG_BYTES : (number + 1) * TAG_BYTES], "little")
            whole = tag_of(content[at : at + piece])
            assert tag in {(whole + times * PRIME) % (1 << 128) for times in range(3)}


def test_a_change_of_any_byte_changes_the_tag() -> None:
    content = bytes(8192)
    seen = {tags_of(content, 8192)}
    for at in range(8192):
        seen.add(tags_of(content[:at] + b"\1" + content[at + 1 :], 8192))
    assert len(seen) == 8193
