"""Verified reads, straight into the targets' memory where it is contiguous.

A file is read in windows, several in flight. Within a window, blocks that are needed and adjacent are one read. Where
every piece of such a read is plain contiguous memory it is a scatter read: gaps go into scratch, the rest in place.
Otherwise it goes through scratch, and pieces are copied (and cast, or sent to a device) out of it once verified.
"""

from __future__ import annotations

import mmap
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from distckpt.errors import Corrupt
from distckpt.format.box import Box, overlaps, spans, strides
from distckpt.format.checksum import BLOCK
from distckpt.format.layout import fqn_of
from distckpt.format.partition import Copies
from distckpt.loading.plan import items_of
from distckpt.state import Shard, as_bytes, is_plain_memory, part_of, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.format.datafile import Stored
    from distckpt.loading.open import Checkpoint, DataFile
    from distckpt.loading.plan import Item

WINDOW = 16 << 20
"""Bytes of a file that one read covers at most, in whole blocks, unless less is asked for."""
THREADS = 4
HOLES = 4 << 20
"""Widest stretch, in bytes, that is read for the sake of strided pieces in it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of a file, and the tensor that they fill: its plain memory, or by way of `source`."""

    start: int
    stop: int
    target: torch.Tensor
    memory: memoryview | None
    source: tuple[torch.dtype, tuple[int, ...], tuple[int, ...]] | None

    def place(self, scratch: torch.Tensor, start: int) -> None:
        """Copy the piece out of `scratch` (uint8), which holds the file from byte `start` on."""
        data = scratch[self.start - start : self.stop - start]
        if self.memory is not None:
            self.memory[:] = as_bytes(data)
        elif self.source is not None:
            dtype, sizes, steps = self.source
            if data.storage_offset() % dtype.itemsize:  # other tools align nothing
                data = data.clone()
            self.target.copy_(data.view(dtype).as_strided(sizes, steps))


def read(checkpoint: Checkpoint, items: Iterable[Item], window: int = WINDOW) -> None:
    """Fill the items' shards. Corrupt where a block does not match its checksum; then targets are a mix.

    window: bytes of a file that one read covers at most, of which several are in flight.
    """
    by_file: dict[int, list[Item]] = {}
    for item in items:
        by_file.setdefault(item.file, []).append(item)
    jobs: list[tuple[DataFile, list[list[Piece]]]] = []
    for index, wanted in sorted(by_file.items()):
        file = checkpoint.data_file(index)
        runs = list(_runs((p for i in wanted for p in _pieces(file, i, window)), file, window))
        jobs += [(file, runs)] if file.sequential else [(file, [run]) for run in runs]
    with ThreadPoolExecutor(THREADS, "distckpt-read") as pool:
        futures = [pool.submit(_read_runs, checkpoint, file, runs) for file, runs in jobs]
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
    dtype, rows = torch_dtype(one.dtype), one.shape[0] if one.shape else 1
    height = max(1, WINDOW * rows // max(1, prod(one.shape) * dtype.itemsize))
    for row in range(0, rows, height):
        sizes = (min(height, rows - row), *one.shape[1:]) if one.shape else ()
        region = Box((row,) * bool(one.shape) + (0,) * len(one.shape[1:]), sizes)
        both = [Shard(region, torch.empty(sizes, dtype=dtype)) for _ in range(2)]
        read(checkpoint, [*items_of(a, a, one, both[0]), *items_of(b, b, other, both[1])])
        if as_bytes(both[0].tensor) != as_bytes(both[1].tensor):
            return False
    return True


def refuse_damaged(checkpoint: Checkpoint, items: Iterable[Item]) -> None:
    """Corrupt unless the file of every item has its chunk, of the right length: asked before anything moves."""
    for item in items:
        _chunk(checkpoint.data_file(item.file), item)


def _chunk(file: DataFile, item: Item) -> Stored:
    chunk = file.chunks.get(item.name)
    if chunk is None or (chunk.strides is None and chunk.stop - chunk.start != item.region.numel * item.dtype.itemsize):
        raise Corrupt(f"{file.key}: chunk {item.name!r} of {fqn_of(item.name)} is not as the commit says")
    return chunk


def _pieces(file: DataFile, item: Item, window: int) -> Iterator[Piece]:
    """Pieces of one chunk, as the shard's memory takes them."""
    size = item.dtype.itemsize
    chunk = _chunk(file, item)
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
    if piece.memory is None:
        yield piece
        return
    start = piece.start
    while start < piece.stop:
        stop = min(piece.stop, (start // window + 1) * window)
        memory = piece.memory[start - piece.start : stop - piece.start]
        yield Piece(start, stop, piece.target, memory, None)
        start = stop


def _runs(pieces: Iterable[Piece], file: DataFile, window: int) -> Iterator[list[Piece]]:
    """Pieces by the reads that bring them: the same window, their blocks (of `file.grain`) adjacent or the same."""
    grain = file.grain
    run: list[Piece] = []
    last_block = -1
    for piece in sorted((p for p in pieces if p.stop > p.start), key=lambda p: (p.start, p.stop)):
        same_window = run and piece.start // window == run[0].start // window
        if run and not (same_window and piece.start // grain <= last_block + 1):
            yield run
            run, last_block = [], -1
        run.append(piece)
        last_block = max(last_block, (piece.stop - 1) // grain)
    if run:
        yield run


def _read_runs(checkpoint: Checkpoint, file: DataFile, runs: list[list[Piece]]) -> None:
    for run in runs:
        _read_run(checkpoint, file, run)


def _read_run(checkpoint: Checkpoint, file: DataFile, run: list[Piece]) -> None:
    first = run[0].start // file.grain
    start = first * file.grain
    stop = min(-(-max(p.stop for p in run) // file.grain) * file.grain, file.covered)
    buffers = _scatter(run, start, stop)
    scratch = None
    if buffers is None:
        # goes back to the system at once: of malloc's memory each thread would keep its largest scratch
        scratch = torch.frombuffer(mmap.mmap(-1, stop - start), dtype=torch.uint8)
        buffers = [as_bytes(scratch)]
    checkpoint.read(file.key, start, buffers)
    file.verify(first, list(_blocks(buffers)))
    if scratch is not None:
        with torch.no_grad():
            for piece in run:
                piece.place(scratch, start)


def _scatter(run: list[Piece], start: int, stop: int) -> list[memoryview] | None:
    """Buffers that read [start, stop) straight into the pieces' memory; None where that cannot be."""
    buffers, position = [], start
    for piece in run:
        if piece.memory is None or piece.start < position:
            return None
        if piece.start > position:
            buffers.append(memoryview(bytearray(piece.start - position)))
        buffers.append(piece.memory)
        position = piece.stop
    if position < stop:
        buffers.append(memoryview(bytearray(stop - position)))
    return buffers


def _blocks(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut consecutive buffers into blocks, each the list of its pieces."""
    block: list[memoryview] = []
    room = BLOCK
    for buffer in buffers:
        position = 0
        while position < len(buffer):
            piece = buffer[position : position + room]
            block.append(piece)
            position += len(piece)
            room -= len(piece)
            if not room:
                yield block
                block, room = [], BLOCK
    if block:
        yield block
