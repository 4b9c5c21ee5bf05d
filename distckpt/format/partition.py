"""How one global tensor is divided over data files, as a small value that answers in closed form.

A file is an index into the manifest's table of files. Four kinds, one question each way: which chunks hold this
region (`overlapping`), and which regions lie in this file (`of_file`).

    Grid      every regular layout: per dimension, nested torch.chunk splits; files as a strided map
    FlatEven  runs of a flat buffer that is cut every `period` elements (ZeRO and FSDP1 groups)
    Pieces    a list, for whatever is not regular
    Copies    every file holds a whole copy of its own (values that differ between replicas)

Invariant: the chunks of the first three are disjoint and together cover the tensor; `check` proves it for a value
that was read.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from distckpt.errors import FormatError
from distckpt.format.box import Box, Region, Run, Shape, flat_extent, overlap_numel, parts
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


_MOST_CUTS = 64


@dataclass(frozen=True, slots=True)
class Split:
    """One cut of a dimension into `count` chunks as torch.chunk cuts; chunk i lies `i * stride` files further on."""

    count: int
    stride: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.stride < 0:
            raise FormatError(f"not a split: {self.count} chunks, file stride {self.stride}")


@dataclass(frozen=True, slots=True)
class Grid:
    """Nested even splits of each dimension. `splits[d]` cuts dimension d, outermost cut first."""

    shape: Shape
    splits: tuple[tuple[Split, ...], ...]
    first: int

    def __post_init__(self) -> None:
        if len(self.splits) != len(self.shape) or self.first < 0:
            raise FormatError(f"not a grid of shape {self.shape}: {self.splits}, first file {self.first}")
        reach = 0
        for split in self._by_stride():
            if split.stride <= reach:
                raise FormatError(f"grid of shape {self.shape}: two chunks share a file in {self.splits}")
            reach += (split.count - 1) * split.stride

    def _by_stride(self) -> list[Split]:
        cuts = [s for splits in self.splits for s in splits if s.count > 1]
        return cuts if len(cuts) < 2 else sorted(cuts, key=lambda s: s.stride)

    def overlapping(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield (file, chunk) of every chunk with an element of `region`, each once."""
        seen = set()
        for part in parts(region, self.shape):
            if not part.box.numel:
                continue
            sides = [
                list(_cut(0, size, splits, lo, lo + n))
                for size, splits, lo, n in zip(self.shape, self.splits, part.box.offsets, part.box.sizes, strict=True)
            ]
            for chunk in itertools.product(*sides):
                file = self.first + sum(c[0] for c in chunk)
                if file not in seen:
                    seen.add(file)
                    yield file, Box(tuple(c[1] for c in chunk), tuple(c[2] for c in chunk))

    def of_file(self, file: int) -> Iterator[Region]:
        """Yield the regions of the tensor that lie in `file`; empty ones are not stored."""
        rest = file - self.first
        if rest < 0:
            return
        index = {}
        for split in reversed(self._by_stride()):
            index[split.stride] = min(rest // split.stride, split.count - 1)
            rest -= index[split.stride] * split.stride
        if rest:
            return
        box = self.cell([[index[s.stride] if s.count > 1 else 0 for s in splits] for splits in self.splits])
        if box.numel:
            yield box

    def cell(self, index: Sequence[Sequence[int]]) -> Box:
        """Box of the chunk whose index in `splits[d][k]` is `index[d][k]`. It may be empty."""
        offsets, sizes = [], []
        for size, splits, chosen in zip(self.shape, self.splits, index, strict=True):
            start, n = 0, size
            for split, i in zip(splits, chosen, strict=True):
                start, n = chunk_of(start, n, split.count, i)
            offsets.append(start)
            sizes.append(n)
        return Box(tuple(offsets), tuple(sizes))

    @property
    def last_file(self) -> int:
        """Largest file index that the partition can name."""
        return self.first + sum((s.count - 1) * s.stride for s in self._by_stride())

    def check(self) -> None:
        """Nothing to prove: torch.chunk covers each dimension exactly, and `__post_init__` told files apart."""

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        splits = [[[s.count, s.stride] for s in dim] for dim in self.splits]
        while splits and not splits[-1]:
            splits.pop()
        return {"grid": splits, "file": self.first} if splits else {"file": self.first}


def chunk_of(start: int, size: int, count: int, index: int) -> tuple[int, int]:
    """(start, size) of chunk `index` when [start, start + size) is cut as torch.chunk cuts: ceil(size / count) each."""
    step = -(-size // count)
    low = min(size, step * index)
    return start + low, min(size, low + step) - low


def _cut(start: int, size: int, splits: Sequence[Split], low: int, high: int) -> Iterator[tuple[int, int, int]]:
    """(file offset, start, size) of the chunks of [start, start + size) that meet [low, high)."""
    if not splits:
        yield 0, start, size
        return
    split, *inner = splits
    step = -(-size // split.count)
    for i in range(max(0, (low - start) // step), min(split.count, -(-(high - start) // step))):
        chunk = chunk_of(start, size, split.count, i)
        if chunk[1]:
            yield from ((i * split.stride + f, s, n) for f, s, n in _cut(*chunk, inner, low, high))


@dataclass(frozen=True, slots=True)
class FlatEven:
    """The tensor lies at `offset` of a flat buffer that is cut every `period` elements, one file a piece.

    Piece k of the buffer lies in file `first + k * stride`; the tensor's chunk there is a flat run.
    """

    shape: Shape
    period: int
    offset: int
    first: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.period < 1 or self.offset < 0 or self.first < 0 or self.stride < 1:
            raise FormatError(f"not a flat partition of shape {self.shape}: {self}")

    def overlapping(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield (file, chunk) of every chunk with an element of `region`, each once."""
        reach = flat_extent(region, self.shape)
        for k in range((self.offset + reach.start) // self.period, -(-(self.offset + reach.stop) // self.period)):
            run = self._run(k)
            if run.numel and overlap_numel(run, region, self.shape):
                yield self.first + k * self.stride, run

    def of_file(self, file: int) -> Iterator[Region]:
        """Yield the regions of the tensor that lie in `file`."""
        k, rest = divmod(file - self.first, self.stride)
        if not rest and k >= 0 and (run := self._run(k)).numel:
            yield run

    def _run(self, k: int) -> Run:
        numel = prod(self.shape)
        start = min(max(k * self.period - self.offset, 0), numel)
        return Run(start, max(start, min((k + 1) * self.period - self.offset, numel)))

    @property
    def last_file(self) -> int:
        """Largest file index that the partition can name."""
        last = max(self.offset + Box.whole(self.shape).numel - 1, 0) // self.period
        return self.first + last * self.stride

    def check(self) -> None:
        """Nothing to prove: consecutive periods cover the buffer."""

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"flat": [self.period, self.offset], "file": self.first, "stride": self.stride}


@dataclass(frozen=True, slots=True)
class Pieces:
    """A list of (file, region)."""

    shape: Shape
    pieces: tuple[tuple[int, Region], ...]

    def overlapping(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield (file, chunk) of every chunk with an element of `region`, each once."""
        return ((file, piece) for file, piece in self.pieces if overlap_numel(piece, region, self.shape))

    def of_file(self, file: int) -> Iterator[Region]:
        """Yield the regions of the tensor that lie in `file`."""
        return (piece for f, piece in self.pieces if f == file and piece.numel)

    @property
    def last_file(self) -> int:
        """Largest file index that the partition can name."""
        return max((file for file, _ in self.pieces), default=0)

    def check(self) -> None:
        """Raise FormatError unless the pieces are inside the tensor, disjoint, and cover it."""
        outside = [p for f, p in self.pieces if f < 0 or not p.fits(self.shape)]
        if outside:
            raise FormatError(f"piece {outside[0]} lies outside shape {self.shape}")
        if sum(p.numel for _, p in self.pieces) != prod(self.shape):
            raise FormatError(f"pieces do not add up to shape {self.shape}: {shown(self.pieces)}")
        boxes = [part.box for _, p in self.pieces for part in parts(p, self.shape) if part.box.numel]
        # sweep along the dimension with the most cuts: along another, thousands of columns would all be compared
        d = max(range(len(self.shape)), key=lambda d: len({b.offsets[d] for b in boxes}), default=None)
        if d is not None:
            boxes.sort(key=lambda b: b.offsets[d])
        for i, box in enumerate(boxes):
            for other in itertools.islice(boxes, i + 1, None):
                if d is not None and other.offsets[d] >= box.offsets[d] + box.sizes[d]:
                    break
                if box.intersect(other):
                    raise FormatError(f"pieces of shape {self.shape} overlap: {box} and {other}")

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"pieces": [[f, *_region_to_json(p)] for f, p in self.pieces]}


@dataclass(frozen=True, slots=True)
class Copies:
    """Files `first + i * stride`, i < count, each hold the whole tensor with values of their own."""

    shape: Shape
    first: int
    count: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.first < 0 or self.count < 1 or self.stride < 1:
            raise FormatError(f"not a list of copies: {self}")

    def overlapping(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Yield the first copy: what a reader takes that has no copy of its own."""
        if region.numel:
            yield self.first, Box.whole(self.shape)

    def copy_of(self, rank: int) -> int | None:
        """File of this rank's own copy, if it has one."""
        k, rest = divmod(rank - self.first, self.stride)
        return rank if not rest and 0 <= k < self.count else None

    def of_file(self, file: int) -> Iterator[Region]:
        """Yield the regions of the tensor that lie in `file`."""
        if self.copy_of(file) is not None and Box.whole(self.shape).numel:
            yield Box.whole(self.shape)

    @property
    def last_file(self) -> int:
        """Largest file index that the partition can name."""
        return self.first + (self.count - 1) * self.stride

    def check(self) -> None:
        """Nothing to prove: each copy is whole."""

    def to_json(self) -> dict[str, Any]:
        """As the manifest stores it."""
        return {"copies": self.count, "file": self.first, "stride": self.stride}


Partition: TypeAlias = Grid | FlatEven | Pieces | Copies


def regions_of(partition: Partition, file: int) -> tuple[Region, ...]:
    """Regions of a tensor that lie in `file`. A model has few grids, each for many tensors: they are kept."""
    return _regions_of_grid(partition, file) if isinstance(partition, Grid) else tuple(partition.of_file(file))


@lru_cache(maxsize=1 << 14)
def _regions_of_grid(grid: Grid, file: int) -> tuple[Region, ...]:
    return tuple(grid.of_file(file))


def divided(shape: Shape, pieces: Iterable[tuple[int, Region]]) -> Grid | Pieces:
    """Partition with these (file, chunk): a Grid where they are the whole, or an even cut of one dimension."""
    held = tuple(sorted((p for p in pieces if p[1].numel), key=lambda p: p[0]))
    boxes = [piece for _, piece in held if isinstance(piece, Box) and len(piece.sizes) == len(shape)]
    cut = sorted({d for box in boxes for d, n in enumerate(shape) if box.sizes[d] != n})
    if len(boxes) == len(held) and len({file for file, _ in held}) == len(held) and len(cut) <= 1:
        first = held[0][0] if held else 0
        stride = held[1][0] - first if len(held) > 1 else 0
        splits = tuple((Split(len(held), stride),) if d in cut else () for d in range(len(shape)))
        grid = Grid(shape, splits, first)
        if all(list(grid.of_file(file)) == [box] for file, box in held) and sum(b.numel for b in boxes) == prod(shape):
            return grid
    return Pieces(shape, held)


def from_json(data: Any, shape: Shape) -> Partition:
    """Partition that `to_json` wrote. FormatError for anything else."""
    match data:
        case {"flat": [int(period), int(offset)], "file": int(first), "stride": int(stride), **rest} if not rest:
            return FlatEven(shape, period, offset, first, stride)
        case {"copies": int(count), "file": int(first), "stride": int(stride), **rest} if not rest:
            return Copies(shape, first, count, stride)
        case {"pieces": [*pieces], **rest} if not rest:
            return Pieces(shape, tuple(_piece_from_json(p, shape) for p in pieces))
        case {"file": int(first), **rest} if rest.keys() <= {"grid"}:
            return Grid(shape, _splits_from_json(rest.get("grid", []), len(shape)), first)
    raise FormatError(f"not a partition: {shown(data)}")


def _splits_from_json(data: Any, ndim: int) -> tuple[tuple[Split, ...], ...]:
    match data:
        case [*dims] if len(dims) <= ndim and all(
            isinstance(dim, list)
            and len(dim) <= _MOST_CUTS
            and all(isinstance(s, list) and len(s) == 2 and all(type(n) is int for n in s) for s in dim)
            for dim in dims
        ):
            read = tuple(tuple(Split(count, stride) for count, stride in dim) for dim in dims)
            return read + ((),) * (ndim - len(read))
    raise FormatError(f"not the splits of a grid: {shown(data)}")


def _region_to_json(region: Region) -> list[Any]:
    if isinstance(region, Run):
        return [region.start, region.stop]
    return [list(region.offsets), list(region.sizes)]


def _piece_from_json(data: Any, shape: Shape) -> tuple[int, Region]:
    try:
        match data:
            case [int(file), int(start), int(stop)]:
                return file, Run(start, stop)
            case [int(file), [*offsets], [*sizes]] if len(offsets) == len(sizes) == len(shape) and all(
                type(n) is int for n in (*offsets, *sizes)
            ):
                return file, Box(tuple(offsets), tuple(sizes))
    except ValueError as e:
        raise FormatError(f"not a piece of shape {shape}: {shown(data)}: {e}") from e
    raise FormatError(f"not a piece of shape {shape}: {shown(data)}")
