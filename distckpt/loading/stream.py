"""The bytes of regions of tensors in order, verified, through one small buffer: for copies from one format to another.

What is asked for need not be what was saved: a region is put together from the chunks that hold it, and cast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distckpt.format.box import Box, Run, parts
from distckpt.format.checksum import BLOCK
from distckpt.format.layout import chunk_name
from distckpt.loading.plan import Item
from distckpt.loading.read import read
from distckpt.state import Shard, as_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.format.box import Region
    from distckpt.loading.open import Checkpoint

ROOM = 24 << 20
"""Bytes read at once: many, as a block that two reads share is read twice."""

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, stop) of a region of a tensor, in the region's own row-major order, as elements of `dtype`.

    file: of tensors of which files hold copies that differ, whose it is.
    """

    fqn: str
    region: Region
    dtype: str
    start: int
    stop: int
    file: int | None = None

    @staticmethod
    def whole(fqn: str, region: Region, dtype: str, file: int | None = None) -> Stretch:
        """All elements of a region."""
        return Stretch(fqn, region, dtype, 0, region.numel, file)


def stream(checkpoint: Checkpoint, wanted: Iterable[Stretch], room: int = ROOM) -> Iterator[tuple[int, memoryview]]:
    """Yield (index in `wanted`, bytes) in order; bytes are good until the next are asked for. Corrupt.

    room: bytes of the buffer.
    """
    memory = torch.empty(room, dtype=torch.uint8)
    batch: list[tuple[int, torch.Tensor, list[Item]]] = []
    filled = 0
    name, made = "", torch.empty(0)
    for index, stretch in enumerate(wanted):
        if computed := checkpoint.computed(stretch.fqn):
            yield from _filled(checkpoint, batch, room)
            batch, filled = [], 0
            if name != stretch.fqn:
                made = torch.empty(0)  # one at a time is held
                name, made = stretch.fqn, computed.make()
            yield from ((index, data) for data in _parts(made, stretch, memory))
            continue
        dtype = torch_dtype(stretch.dtype)
        at = stretch.start
        while at < stretch.stop:
            count = min(stretch.stop - at, (room - filled) // dtype.itemsize)
            if not count:
                yield from _filled(checkpoint, batch, room)
                batch, filled = [], 0
                continue
            data = memory[filled : filled + count * dtype.itemsize]
            items = list(_items(checkpoint, stretch, Run(at, at + count), data.view(dtype)))
            batch.append((index, data, items))
            at += count
            filled = min(room, -(-(filled + len(data)) // _ALIGNMENT) * _ALIGNMENT)
    yield from _filled(checkpoint, batch, room)


def whole(checkpoint: Checkpoint, fqn: str) -> torch.Tensor:
    """A tensor, read into memory. Corrupt."""
    info = checkpoint.manifest.tensors[fqn]
    stretch = Stretch.whole(fqn, Box.whole(info.shape), info.dtype)
    found = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    items = _items(checkpoint, stretch, Run(0, stretch.stop), found.view(-1)) if stretch.stop else ()
    read(checkpoint.base, items, BLOCK)
    return found


def _parts(made: torch.Tensor, stretch: Stretch, memory: torch.Tensor) -> Iterator[memoryview]:
    """Bytes of a stretch of a tensor that is in memory, as elements of the stretch's dtype."""
    dtype = torch_dtype(stretch.dtype)
    most = len(memory) // dtype.itemsize
    for at in range(stretch.start, stretch.stop, most):
        count = min(most, stretch.stop - at)
        data = memory[: count * dtype.itemsize]
        for shard in _shards(stretch.region, Run(at, at + count), data.view(dtype)):
            region = shard.region
            if isinstance(region, Run):
                shard.tensor.copy_(made.reshape(-1)[region.start : region.stop])
            else:
                ends = zip(region.offsets, region.sizes, strict=True)
                shard.tensor.copy_(made[tuple(slice(a, a + n) for a, n in ends)])
        yield as_bytes(data)


def _items(checkpoint: Checkpoint, stretch: Stretch, run: Run, data: torch.Tensor) -> Iterator[Item]:
    """What fills `data` with elements `run` of a region."""
    info = checkpoint.base.manifest.tensors[name := checkpoint.saved_name(stretch.fqn)]
    dtype = torch_dtype(info.dtype)
    for shard in _shards(stretch.region, run, data):
        for file, region in info.partition.overlapping(shard.region):
            at = stretch.file if stretch.file is not None else file
            yield Item(stretch.fqn, at, chunk_name(name, region, info.shape), region, info.shape, dtype, shard)


def _shards(region: Region, run: Run, data: torch.Tensor) -> Iterator[Shard]:
    """Elements `run` of a region as regions of the tensor, each with its part of `data`."""
    if isinstance(region, Run):
        yield Shard(Run(region.start + run.start, region.start + run.stop), data)
        return
    for part in parts(run, region.sizes):
        offsets = tuple(a + b for a, b in zip(region.offsets, part.box.offsets, strict=True))
        memory = data[part.start : part.start + part.box.numel].view(part.box.sizes)
        yield Shard(Box(offsets, part.box.sizes), memory)


def _filled(
    checkpoint: Checkpoint, batch: list[tuple[int, torch.Tensor, list[Item]]], room: int
) -> Iterator[tuple[int, memoryview]]:
    read(checkpoint.base, (item for _, _, items in batch for item in items), max(BLOCK, room // 8 // BLOCK * BLOCK))
    for index, data, _ in batch:
        yield index, as_bytes(data)
