"""The bytes of chunks in order, verified, through one small buffer: for copies from one format to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distckpt.format.box import Box, Run
from distckpt.format.layout import fqn_of
from distckpt.load.plan import Item
from distckpt.load.read import read
from distckpt.state import Shard, as_bytes, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.format.box import Region
    from distckpt.load.open import Checkpoint

ROOM = 8 << 20
"""Bytes read at once."""

_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, stop) of a chunk, in the row-major order of its own region."""

    file: int
    name: str
    region: Region
    dtype: str
    start: int
    stop: int

    @staticmethod
    def whole(file: int, name: str, region: Region, dtype: str) -> Stretch:
        """All elements of a chunk."""
        return Stretch(file, name, region, dtype, 0, region.numel)


def stream(checkpoint: Checkpoint, wanted: Iterable[Stretch]) -> Iterator[tuple[int, memoryview]]:
    """Yield (index in `wanted`, bytes) in order; bytes are good until the next are asked for. Corrupt."""
    room = torch.empty(ROOM, dtype=torch.uint8)
    batch: list[tuple[int, torch.Tensor, Item]] = []
    filled = 0
    for index, stretch in enumerate(wanted):
        dtype = torch_dtype(stretch.dtype)
        at = stretch.start
        while at < stretch.stop:
            count = min(stretch.stop - at, (ROOM - filled) // dtype.itemsize)
            if not count:
                yield from _filled(checkpoint, batch)
                batch, filled = [], 0
                continue
            data = room[filled : filled + count * dtype.itemsize]
            batch.append((index, data, _item(stretch, dtype, Run(at, at + count), data)))
            at += count
            filled = min(ROOM, -(-(filled + len(data)) // _ALIGNMENT) * _ALIGNMENT)
    yield from _filled(checkpoint, batch)


def _item(stretch: Stretch, dtype: torch.dtype, run: Run, data: torch.Tensor) -> Item:
    sizes = stretch.region.sizes if isinstance(stretch.region, Box) else (stretch.region.numel,)
    shard = Shard(run, data.view(dtype))
    return Item(fqn_of(stretch.name), stretch.file, stretch.name, Box.whole(sizes), sizes, dtype, shard)


def _filled(checkpoint: Checkpoint, batch: list[tuple[int, torch.Tensor, Item]]) -> Iterator[tuple[int, memoryview]]:
    read(checkpoint, (item for _, _, item in batch))
    for index, data, _ in batch:
        yield index, as_bytes(data)
