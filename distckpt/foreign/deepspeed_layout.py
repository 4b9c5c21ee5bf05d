"""Where parameters lie in ZeRO's flat buffers, in closed form: what reads a tag and what writes one agree on. Pure.

together   ZeRO-1, ZeRO-2, BF16_Optimizer: the parameters of a group one after another, then padding; cut evenly,
           rank r has elements [r * period, (r + 1) * period)
apart      ZeRO-3: each parameter is cut for itself into pieces of ceil(numel / ranks); a rank's buffer has its
           pieces of a sub-group, one after another
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.format.box import Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_ALIGNMENT = 2  # elements that each rank's part is a multiple of: nccl_start_alignment_factor


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements `run` of a parameter, which lie from `start` on in the flat buffer of a rank."""

    rank: int
    name: str
    run: Run
    start: int


def period_of(total: int, ranks: int) -> int:
    """Elements that each rank has of a group of `total`."""
    return -(-total // (_ALIGNMENT * ranks)) * _ALIGNMENT


def together(numels: Mapping[str, int], gaps: Sequence[int], period: int) -> Iterator[Piece]:
    """Pieces of a group, in order; `gaps`: padding behind each parameter."""
    offset = 0
    for (name, numel), gap in zip(numels.items(), gaps, strict=True):
        at = offset
        while at < offset + numel:
            rank = at // period
            stop = min(offset + numel, (rank + 1) * period)
            yield Piece(rank, name, Run(at - offset, stop - offset), at - rank * period)
            at = stop
        offset += numel + gap


def apart(numels: Mapping[str, int], ranks: int) -> Iterator[Piece]:
    """Pieces of a sub-group, parameter by parameter."""
    start = 0
    for name, numel in numels.items():
        length = piece_of(numel, ranks)
        for rank in range(-(-numel // length) if length else 0):
            yield Piece(rank, name, Run(rank * length, min((rank + 1) * length, numel)), start)
        start += length


def piece_of(numel: int, ranks: int) -> int:
    """Elements that each rank has room for, of a parameter cut for itself."""
    return -(-numel // ranks)


def apart_on(numels: Mapping[str, int], ranks: int, rank: int) -> Iterator[Piece]:
    """Pieces of a sub-group on one rank."""
    start = 0
    for name, numel in numels.items():
        length = piece_of(numel, ranks)
        if rank * length < numel:
            yield Piece(rank, name, Run(rank * length, min((rank + 1) * length, numel)), start)
        start += length


def sub_groups(numels: Mapping[str, int], ranks: int, most: int) -> list[list[str]]:
    """Parameters of each sub-group that ZeRO-3 makes of a group: one is closed once a rank's pieces reach `most`."""
    if sum(piece_of(n, ranks) for n in numels.values()) <= most:
        return [[*numels]]
    found: list[list[str]] = [[]]
    length = 0
    for name, numel in numels.items():
        found[-1].append(name)
        length += piece_of(numel, ranks)
        if length >= most:
            found.append([])
            length = 0
    return [names for names in found if names]


def round_robin(names: Sequence[str], ranks: int) -> list[str]:
    """Order in which `round_robin_gradients` lays a group out."""
    return [name for first in range(min(ranks, len(names))) for name in names[first::ranks]]


def before_round_robin(names: Sequence[str], ranks: int) -> list[str]:
    """Order of a group that `round_robin_gradients` laid out so."""
    places = round_robin([*map(str, range(len(names)))], ranks)
    return [name for _, name in sorted(zip(map(int, places), names, strict=True))]
