"""Who writes what: a partition for each tensor, so that replicas write equal bytes. Deterministic; no communication.

A cell that several ranks hold alike is sliced between them where it is large, else (flat runs, too) dealt to the one
with least to write. The result stands in the manifest; no reader repeats the choice.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from math import gcd, prod
from typing import TYPE_CHECKING

from distckpt.format.dtype import item_size
from distckpt.format.partition import Copies, FlatEven, Grid, Partition, Split
from distckpt.state import Layout, Listed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distckpt.saving.merge import Agreed

SLICE_BYTES = 16 << 10
"""A cell of at least this many bytes a replica is sliced between its replicas."""

_ABOUT_EVEN = 16
"""Elements a slice from which on a remainder makes little difference."""


def divide(tensors: Mapping[str, Agreed]) -> dict[str, Partition]:
    """Partition of each tensor, files being the ranks that write them."""
    loads: dict[tuple[Split, ...], list[tuple[int, int]]] = {}
    cuts: dict[tuple[Layout, int], Partition | int] = {}  # a model has few layouts, each for many tensors
    partitions: dict[str, Partition] = {}
    for fqn, tensor in sorted(tensors.items(), key=_largest_first):
        match tensor.layout:
            case Copies():
                partitions[fqn] = tensor.layout
            case Listed():
                partitions[fqn] = tensor.layout.pieces
            case Layout(held, ()):
                partitions[fqn] = held
            case Layout():
                kind = tensor.layout, item_size(tensor.dtype)
                if (cut := cuts.get(kind)) is None:
                    cut = cuts[kind] = _cut(*kind)
                partitions[fqn] = _dealt(tensor.layout, cut, loads) if isinstance(cut, int) else cut
    return partitions


def _largest_first(item: tuple[str, Agreed]) -> tuple[int, str]:
    fqn, tensor = item
    return -prod(tensor.shape) * item_size(tensor.dtype), fqn


def _cut(layout: Layout, itemsize: int) -> Partition | int:
    """Partition of a tensor whose cells are sliced between replicas; else the bytes of one, which is dealt whole."""
    held, replicas = layout.held, layout.replicas
    if isinstance(held, FlatEven):
        return min(prod(held.shape), held.period) * itemsize
    count = prod(s.count for s in replicas)
    cell = held.cell([[0] * len(splits) for splits in held.splits])
    nbytes = cell.numel * itemsize
    added = _slices(cell.sizes, replicas) if nbytes >= SLICE_BYTES * count else None
    if added is None:
        return nbytes
    splits = tuple((*of_dim, *more) for of_dim, more in zip(held.splits, added, strict=True))
    return Grid(held.shape, splits, held.first)


def _slices(sizes: Sequence[int], replicas: Sequence[Split]) -> list[list[Split]] | None:
    """Splits of each dimension of a cell that slice it between its replicas about evenly, in few stretches; or None.

    The first dimension that takes all of them, if it is the first; else each takes what divides it, from the first on.
    """
    count = prod(s.count for s in replicas)
    found: list[list[Split]] = [[] for _ in sizes]
    whole = _dimension_to_cut(sizes, count)
    if whole != 0 and (spread := _spread(sizes, replicas)):
        return spread
    if whole is None:
        return None
    found[whole] += replicas
    return found


def _spread(sizes: Sequence[int], replicas: Sequence[Split]) -> list[list[Split]] | None:
    """Splits over several dimensions that divide each of them about evenly; None where the replicas do not come out."""
    found: list[list[Split]] = [[] for _ in sizes]
    left = list(sizes)
    for split in replicas:
        rest = split.count
        for d, size in enumerate(left):
            part = _most(rest, size)
            if part > 1:
                rest //= part
                left[d] = -(-size // part)
                found[d].append(Split(part, split.stride * rest))
        if rest > 1:
            return None
    return found


def _most(count: int, size: int) -> int:
    """Largest divisor of a count of slices that divides a dimension, or is so small that a remainder matters little."""
    few = max((n for n in range(1, min(count, size // _ABOUT_EVEN) + 1) if count % n == 0), default=1)
    return max(few, gcd(count, size))


def _dealt(layout: Layout, nbytes: int, loads: dict[tuple[Split, ...], list[tuple[int, int]]]) -> Partition:
    """Partition of a tensor that is written by the replicas with least to write."""
    replicas = layout.replicas
    heap = loads.get(replicas) or loads.setdefault(replicas, [(0, i) for i in range(prod(s.count for s in replicas))])
    load, replica = heap[0]
    heapq.heapreplace(heap, (load + nbytes, replica))
    return replace(layout.held, first=layout.held.first + _rank_offset(replicas, replica))


def _dimension_to_cut(sizes: Sequence[int], count: int) -> int | None:
    """First dimension that `count` slices divide about evenly: those lie in few stretches. Else the longest."""
    for d, size in enumerate(sizes):
        if size and (size % count == 0 or size >= _ABOUT_EVEN * count):
            return d
    longest = max(range(len(sizes)), key=lambda d: sizes[d], default=None)
    return longest if longest is not None and sizes[longest] >= count else None


def _rank_offset(replicas: tuple[Split, ...], index: int) -> int:
    offset = 0
    for split in replicas:
        index, own = divmod(index, split.count)
        offset += own * split.stride
    return offset
