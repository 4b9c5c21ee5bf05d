"""Which bytes of a file a piece is: a few numbers, however many rows it has. Pure.

Like a tensor's memory: sizes and steps, outermost first, here in bytes, so the innermost step is 1. What ranks tell
each other when they share what is read, and what is cut where one reader's bytes end and another's begin.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Pattern(NamedTuple):
    """The bytes `start + sum(i * step)` of a file for every index i within the sizes. Rows do not overlap."""

    start: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Count of its bytes."""
        return prod(self.sizes)

    @property
    def stop(self) -> int:
        """Byte after its last."""
        return self.start + _reach(self.sizes, self.steps)


def run(start: int, stop: int) -> Pattern:
    """Bytes [start, stop)."""
    return Pattern(start, (stop - start,), (1,))


def strided(start: int, sizes: Sequence[int], steps: Sequence[int], itemsize: int) -> Pattern:
    """Elements of `itemsize` bytes at these steps (in elements)."""
    return Pattern(start, (*sizes, itemsize), (*(step * itemsize for step in steps), 1))


def plainest(pattern: Pattern) -> Pattern:
    """Return the same bytes with as few dimensions as say it."""
    found: list[tuple[int, int]] = []
    for size, step in zip(reversed(pattern.sizes), reversed(pattern.steps), strict=True):
        if found and step == found[-1][0] * found[-1][1]:
            found[-1] = (size * found[-1][0], found[-1][1])
        elif size != 1 or not found:
            found.append((size, step))
    return Pattern(pattern.start, tuple(n for n, _ in reversed(found)), tuple(s for _, s in reversed(found)))


def cut(pattern: Pattern, low: int, high: int) -> Iterator[tuple[tuple[int, ...], Pattern]]:
    """Yield the bytes of a pattern that lie in [low, high), in ascending order: (index of the first, part)."""
    for first, sizes in _cut(*pattern, low, high):
        at = pattern.start + sum(i * step for i, step in zip(first, pattern.steps, strict=True))
        yield first, Pattern(at, sizes, pattern.steps)


Index = tuple[int, ...]


def _cut(start: int, sizes: Index, steps: Index, low: int, high: int) -> Iterator[tuple[Index, Index]]:
    if low <= start and start + _reach(sizes, steps) <= high:
        yield (0,) * len(sizes), sizes
        return
    if len(sizes) == 1:
        first, stop = max(0, low - start), min(sizes[0], high - start)
        if first < stop:
            yield (first,), (stop - first,)
        return
    step, inner, reach = steps[0], (sizes[1:], steps[1:]), _reach(sizes[1:], steps[1:])
    touched = range(max(0, (low - start - reach) // step + 1), min(sizes[0], -((start - high) // step)))
    first = min(max(touched.start, -((start - low) // step)), touched.stop)
    stop = max(first, min(touched.stop, (high - reach - start) // step + 1))
    for i in range(touched.start, first):
        yield from (((i, *at), (1, *n)) for at, n in _cut(start + i * step, *inner, low, high))
    if first < stop:
        yield (first, *(0 for _ in sizes[1:])), (stop - first, *sizes[1:])
    for i in range(stop, touched.stop):
        yield from (((i, *at), (1, *n)) for at, n in _cut(start + i * step, *inner, low, high))


def _reach(sizes: Sequence[int], steps: Sequence[int]) -> int:
    return sum((n - 1) * step for n, step in zip(sizes, steps, strict=True)) + 1


class Need:
    """What one rank needs: patterns by file, each file's in ascending order."""

    def __init__(self, patterns: Iterable[tuple[int, Pattern]]) -> None:
        self.patterns = sorted(patterns)
        self._of_file: dict[int, range] = {}
        self._longest: dict[int, int] = {}
        for i, (file, pattern) in enumerate(self.patterns):
            self._of_file[file] = range(self._of_file.get(file, range(i, i)).start, i + 1)
            self._longest[file] = max(self._longest.get(file, 0), pattern.stop - pattern.start)

    def within(self, file: int, low: int, high: int) -> Iterator[tuple[int, Pattern]]:
        """Yield (index in `patterns`, bytes of that pattern) of what lies in [low, high) of a file."""
        of_file = self._of_file.get(file, range(0))
        reach = (file, Pattern(low - self._longest.get(file, 0), (), ()))
        for i in range(bisect_left(self.patterns, reach, of_file.start, of_file.stop), of_file.stop):
            pattern = self.patterns[i][1]
            if pattern.start >= high:
                break
            if pattern.stop > low:
                for _, part in cut(pattern, low, high):
                    yield i, part

    def stretches(self, grain: int) -> Iterator[tuple[int, int, int]]:
        """Yield (file, first, stop) of the blocks of `grain` bytes that hold its patterns, adjacent ones together."""
        last: tuple[int, int, int] | None = None
        for file, pattern in self.patterns:
            first, stop = pattern.start // grain, -(-pattern.stop // grain)
            if last and last[0] == file and first <= last[2]:
                last = (file, last[1], max(last[2], stop))
                continue
            if last:
                yield last
            last = (file, first, stop)
        if last:
            yield last

    def encode(self) -> bytes:
        """As it is told to other ranks."""
        numbers = array("q")
        for file, (start, sizes, steps) in self.patterns:
            numbers.extend((file, start, len(sizes), *sizes, *steps))
        return numbers.tobytes()

    @staticmethod
    def decode(data: bytes) -> Need:
        """Need that `encode` wrote."""
        numbers = array("q")
        numbers.frombytes(data)
        found, at = [], 0
        while at < len(numbers):
            file, start, n = numbers[at : at + 3]
            sizes, steps = numbers[at + 3 : at + 3 + n], numbers[at + 3 + n : at + 3 + 2 * n]
            found.append((file, Pattern(start, tuple(sizes), tuple(steps))))
            at += 3 + 2 * n
        return Need(found)
