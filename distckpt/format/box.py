"""Boxes and flat runs: the two shapes that a piece of a tensor can have.

A box is an N-d region (offsets, sizes). A flat run is [start, stop) of the row-major elements. Everything else is
computed from one fact: a region can be cut into boxes that are each contiguous in the region's own memory (`parts`).

Invariant: sizes and offsets are never negative; the whole of a 0-d tensor is `Box((), ())`, with one element.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The region `offsets[d] <= i[d] < offsets[d] + sizes[d]` of a tensor, row-major in its own memory."""

    offsets: Shape
    sizes: Shape

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes) or min((0, *self.offsets, *self.sizes)) < 0:
            raise ValueError(f"not a box: offsets {self.offsets}, sizes {self.sizes}")

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Box that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """Common box, or None where there is no common element."""
        if self == other:
            return self if self.numel else None
        start = tuple(map(max, self.offsets, other.offsets))
        stop = (
            min(a + n, b + m) for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(b - a for a, b in zip(start, stop, strict=True))
        return Box(start, sizes) if all(n > 0 for n in sizes) else None

    def relative_to(self, outer: Box) -> Box:
        """Give the same box in coordinates that start where `outer` does."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.sizes)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the box lies inside a tensor of this shape."""
        return len(shape) == len(self.sizes) and all(
            a + n <= s for a, n, s in zip(self.offsets, self.sizes, shape, strict=True)
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of a tensor in row-major order."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a flat run: [{self.start}, {self.stop})")

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the run lies inside a tensor of this shape."""
        return self.stop <= prod(shape)


Region: TypeAlias = Box | Run


def strides(sizes: Sequence[int]) -> Shape:
    """Row-major strides, in elements."""
    return tuple(prod(sizes[d + 1 :]) for d in range(len(sizes)))


def flat_extent(region: Region, shape: Sequence[int]) -> Run:
    """Shortest flat run of the tensor that holds the region."""
    if isinstance(region, Run):
        return region
    if not region.numel:
        return Run(0, 0)
    step = strides(shape)
    start = sum(a * s for a, s in zip(region.offsets, step, strict=True))
    return Run(start, start + sum((n - 1) * s for n, s in zip(region.sizes, step, strict=True)) + 1)


@dataclass(frozen=True, slots=True)
class Part:
    """A box of the tensor that lies contiguously at `start` (elements) of its region's memory."""

    start: int
    box: Box


def parts(region: Region, shape: Sequence[int]) -> Iterator[Part]:
    """Cut a region into parts: a box is one; a run of an N-d tensor is at most 2 N - 1."""
    if isinstance(region, Box):
        yield Part(0, region)
        return
    step = strides(shape)
    position = region.start
    while position < region.stop:
        yield Part(position - region.start, largest := _largest_box(position, region.stop, shape, step))
        position += largest.numel


def _largest_box(start: int, stop: int, shape: Sequence[int], step: Shape) -> Box:
    """Largest box that begins at flat element `start` and is contiguous within [start, stop)."""
    for d, (size, stride) in enumerate(zip(shape, step, strict=True)):
        if start % stride == 0 and stop - start >= stride:
            count = min((stop - start) // stride, size - start // stride % size)
            lead = tuple(start // s % n for s, n in zip(step[: d + 1], shape[: d + 1], strict=True))
            return Box(lead + (0,) * (len(shape) - d - 1), (1,) * d + (count, *shape[d + 1 :]))
    return Box((), ())  # a 0-d tensor


@dataclass(frozen=True, slots=True)
class Overlap:
    """Elements that two regions share: `box` of the tensor, inside part `source` of one and `target` of the other."""

    box: Box
    source: Part
    target: Part


def overlaps(source: Region, target: Region, shape: Sequence[int]) -> Iterator[Overlap]:
    """Yield what two regions of one tensor share, as boxes that do not overlap each other."""
    if source == target:  # the same layout on both sides is the common case
        yield from (Overlap(p.box, p, p) for p in parts(source, shape) if p.box.numel)
        return
    targets = list(parts(target, shape))
    for a, b in itertools.product(parts(source, shape), targets):
        if common := a.box.intersect(b.box):
            yield Overlap(common, a, b)


def overlap_numel(a: Region, b: Region, shape: Sequence[int]) -> int:
    """Count the elements that two regions of one tensor share."""
    if isinstance(a, Run) and isinstance(b, Run):
        return max(0, min(a.stop, b.stop) - max(a.start, b.start))
    return sum(o.box.numel for o in overlaps(a, b, shape))


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of a region's memory, [start, start + extent) in elements, that holds the elements of `box`."""

    start: int
    extent: int
    box: Box

    @property
    def contiguous(self) -> bool:
        """Whether the stretch holds nothing else."""
        return self.extent == self.box.numel


def spans(within: Part, box: Box, *, limit: int, in_place: bool = False, step: Shape | None = None) -> Iterator[Span]:
    """Cut `box` of a part into stretches of memory that span at most `limit` elements, holes included.

    `in_place`: a contiguous box stays one span however long. A box is cut along the dimension with the longest step,
    so no span reads a hole wider than `limit`. An empty box has none. `step`: strides of the part's memory, in
    elements, where it is not row-major.
    """
    if not box.numel:
        return
    if step is None and box == within.box and (in_place or box.numel <= limit):
        yield Span(within.start, box.numel, box)
        return
    step = step or strides(within.box.sizes)
    start = within.start + sum(a * s for a, s in zip(box.relative_to(within.box).offsets, step, strict=True))
    extent = sum((n - 1) * s for n, s in zip(box.sizes, step, strict=True)) + 1
    if extent <= limit or box.numel == 1 or (in_place and extent == box.numel):
        yield Span(start, extent, box)
        return
    d = max((d for d, n in enumerate(box.sizes) if n > 1), key=lambda d: step[d])
    count = max(1, limit // max(1, step[d]))
    for first in range(0, box.sizes[d], count):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[d] += first
        sizes[d] = min(count, box.sizes[d] - first)
        yield from spans(within, Box(tuple(offsets), tuple(sizes)), limit=limit, in_place=in_place, step=step)
