"""Proof that a division of tensors over data files is whole: every byte written exactly once, every reader served.

Tensors that are cut alike are proven once. A proof does not trust the closed forms that it is about: it asks every
rank for what it writes, and adds up.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from distckpt.errors import FormatError
from distckpt.format.box import Box, overlap_numel
from distckpt.format.partition import FlatEven, Grid, Pieces

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.format.box import Region
    from distckpt.format.partition import Partition
    from distckpt.state import Layout


class Uncovered(Exception):
    """Some byte is written twice or not at all, or a reader does not get what it asks for."""


def written_once(partitions: Mapping[str, Partition], world_size: int) -> int:
    """Uncovered unless the regions that all ranks write make up each tensor. Returns the count of chunks proven."""
    proven = 0
    counts: dict[Partition, int] = {}
    kinds: set[Partition] = set()
    for fqn, partition in partitions.items():
        if partition not in counts:
            kind = _kind(partition)
            everyone = kind not in kinds and not isinstance(partition, FlatEven)
            kinds.add(kind)
            counts[partition] = _proven(fqn, partition, world_size, everyone=everyone)
        proven += counts[partition]
    return proven


def _proven(fqn: str, partition: Partition, world_size: int, *, everyone: bool) -> int:
    """Chunks of one tensor. everyone: ask all ranks, not only those near the ones that write."""
    chunks = list(partition.overlapping(Box.whole(partition.shape)))
    files = {file for file, _ in chunks}
    asked = range(world_size) if everyone else _near(files, world_size)
    held = [(file, region) for file in asked for region in partition.of_file(file)]
    if sorted(held, key=_order) != sorted(chunks, key=_order) or len(files) != len(chunks):
        raise Uncovered(f"{fqn}: what ranks write is not what a reader finds: {partition}")
    try:
        Pieces(partition.shape, tuple(chunks)).check()
    except FormatError as e:
        raise Uncovered(f"{fqn}: {e}") from e
    return len(chunks)


def served(partitions: Mapping[str, Partition], readers: Mapping[str, Layout], count: int, *, every: bool) -> int:
    """Uncovered unless the chunks hold each region of `count` readers. Returns the count of regions proven.

    every: not only of the first reader, the middle one and the last.
    """
    asked = range(count) if every else sorted({0, count // 2, count - 1})
    proven = 0
    counts: dict[tuple[Partition, Layout], int] = {}
    for fqn, layout in readers.items():
        pair = partitions[fqn], layout
        if pair not in counts:
            regions = [region for rank in asked for region in layout.held.of_file(rank)]
            for region in regions:
                _check_served(fqn, pair[0], region)
            counts[pair] = len(regions)
        proven += counts[pair]
    return proven


def _check_served(fqn: str, partition: Partition, region: Region) -> None:
    found = (overlap_numel(chunk, region, partition.shape) for _, chunk in partition.overlapping(region))
    if (got := sum(found)) != region.numel:
        raise Uncovered(f"{fqn}: {got} of the {region.numel} elements of {region} are found in {partition}")


def _kind(partition: Partition) -> Partition:
    """What is cut alike: from file 0 on, and without the dimensions that are not cut."""
    if not isinstance(partition, Grid):
        return partition
    cut = [d for d, splits in enumerate(partition.splits) if splits]
    return Grid(tuple(partition.shape[d] for d in cut), tuple(partition.splits[d] for d in cut), 0)


def _near(files: set[int], world_size: int) -> list[int]:
    """Ranks that may write something, their neighbours, and some that must not."""
    near = {file + d for file in files for d in (-1, 0, 1)}
    some = random.Random(0).sample(range(world_size), min(world_size, 20))
    return sorted(r for r in near | set(some) | {0, world_size - 1} if 0 <= r < world_size)


def _order(chunk: tuple[int, Region]) -> tuple[int, str]:
    return chunk[0], str(chunk[1])
