"""Parameters that lie one after another in a flat buffer which ranks share out evenly: FSDP1, ZeRO.

Each parameter is then a FlatEven partition over the ranks, and a rank holds one run of it, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from distckpt.format.box import Box, Region, Run, parts
from distckpt.format.partition import FlatEven, Grid, Pieces, Split
from distckpt.state import Everywhere, GlobalTensor, Layout, Listed, Shard, check_material, dtype_name

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from distckpt.format.box import Shape


@dataclass(frozen=True, slots=True)
class Ranks:
    """Ranks that share one flat parameter: piece k lies on `pieces[k]`, alike along `replicas`."""

    pieces: tuple[int, ...]
    own: int
    replicas: tuple[Split, ...]

    @property
    def stride(self) -> int | None:
        """Step from piece to piece, None where the ranks are in no such order."""
        step = self.pieces[1] - self.pieces[0] if len(self.pieces) > 1 else 1
        return (
            step if step > 0 and list(self.pieces) == [self.pieces[0] + i * step for i in range(self.count)] else None
        )

    @property
    def count(self) -> int:
        """Pieces of the flat parameter."""
        return len(self.pieces)


@dataclass(frozen=True, slots=True)
class FlatSlot:
    """One parameter of a flat parameter. See slots.Slot.

    `run`: this rank's elements, in storage order, at `start` of the local shard. `order`: dimensions by falling
    stride, where the storage order is not row-major (channels_last).
    """

    parameter: torch.Tensor
    key: Hashable
    shape: Shape
    order: tuple[int, ...] | None
    shard: torch.Tensor
    run: Run
    start: int
    partition: FlatEven | None
    ranks: Ranks
    own_view: bool
    """Whether `parameter` is the parameter's own view (use_orig_params=True), not the whole flat parameter."""

    @property
    def trusted(self) -> bool:
        """FSDP keeps replicas equal."""
        return True

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different parts of it."""
        return self.partition is not None

    @property
    def held(self) -> bool:
        """Whether this rank's optimizer has state for it: that of a flat parameter covers parts without elements."""
        return self.run.numel > 0 or not self.own_view or not prod(self.shape)

    def whole(self, name: str) -> GlobalTensor:
        """See Slot.whole."""
        check_material(self.shard, name)
        return self._described(self.shard[self.start : self.start + self.run.numel], name)

    def part(self, tensor: torch.Tensor, name: str) -> GlobalTensor | None:
        """See Slot.part: a state of the parameter's view, or of the whole shard of the flat parameter."""
        if self.own_view:
            wanted = (self.run.numel,) if self.sharded else self.shape
            return self._described(self._flat(tensor), name) if tuple(tensor.shape) == wanted else None
        if tuple(tensor.shape) != tuple(self.shard.shape):
            return None
        return self._described(tensor.detach()[self.start : self.start + self.run.numel], name)

    def _flat(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elements of a tensor of the parameter's own view, in storage order. No copy: it is laid out like that."""
        tensor = tensor.detach()
        if tensor.dim() <= 1:
            return tensor
        return (tensor.permute(self.order) if self.order else tensor).reshape(-1)

    def _described(self, flat: torch.Tensor, name: str) -> GlobalTensor:
        dtype = dtype_name(flat, name)
        if self.partition is None:
            return GlobalTensor(self.shape, dtype, Everywhere(), tuple(self._shards(flat, self.run)))
        return GlobalTensor(self.shape, dtype, self._layout(), tuple(self._shards(flat, self.run)))

    def _shards(self, flat: torch.Tensor, run: Run) -> Iterator[Shard]:
        if not run.numel:
            return
        if self.order is None:
            whole = run.numel == prod(self.shape)
            yield (
                Shard(Box.whole(self.shape), flat.view(self.shape)) if whole and not self.sharded else Shard(run, flat)
            )
            return
        for region, start, sizes in _permuted(run, self.shape, self.order):
            view = flat[start : start + region.numel].view(sizes)
            yield Shard(region, view.permute(_inverse(self.order)))

    def _layout(self) -> Layout | Listed:
        assert self.partition is not None
        if self.ranks.stride is not None and self.order is None:
            return Layout(self.partition, self.ranks.replicas)
        pieces: list[tuple[int, Region]] = []
        for k, rank in enumerate(self.ranks.pieces):
            for run in FlatEven(self.shape, self.partition.period, self.partition.offset, 0).of_file(k):
                assert isinstance(run, Run)
                boxes = [box for box, _, _ in _permuted(run, self.shape, self.order)] if self.order else [run]
                pieces += [(rank, region) for region in boxes]
        return Listed(Pieces(self.shape, tuple(pieces)))

    def scalar(self, tensor: torch.Tensor, name: str) -> GlobalTensor:
        """See Slot.scalar: it lies on every rank with an element of the parameter."""
        own = (Shard(Box((), ()), tensor.detach()),)
        if self.partition is None:
            return GlobalTensor((), dtype_name(tensor, name), Everywhere(), own)
        first = min(self.partition.offset // self.partition.period, self.ranks.count - 1)
        last = min(
            (self.partition.offset + max(1, prod(self.shape)) - 1) // self.partition.period, self.ranks.count - 1
        )
        layout = self._scalar_layout(first, last - first + 1)
        return GlobalTensor((), dtype_name(tensor, name), layout, own if first <= self.ranks.own <= last else ())

    def _scalar_layout(self, first: int, count: int) -> Layout | Listed:
        if (stride := self.ranks.stride) is None:
            return Listed(Pieces((), ((self.ranks.pieces[first], Box((), ())),)))
        held = tuple(s for s in (Split(count, stride), *self.ranks.replicas) if s.count > 1)
        return Layout(Grid((), (), self.ranks.pieces[0] + first * stride), held)

    def absent(self, dtype: torch.dtype, name: str, *, scalar: bool) -> GlobalTensor:
        """See Slot.absent."""
        if scalar:
            return self.scalar(torch.empty((), dtype=dtype), name)
        return self._described(torch.empty(0, dtype=dtype), name)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """See Slot.empty. Padding is zero, as FSDP makes it."""
        if shape != self.shape:
            return None
        device = self.shard.device
        if not self.own_view:
            return torch.zeros(self.shard.shape, dtype=dtype, device=device)
        if self.sharded:
            return torch.empty(self.run.numel, dtype=dtype, device=device)
        return torch.empty_like(self.parameter.detach(), dtype=dtype)


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=lambda i: order[i])


def _permuted(run: Run, shape: Shape, order: tuple[int, ...] | None) -> Iterator[tuple[Box, int, Shape]]:
    """(box of the tensor, start in the run, sizes in storage order) of each part of a run in storage order."""
    assert order is not None
    for part in parts(run, [shape[d] for d in order]):
        back = _inverse(order)
        box = Box(tuple(part.box.offsets[i] for i in back), tuple(part.box.sizes[i] for i in back))
        yield box, part.start, part.box.sizes


def storage_order(shape: Shape, strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Dimensions as they lie in memory, outermost first; None where that is row-major."""
    order = sorted((d for d, n in enumerate(shape) if n > 1), key=lambda d: -strides[d])
    if order == sorted(order):
        return None
    return (*(d for d, n in enumerate(shape) if n <= 1), *order)
