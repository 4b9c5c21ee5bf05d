"""Verified reads, straight into the targets' memory where it is contiguous.

A file is read in windows, several in flight. Within a window, blocks that are needed and adjacent (or nearly so, where
asking again costs more) are one read. Where every piece of such a read is plain contiguous memory it is a scatter read:
gaps go into scratch, the rest in place.
Otherwise it goes through a slab, and pieces are copied (and cast, or sent to a device) out of it once verified.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch

from distckpt.errors import Corrupt
from distckpt.format.box import Box, overlaps, spans, strides
from distckpt.format.layout import fqn_of
from distckpt.format.partition import Copies
from distckpt.loading.pattern import cut, run, strided
from distckpt.loading.plan import items_of
from distckpt.slabs import Slabs
from distckpt.state import Shard, as_bytes, is_plain_memory, part_of, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.format.datafile import Stored
    from distckpt.loading.open import Checkpoint, DataFile
    from distckpt.loading.pattern import Pattern
    from distckpt.loading.plan import Item

WINDOW = 16 << 20
"""Bytes of a file that one read covers at most, in whole blocks, unless less is asked for."""
HOLES = 4 << 20
"""Widest stretch, in bytes, that is read for the sake of strided pieces in it."""


class Piece(NamedTuple):
    """Bytes [start, stop) of a file, and the tensor that they fill: its plain memory, or by way of `source`."""

    start: int
    stop: int
    target: torch.Tensor
    memory: memoryview | None
    source: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None

    @property
    def pattern(self) -> Pattern:
        """Its bytes of the file."""
        if self.source is None:
            return run(self.start, self.stop)
        dtype, sizes, steps = self.source
        return strided(self.start, sizes, steps, dtype.itemsize)

    def within(self, low: int, high: int) -> Iterator[Piece]:
        """Yield what of it lies in [low, high), where neither end lies within an element, in ascending order."""
        if low <= self.start and self.stop <= high:
            yield self
            return
        for first, part in cut(self.pattern, low, high):
            if self.memory is not None:
                memory = self.memory[first[0] : first[0] + part.nbytes]
                yield Piece(part.start, part.stop, self.target, memory, None)
            elif self.source is not None:
                dtype, _, steps = self.source
                target = self.target
                for d, (at, n) in enumerate(zip(first[:-1], part.sizes[:-1], strict=True)):
                    target = target.narrow(d, at, n)
                yield Piece(part.start, part.stop, target, None, (dtype, part.sizes[:-1], steps))

    def take(self, data: torch.Tensor) -> None:
        """Fill it with its bytes (uint8), one after another. See `place`."""
        if self.memory is not None:
            self.memory[:] = as_bytes(data)
        elif self.source is not None:
            dtype, sizes, _ = self.source
            data = data.clone() if data.storage_offset() % dtype.itemsize else data
            self.target.copy_(data.view(dtype).view(sizes), non_blocking=self.target.is_cuda)

    def place(self, scratch: torch.Tensor, start: int) -> None:
        """Copy the piece out of `scratch` (uint8), which holds the file from byte `start` on.

        To a CUDA device the copy has only begun on return, on its current stream: see Slabs.copying.
        """
        data = scratch[self.start - start : self.stop - start]
        if self.memory is not None:
            self.memory[:] = as_bytes(data)
        elif self.source is not None:
            dtype, sizes, steps = self.source
            if data.storage_offset() % dtype.itemsize:  # other tools align nothing
                data = data.clone()
            self.target.copy_(data.view(dtype).as_strided(sizes, steps), non_blocking=self.target.is_cuda)


class Run(NamedTuple):
    """Pieces that one read brings: of one window of a file, their blocks adjacent or the same."""

    file_index: int
    file: DataFile
    pieces: list[Piece]

    @property
    def start(self) -> int:
        """First byte read."""
        return self.pieces[0].start // self.file.grain * self.file.grain

    @property
    def stop(self) -> int:
        """Byte after the last one read."""
        grain = self.file.grain
        return min(-(-max(p.stop for p in self.pieces) // grain) * grain, self.file.covered)


def read(checkpoint: Checkpoint, items: Iterable[Item], window: int = WINDOW) -> None:
    """Fill the items' shards. Corrupt where a block does not match its checksum; then targets are a mix.

    window: bytes of a file that one read covers at most, of which several are in flight.
    """
    fill(checkpoint, runs(checkpoint, items, window))


def runs(checkpoint: Checkpoint, items: Iterable[Item], window: int = WINDOW) -> list[Run]:
    """Reads that fill the items' shards. Corrupt unless each file has the chunks that the commit says."""
    by_file: dict[int, list[Item]] = {}
    for item in items:
        by_file.setdefault(item.file, []).append(item)
    found: list[Run] = []
    checkpoint.open_files(by_file)
    gap = checkpoint.store.pace.gap
    for index, wanted in sorted(by_file.items()):
        file = checkpoint.data_file(index)
        found += runs_of(index, file, [p for i in wanted for p in _pieces(file, i, window)], window, gap)
    return found


def fill(checkpoint: Checkpoint, wanted: Iterable[Run]) -> None:
    """Do these reads, several at once but for files that are to be read in order."""
    jobs: list[list[Run]] = []
    for each in wanted:
        if jobs and each.file.sequential and each.file_index == jobs[-1][0].file_index:
            jobs[-1].append(each)
        else:
            jobs.append([each])
    devices = (piece.target.device for job in jobs for each in job for piece in each.pieces)
    with Slabs(devices) as slabs, ThreadPoolExecutor(checkpoint.store.pace.in_flight, "distckpt-read") as pool:
        futures = [pool.submit(_read_runs, checkpoint, job, slabs) for job in jobs]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        for future in pending:
            future.cancel()
        for future in done:
            future.result()


def equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    """Whether two saved tensors are the same bit for bit. Reads them, a slab of rows at a time."""
    one, other = checkpoint.manifest.tensors[a], checkpoint.manifest.tensors[b]
    copies = isinstance(one.partition, Copies) or isinstance(other.partition, Copies)
    if copies or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    both = zip(rows_of(checkpoint, a), rows_of(checkpoint, b), strict=True)
    return all(as_bytes(x) == as_bytes(y) for x, y in both)


def rows_of(checkpoint: Checkpoint, fqn: str) -> Iterator[torch.Tensor]:
    """Yield a saved tensor in slabs of rows, about WINDOW bytes each, on the CPU; not one in Copies. Corrupt."""
    info = checkpoint.manifest.tensors[fqn]
    dtype, rows = torch_dtype(info.dtype), info.shape[0] if info.shape else 1
    height = max(1, WINDOW * rows // max(1, prod(info.shape) * dtype.itemsize))
    for row in range(0, rows, height):
        sizes = (min(height, rows - row), *info.shape[1:]) if info.shape else ()
        region = Box((row,) * bool(info.shape) + (0,) * len(info.shape[1:]), sizes)
        slab = Shard(region, torch.empty(sizes, dtype=dtype))
        read(checkpoint, items_of(fqn, fqn, info, slab))
        yield slab.tensor


def _chunk(file: DataFile, item: Item) -> Stored:
    chunk = file.chunks.get(item.name)
    if chunk is None or (chunk.strides is None and chunk.stop - chunk.start != item.region.numel * item.dtype.itemsize):
        raise Corrupt(f"{file.key}: chunk {item.name!r} of {fqn_of(item.name)} is not as the commit says")
    return chunk


def _pieces(file: DataFile, item: Item, window: int) -> Iterator[Piece]:
    """Pieces of one chunk, as the shard's memory takes them."""
    size = item.dtype.itemsize
    chunk, shard = _chunk(file, item), item.shard
    if (
        item.region == shard.region
        and chunk.strides is None
        and shard.tensor.dtype == item.dtype
        and is_plain_memory(shard.tensor)
    ):  # the same layout on both sides is the common case
        yield from _cut(Piece(chunk.start, chunk.stop, shard.tensor, as_bytes(shard.tensor), None), window)
        return
    for overlap in overlaps(item.region, item.shard.region, item.shape):
        whole = part_of(item.shard, overlap.target, overlap.box)
        plain = whole.dtype == item.dtype and is_plain_memory(whole) and chunk.strides is None
        limit = max(1, min(HOLES, window) // size)
        found = spans(overlap.source, overlap.box, limit=limit, in_place=plain, step=chunk.strides)
        for span in found:
            target = part_of(item.shard, overlap.target, span.box)
            start = chunk.start + span.start * size
            direct = span.contiguous and plain and is_plain_memory(target)
            memory = as_bytes(target) if direct else None
            source = (
                None if direct else (item.dtype, span.box.sizes, chunk.strides or strides(overlap.source.box.sizes))
            )
            yield from _cut(Piece(start, start + span.extent * size, target, memory, source), window)


def _cut(piece: Piece, window: int) -> Iterator[Piece]:
    """Cut a piece of plain memory where windows meet; other pieces are short and stay whole."""
    if piece.memory is None or piece.start // window == (piece.stop - 1) // window:
        yield piece
        return
    start = piece.start
    while start < piece.stop:
        stop = min(piece.stop, (start // window + 1) * window)
        memory = piece.memory[start - piece.start : stop - piece.start]
        yield Piece(start, stop, piece.target, memory, None)
        start = stop


def runs_of(index: int, file: DataFile, pieces: Iterable[Piece], window: int, gap: int = 0) -> Iterator[Run]:
    """Yield the reads that bring these pieces of a file. gap: bytes between two that one read may cover."""
    grain = file.grain
    reach = 1 + gap // grain if file.table is not None else 1
    found: list[Piece] = []
    last_block = -1
    for piece in sorted((p for p in pieces if p.stop > p.start), key=lambda p: (p.start, p.stop)):
        same_window = found and piece.start // window == found[0].start // window
        if found and not (same_window and piece.start // grain <= last_block + reach):
            yield Run(index, file, found)
            found, last_block = [], -1
        found.append(piece)
        last_block = max(last_block, (piece.stop - 1) // grain)
    if found:
        yield Run(index, file, found)


def _read_runs(checkpoint: Checkpoint, job: list[Run], slabs: Slabs) -> None:
    for each in job:
        _read_run(checkpoint, each, slabs)


def _read_run(checkpoint: Checkpoint, wanted: Run, slabs: Slabs) -> None:
    file, start, stop = wanted.file, wanted.start, wanted.stop
    buffers = _scatter(wanted.pieces, start, stop)
    if buffers is not None:
        checkpoint.read_verified(file, start // file.grain, buffers)
        return
    scratch, start = read_blocks(checkpoint, file, start, stop, slabs)
    with slabs.copying():
        for piece in wanted.pieces:
            piece.place(scratch, start)
    slabs.give(scratch)


def read_blocks(
    checkpoint: Checkpoint, file: DataFile, start: int, stop: int, slabs: Slabs
) -> tuple[torch.Tensor, int]:
    """Return (slab that begins with the blocks of bytes [start, stop), verified; where they begin). Corrupt."""
    first = start // file.grain
    start, stop = first * file.grain, min(-(-stop // file.grain) * file.grain, file.covered)
    slab = slabs.take(stop - start)
    checkpoint.read_verified(file, first, [as_bytes(slab)[: stop - start]])
    return slab, start


def _scatter(pieces: list[Piece], start: int, stop: int) -> list[memoryview] | None:
    """Buffers that read [start, stop) straight into the pieces' memory; None where that cannot be."""
    buffers, position = [], start
    for piece in pieces:
        if piece.memory is None or piece.start < position:
            return None
        if piece.start > position:
            buffers.append(memoryview(bytearray(piece.start - position)))
        buffers.append(piece.memory)
        position = piece.stop
    if position < stop:
        buffers.append(memoryview(bytearray(stop - position)))
    return buffers
