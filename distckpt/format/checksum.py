"""The sums of the format: one of every block of a data file, a stronger one of what stands above the blocks.

Chain: commit.json ends in its own digest -> names each data file's digest (over header and checksum table) -> the
table holds the sum of each 1 MiB block from byte 0 of the file. Against accidents CRC-32C and BLAKE2b-128; against
people, in signed checkpoints, SHA-256 for both: a CRC can be forged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

BLOCK = 1 << 20
"""Bytes of a block: the unit of checksum, and so of reading."""

DIGEST_SIZE = 16
"""Bytes of what `digest` returns, before they are written as digits."""


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> bytes: ...


class _Crc:
    def __init__(self) -> None:
        self._crc = 0

    def update(self, data: memoryview, /) -> None:
        self._crc = crc32c(data, self._crc)

    def digest(self) -> bytes:
        return self._crc.to_bytes(4, "little")


@dataclass(frozen=True, slots=True)
class Algorithm:
    """How a checkpoint is summed: name in the checksum table, bytes of a block's sum, bytes of a digest."""

    name: str
    size: int
    digest_size: int
    _block: Callable[[], _Hash]
    _whole: Callable[[], _Hash]

    def sum_of(self, pieces: Iterable[memoryview]) -> bytes:
        """Sum of one block, given in pieces."""
        state = self._block()
        for piece in pieces:
            state.update(piece)
        return state.digest()

    def digest(self, *pieces: bytes | memoryview) -> str:
        """Digest over the pieces in order, in hexadecimal digits."""
        state = self._whole()
        for piece in pieces:
            state.update(memoryview(piece))
        return state.digest().hex()

    def blocks(self) -> BlockSums:
        """Begin to sum a stream."""
        return BlockSums(self._block)


CRC32C = Algorithm("crc32c", 4, DIGEST_SIZE, _Crc, lambda: hashlib.blake2b(digest_size=DIGEST_SIZE))
SHA256 = Algorithm("sha256", 32, 32, hashlib.sha256, hashlib.sha256)
_BY_DIGITS = {2 * a.digest_size: a for a in (CRC32C, SHA256)}


def algorithm_of(digest: str) -> Algorithm | None:
    """Whose digest this is, which its length tells. What it is the digest of is summed by the same."""
    return _BY_DIGITS.get(len(digest))


def matches(digest: str, *pieces: bytes | memoryview) -> bool:
    """Whether the pieces have this digest."""
    algorithm = algorithm_of(digest)
    return algorithm is not None and algorithm.digest(*pieces) == digest


def digest(*pieces: bytes | memoryview) -> str:
    """BLAKE2b-128 over the pieces in order, 32 hexadecimal digits."""
    return CRC32C.digest(*pieces)


class BlockSums:
    """Sum of each block of a stream, fed in pieces of any length, in order."""

    def __init__(self, block: Callable[[], _Hash]) -> None:
        self._sums = bytearray()
        self._block, self._state = block, block()
        self._filled = 0

    def feed(self, data: memoryview) -> None:
        """Continue the stream with `data` (bytes, contiguous)."""
        start = 0
        while start < len(data):
            piece = data[start : start + BLOCK - self._filled]
            self._state.update(piece)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self._sums += self._state.digest()
        self._state, self._filled = self._block(), 0

    def finish(self) -> bytes:
        """Return the sums, one after another; the last block may be short."""
        if self._filled:
            self._close()
        return bytes(self._sums)


def crc_of(pieces: Iterable[memoryview]) -> int:
    """CRC-32C over the pieces in order."""
    crc = 0
    for piece in pieces:
        crc = crc32c(piece, crc)
    return crc
