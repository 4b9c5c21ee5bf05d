"""An image straight from live tensors, with no arena: what a save that is waited for writes.

Plain CPU memory is written where it lies. What must be copied (from a device, or because it is strided) goes through a
ring of slabs: while one is summed and earlier ones are written, the next is being filled. No more than SLABS exist.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from distckpt.format.box import Run, parts
from distckpt.saving.part import PIECE, Summed, whole
from distckpt.slabs import Slabs, copy
from distckpt.state import as_bytes, is_plain_memory
from distckpt.store.base import FOR_GOOD
from distckpt.store.pieces import IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from distckpt.format.datafile import Image

SLABS = IN_FLIGHT + 2
"""Those being written, the one being summed, and the one being filled."""
_LEAST = 64 << 10
"""Bytes of the smallest slabs: smaller ones, and nothing would ever be saved."""


@contextlib.contextmanager
def content(image: Image, chunks: Sequence[torch.Tensor], room: int | None = None) -> Iterator[Summed]:
    """Bytes of an image, to be written within the block. chunks: live, in file order.

    room: most bytes of slabs, if it is not less than 320 KiB; 20 MiB are the most that is of use.
    """
    if all(map(is_plain_memory, chunks)):
        yield whole(image, map(as_bytes, chunks), FOR_GOOD)
        return
    with Slabs(chunk.device for chunk in chunks) as slabs, ThreadPoolExecutor(1, "distckpt-copy") as pool:
        filled = _Filled(image, chunks, slabs, _slab_size(room))
        yield Summed(memoryview(image.header), filled.through(pool), IN_FLIGHT, image.algorithm)


def _slab_size(room: int | None) -> int:
    """A power of two, as pinned memory is always rounded up to one."""
    size = PIECE if room is None else min(PIECE, max(_LEAST, room // SLABS))
    return 1 << (size.bit_length() - 1)


class _Filled:
    """The bytes that an image's checksum table covers, a slab after another."""

    def __init__(self, image: Image, chunks: Sequence[torch.Tensor], slabs: Slabs, size: int) -> None:
        self._image, self._slabs, self._size = image, slabs, size
        placed = [
            (len(image.header) + segment.start, chunk)
            for segment, chunk in zip(image.segments, chunks, strict=True)
            if segment.nbytes
        ]
        self._starts, self._chunks = [start for start, _ in placed], [chunk for _, chunk in placed]

    def through(self, pool: ThreadPoolExecutor) -> Iterator[memoryview]:
        """Yield the bytes, each piece good while IN_FLIGHT more are asked for. The next is filled meanwhile."""
        out: deque[torch.Tensor | None] = deque()
        stop = self._image.table_start
        ahead = pool.submit(self._fill, 0)
        for low in range(0, stop, self._size):
            piece, slab = ahead.result()
            if len(out) > IN_FLIGHT and (free := out.popleft()) is not None:
                self._slabs.give(free)
            if low + self._size < stop:
                ahead = pool.submit(self._fill, low + self._size)
            out.append(slab)
            yield piece

    def _fill(self, low: int) -> tuple[memoryview, torch.Tensor | None]:
        """Return bytes from `low` on, and the slab that they were copied to; None if they lie in live memory."""
        image, high = self._image, min(low + self._size, self._image.table_start)
        first = max(0, bisect_right(self._starts, low) - 1)
        within = [i for i in range(first, bisect_right(self._starts, high - 1)) if self._stop(i) > low]
        if len(within) == 1 and self._starts[within[0]] <= low and high <= self._stop(within[0]):
            start, chunk = self._starts[within[0]], self._chunks[within[0]]
            if is_plain_memory(chunk):
                return as_bytes(chunk)[low - start : high - start], None
        with self._slabs.copying():
            slab = self._slabs.take(self._size)
            copies = [each for i in within for each in self._copies(i, slab, low, high)]
            copy([target for target, _ in copies], [source for _, source in copies])
        memory = as_bytes(slab)
        for start, data in ((0, image.header), (image.objects_start, image.objects)):
            begin, end = max(low, start), min(high, start + len(data))
            if begin < end:
                memory[begin - low : end - low] = data[begin - start : end - start]
        self._slabs.arrived()
        return memory[: high - low], slab

    def _stop(self, index: int) -> int:
        return self._starts[index] + self._chunks[index].nbytes

    def _copies(
        self, index: int, slab: torch.Tensor, low: int, high: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (place in the slab, live elements) for what of a chunk lies in [low, high), both of one shape."""
        start, chunk = self._starts[index], self._chunks[index]
        begin, end = max(low, start), min(high, self._stop(index))
        place = slab[begin - low : end - low].view(chunk.dtype)
        elements = Run((begin - start) // chunk.itemsize, (end - start) // chunk.itemsize)
        for part in parts(elements, chunk.shape):
            of = tuple(slice(a, a + n) for a, n in zip(part.box.offsets, part.box.sizes, strict=True))
            yield place[part.start : part.start + part.box.numel].view(part.box.sizes), chunk[of]
