"""Proof that a division of tensors over data files is whole: every byte written exactly once, every reader served.

A proof does not trust the closed forms that it is about: it asks ranks what they write, and adds up. Tensors that are
cut alike (`_alike`) are one kind, and each kind is proven once, whole: every chunk. What is a sample, from a fixed
seed, is

- of more than KINDS kinds (ZeRO-1, a cut a tensor): whether ranks far from a tensor's writers claim a part of it;
- of tensors of one kind (and of more than PAIRS cuts): that ranks write of each what they write of the kind;
- of more than 64 readers, or of more than PAIRS pairs of (cut, reader's layout): which are asked for.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, TypeVar

from distckpt.errors import FormatError
from distckpt.format.box import Box, Run, overlap_numel
from distckpt.format.partition import FlatEven, Grid, Pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.format.box import Region, Shape
    from distckpt.format.partition import Partition
    from distckpt.state import Layout

KINDS, PAIRS = 16, 2000
_ASKED = 4
"""Ranks that are asked of a tensor whose kind is proven, and readers of many, beside the first and the last."""

T = TypeVar("T")


class Uncovered(Exception):
    """Some byte is written twice or not at all, or a reader does not get what it asks for."""


def written_once(partitions: Mapping[str, Partition], world_size: int) -> int:
    """Uncovered unless the regions that all ranks write make up each tensor. Returns the count of chunks proven."""
    proven = 0
    named = {partition: fqn for fqn, partition in partitions.items()}
    kinds = {partition: _alike(partition) for partition in named}
    distinct = dict.fromkeys(kind for kind, _ in kinds.values())
    everyone = set(_some(distinct, KINDS))
    chunks = {kind: _proven(kind, world_size, everyone=kind in everyone) for kind in distinct}
    for partition in _some(kinds, PAIRS):
        _check_alike(named[partition], partition, *kinds[partition], world_size)
    for partition, tensors in Counter(partitions.values()).items():
        proven += tensors * chunks[kinds[partition][0]]
    return proven


def _alike(partition: Partition) -> tuple[Partition, int]:
    """Kind of a partition: from file 0 on, and without the dimensions that are not cut; and its first file."""
    if isinstance(partition, Grid):
        cut = [d for d, splits in enumerate(partition.splits) if splits]
        shape, splits = tuple(partition.shape[d] for d in cut), tuple(partition.splits[d] for d in cut)
        return Grid(shape, splits, 0), partition.first
    if isinstance(partition, FlatEven):
        before, offset = divmod(partition.offset, partition.period)
        kind = FlatEven((prod(partition.shape),), partition.period, offset, 0, partition.stride)
        return kind, partition.first + before * partition.stride
    return partition, 0


def _of_kind(region: Region, partition: Partition) -> Region:
    """Region of a partition's kind, for one of the partition itself."""
    if isinstance(region, Run) or not isinstance(partition, Grid):
        return region
    cut = [d for d, splits in enumerate(partition.splits) if splits]
    whole = [d for d in range(len(partition.shape)) if d not in cut]
    if any((region.offsets[d], region.sizes[d]) != (0, partition.shape[d]) for d in whole):
        raise Uncovered(f"{region} is cut along a dimension that {partition} does not cut")
    return Box(tuple(region.offsets[d] for d in cut), tuple(region.sizes[d] for d in cut))


@lru_cache(maxsize=256)
def _proven(kind: Partition, world_size: int, *, everyone: bool) -> int:
    """Chunks of a kind. everyone: ask all ranks, not only those near the ones that write."""
    whole = Run(0, prod(kind.shape)) if isinstance(kind, FlatEven) else Box.whole(kind.shape)
    chunks = list(kind.overlapping(whole))
    files = dict(chunks)
    asked = range(world_size) if everyone else _near(files, world_size)
    held = {file: regions for file in asked if (regions := list(kind.of_file(file)))}
    if isinstance(kind, Grid | FlatEven):
        if len(files) != len(chunks) or held != {file: [region] for file, region in chunks}:
            raise Uncovered(f"what ranks write is not what a reader finds: {kind}")
        _check_tiles(kind, list(files.values()))
        return len(chunks)
    try:
        Pieces(kind.shape, tuple((file, region) for file, regions in held.items() for region in regions)).check()
    except FormatError as e:
        raise Uncovered(str(e)) from e
    return len(chunks)


def _check_tiles(kind: Partition, regions: list[Region]) -> None:
    """Uncovered unless regions are disjoint and make up the whole.

    Runs must follow one another. Boxes must be all combinations of the stretches that each dimension is cut into, and
    each once; and those stretches must follow one another.
    """
    shape: Shape = kind.shape
    runs = [(r.start, r.stop) for r in regions if isinstance(r, Run)]
    boxes = {(r.offsets, r.sizes) for r in regions if isinstance(r, Box)}
    cuts = [{(o[d], o[d] + n[d]) for o, n in boxes} for d in range(len(shape))]
    if runs:
        whole = not boxes and _follow(runs, prod(shape))
    else:
        whole = prod([len(cut) for cut in cuts]) == len(boxes) == len(regions) and all(
            _follow(cut, n) for cut, n in zip(cuts, shape, strict=True)
        )
    if prod(shape) > 0 and not whole:
        raise Uncovered(f"chunks overlap, or leave a hole: {kind}")


def _follow(stretches: Iterable[tuple[int, int]], size: int) -> bool:
    """Whether stretches, none of them empty, follow one another from 0 to `size`."""
    at = 0
    for start, stop in sorted(stretches):
        if start != at or stop <= start:
            return False
        at = stop
    return at == size


def _check_alike(fqn: str, partition: Partition, kind: Partition, shift: int, world_size: int) -> None:
    """Uncovered unless some ranks write of a tensor what they do of its kind, and all of them are there."""
    if not isinstance(partition, Grid | FlatEven):
        return
    last = partition.last_file
    if last >= world_size:
        raise Uncovered(f"{fqn}: what ranks write is not what a reader finds: {partition} on {world_size} ranks")
    asked = {shift - 1, shift, last, last + 1, *_some(range(shift, last + 1), _ASKED)}
    for rank in (r for r in asked if 0 <= r < world_size):
        own = [_of_kind(region, partition) for region in partition.of_file(rank)]
        if own != list(kind.of_file(rank - shift)):
            raise Uncovered(f"{fqn}: rank {rank} writes {own} of {partition}, and not as of {kind}")


def served(partitions: Mapping[str, Partition], readers: Mapping[str, Layout], count: int, *, every: bool) -> int:
    """Uncovered unless the chunks hold each region of `count` readers. Returns the count of regions asked for.

    every: not only of the first reader, the middle one, the last and some more. Chunks are disjoint (`written_once`),
    so a region is whole if what is found of it adds up.
    """
    asked = range(count) if every else sorted({0, count // 2, count - 1, *_some(range(count), _ASKED)})
    pairs = {(partitions[fqn], layout): fqn for fqn, layout in readers.items()}
    return sum(_served(pairs[pair], *pair, asked) for pair in _some(pairs, PAIRS))


def _served(fqn: str, partition: Partition, layout: Layout, ranks: Sequence[int]) -> int:
    regions = [region for rank in ranks for region in layout.held.of_file(rank)]
    for region in regions:
        _check_served(fqn, partition, region)
    return len(regions)


def any_region(partitions: Mapping[str, Partition], count: int) -> int:
    """Uncovered unless `count` regions of each kind, boxes and runs from a fixed seed, are whole. Returns how many."""
    chance, asked = random.Random(0), 0
    for kind in _some(dict.fromkeys(_alike(p)[0] for p in partitions.values()), KINDS):
        for _ in range(count if prod(kind.shape) else 0):
            _check_served("a region", kind, _box(chance, kind.shape))
            _check_served("a region", kind, Run(*_stretch(chance, prod(kind.shape))))
            asked += 2
    return asked


def _box(chance: random.Random, shape: Shape) -> Box:
    stretches = [_stretch(chance, n) for n in shape]
    return Box(tuple(a for a, _ in stretches), tuple(b - a for a, b in stretches))


def _stretch(chance: random.Random, size: int) -> tuple[int, int]:
    """Any start, and a length of any magnitude."""
    start = chance.randrange(size)
    return start, start + max(1, int((size - start) ** chance.random()))


def _check_served(fqn: str, partition: Partition, region: Region) -> None:
    found = (overlap_numel(chunk, region, partition.shape) for _, chunk in partition.overlapping(region))
    if (got := sum(found)) != region.numel:
        raise Uncovered(f"{fqn}: {got} of the {region.numel} elements of {region} are found in {partition}")


def _near(files: Iterable[int], world_size: int) -> list[int]:
    """Ranks that may write something, their neighbours, and some that must not."""
    near = {file + d for file in files for d in (-1, 0, 1)} | {0, world_size - 1, *_far(world_size)}
    return sorted(r for r in near if 0 <= r < world_size)


def _some(things: Iterable[T], count: int) -> list[T]:
    """All, or of more than `count` so many, from a fixed seed."""
    found = things if isinstance(things, Sequence) else list(things)
    return list(found) if len(found) <= count else random.Random(0).sample(found, count)


@lru_cache(maxsize=16)
def _far(world_size: int) -> list[int]:
    return _some(range(world_size), 20)
