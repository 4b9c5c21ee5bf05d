"""The two sums of the format: CRC-32C of every block of a data file, BLAKE2b for what stands above them.

Chain: commit.json ends in its own digest -> names each data file's digest (over header and checksum table) -> the
table holds one CRC-32C for each 1 MiB block from byte 0 of the file.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterable

BLOCK = 1 << 20
"""Bytes of a block: the unit of checksum, and so of reading."""

DIGEST_SIZE = 16


def digest(*pieces: bytes | memoryview) -> str:
    """BLAKE2b-128 over the pieces in order, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


class BlockSums:
    """CRC-32C of each block of a stream, fed in pieces of any length, in order."""

    def __init__(self) -> None:
        self._sums = array("I")
        self._crc = 0
        self._filled = 0

    def feed(self, data: memoryview) -> None:
        """Continue the stream with `data` (bytes, contiguous)."""
        start = 0
        while start < len(data):
            piece = data[start : start + BLOCK - self._filled]
            self._crc = crc32c(piece, self._crc)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self._sums.append(self._crc)
        self._crc = self._filled = 0

    def finish(self) -> array[int]:
        """Return the sums; the last block may be short."""
        if self._filled:
            self._close()
        return self._sums


def crc_of(pieces: Iterable[memoryview]) -> int:
    """CRC-32C over the pieces in order."""
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return crc
