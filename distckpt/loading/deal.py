"""Who reads the blocks that several ranks need, told by each rank without asking; and whether sharing pays. Pure."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from distckpt.format.checksum import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

ROUND = 64 << 20
"""Bytes that all ranks together read in one round, give or take a unit each: what a rank may have to send, or to
receive, at once."""
UNIT = 8
"""Blocks that are read at once, at most: a few reads of each rank are in flight."""
WASTE = 1.03
"""Bytes read over bytes needed from which blocks are shared: parts of a block are asked for here and there."""
REPLICAS = 8
"""Ranks that need the same from which it is read once. Fewer are served sooner by the page cache of a disk, or by a
file server twice, than by each other: over gloo a byte takes 5 to 10 times as long as from memory."""

_AMOUNT = struct.Struct("<3Q")


class Amount(NamedTuple):
    """Bytes that a rank would read alone, that it needs of them, and of the whole tensors that it needs parts of."""

    read: int
    needed: int
    whole: int

    def encode(self) -> bytes:
        """As it is told to other ranks."""
        return _AMOUNT.pack(*self)

    @staticmethod
    def decode(data: bytes) -> Amount:
        """Amount that `encode` wrote."""
        return Amount(*_AMOUNT.unpack(data))


def pays(amounts: Sequence[Amount]) -> bool:
    """Whether ranks should read for each other."""
    read, needed = sum(a.read for a in amounts), sum(a.needed for a in amounts)
    whole = max(a.whole for a in amounts)
    return len(amounts) > 1 and (read > WASTE * needed or needed >= REPLICAS * whole > 0)


class Unit(NamedTuple):
    """Blocks [first, stop) of a file, read by one rank in one round."""

    file: int
    first: int
    stop: int
    reader: int
    round: int


def deal(stretches: Sequence[Iterable[tuple[int, int, int]]]) -> list[Unit]:
    """Deal out the blocks that several ranks need: `stretches` is by rank (file, first block, block after the last).

    Each is read by a rank that needs it itself, in order, the one that has read least so far.
    """
    share = max(1, ROUND // BLOCK // len(stretches))
    most = min(UNIT, share)
    taken = [0] * len(stretches)
    units = []
    for file, first, stop, ranks in _common(stretches):
        for at in range(first, stop, most):
            end = min(stop, at + most)
            reader = min(ranks, key=lambda r: (taken[r], r))
            units.append(Unit(file, at, end, reader, taken[reader] // share))
            taken[reader] += end - at
    return units


def _common(stretches: Sequence[Iterable[tuple[int, int, int]]]) -> Iterator[tuple[int, int, int, list[int]]]:
    """Yield (file, first block, block after the last, ranks) of what more than one rank needs, in order."""
    ends = []
    for rank, of_rank in enumerate(stretches):
        for file, first, stop in of_rank:
            ends += [(file, first, 1, rank), (file, stop, 0, rank)]
    ends.sort()
    needing: set[int] = set()
    before = (0, 0)
    for file, block, opens, rank in ends:
        if len(needing) > 1 and (file, block) > before:
            yield file, before[1], block, sorted(needing)
        before = (file, block)
        (needing.add if opens else needing.discard)(rank)
