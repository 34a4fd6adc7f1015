"""A CAR stream, version 1 or 2, taken apart as it comes.

Pure: who reads the stream feeds it. Not for several tasks at once. Holds at most one section and what was fed
last.
"""

from collections.abc import Iterator

from ipfsfuse.dag import car
from ipfsfuse.dag.cid import Cid
from ipfsfuse.errors import Malformed

_MIN_HEADER = len(car.encode_header(()))


class Parser:
    """`feed` it bytes and take the blocks that they complete; `finish` tells whether the stream ended where
    it may."""

    def __init__(self) -> None:
        self.roots: tuple[Cid, ...] | None = None
        """None until the header has come."""
        self._buffer = bytearray()
        self._need = _MIN_HEADER
        """Nothing can be done before the buffer holds so much."""
        self._padded = False
        """Whether the zeros have begun that may stand behind the last section."""
        self._skip = 0
        self._left: int | None = None
        """Bytes of CAR data still to come; known for version 2 alone, where what is behind them is
        ignored."""

    def feed(self, data: bytes) -> Iterator[tuple[Cid, bytes]]:
        """The blocks that `data` completes, unverified. To be consumed before the next is fed. Raises
        Malformed."""
        self._buffer += data
        while len(self._buffer) >= self._need:
            if self._skip:
                self._drop_padding()
            elif self.roots is None:
                self._header()
            elif self._left == 0:
                self._buffer.clear()
            elif self._padded or self._buffer[0] == 0:
                self._drop_zeros()
            else:
                found = self._section()
                if found is not None:
                    yield found

    def finish(self) -> None:
        """The stream has ended. Raises Malformed if that was inside of something."""
        if self.roots is None or (self._buffer and self._left != 0) or (self._left and not self._padded):
            raise Malformed("the CAR stream is cut short")

    def _drop_padding(self) -> None:
        dropped = min(self._skip, len(self._buffer))
        del self._buffer[:dropped]
        self._skip -= dropped
        self._need = 1 if self._skip else _MIN_HEADER

    def _drop_zeros(self) -> None:
        """A section of no bytes ends the CAR: what is behind it is padding. Source: go-car's
        ZeroLengthSectionAsEOF."""
        count = len(self._buffer) if self._left is None else min(self._left, len(self._buffer))
        if self._buffer.count(0, 0, count) != count:
            raise Malformed("the CAR has something behind the zeros that end it")
        self._padded = True
        self._take(count)

    def _header(self) -> None:
        if self._left is None and car.is_v2(bytes(self._buffer[: len(car.PRAGMA)])):
            if not self._has(car.V2_BYTES):
                return
            frame = car.decode_v2(bytes(self._buffer[: car.V2_BYTES]))
            self._skip, self._left = frame.data_offset, frame.data_size
            return
        length = car.header_length(bytes(self._buffer[:9]), car.MAX_STREAM_HEADER)
        if self._has(length):
            self.roots = car.decode_header(self._take(length))

    def _section(self) -> tuple[Cid, bytes] | None:
        head = bytes(self._buffer[: car.HEAD_BYTES])
        if len(head) < car.HEAD_BYTES and not self._has(_announced(head)):
            # a head that is cut short looks like a broken one: wait for the whole section, it is short too
            return None
        found = car.section(head, 0)
        if not self._has(found.end):
            return None
        return found.cid, self._take(found.end)[found.block :]

    def _has(self, need: int) -> bool:
        self._need = need
        return len(self._buffer) >= need

    def _take(self, length: int) -> bytes:
        if self._left is not None:
            self._left -= length
            if self._left < 0:
                raise Malformed("the CAR's data ends inside a section")
        taken = bytes(memoryview(self._buffer)[:length])
        del self._buffer[:length]
        self._need = 1
        return taken


def _announced(head: bytes) -> int:
    """How many bytes the section that `head` begins has, or one more than there are where its length is not
    whole."""
    if len(head) < 9 and all(byte & 0x80 for byte in head):
        return len(head) + 1
    return car.section_length(head)
