"""Live tensors that share memory, found before it is filled: of two saved values that differ, one would be lost."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING

import torch

from distckpt.errors import Mismatch
from distckpt.loading.read import read
from distckpt.state import Shard, as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distckpt.loading.open import Checkpoint
    from distckpt.loading.plan import Item


def refuse_shared(checkpoint: Checkpoint, items: Iterable[Item]) -> None:
    """Mismatch unless all that would fill the same memory is the same. Only what is shared is read for it.

    Views that leave gaps (every other column of a tensor) are taken to share nothing.
    """
    by_shard: dict[int, list[Item]] = {}
    for item in items:
        by_shard.setdefault(id(item.shard), []).append(item)
    filled = ((_memory(of_shard[0].shard.tensor), of_shard) for of_shard in by_shard.values())
    last = ("", 0, 0)
    wanted: list[Item] = []
    for memory, of_shard in sorted(((m, of) for m, of in filled if m), key=itemgetter(0)):
        if memory[0] == last[0] and memory[1] < last[2]:
            before, here = _filled(checkpoint, wanted), _filled(checkpoint, of_shard)
            shared = before[memory[1] - last[1] :][: len(here)]
            if shared != here[: len(shared)]:
                raise Mismatch(
                    f"{of_shard[0].fqn}: shares memory with {wanted[0].fqn} here, and the checkpoint has other values "
                    "for it: clone() one of them, or load one alone"
                )
        if memory[0] != last[0] or memory[2] > last[2]:
            last, wanted = memory, of_shard


def _memory(tensor: torch.Tensor) -> tuple[str, int, int] | None:
    """(device, first byte, byte after the last) of a tensor's memory; None for a view with gaps."""
    if not tensor.numel() or not (tensor.is_contiguous() or _reach(tensor) == tensor.numel()):
        return None
    start = tensor.data_ptr()
    return str(tensor.device), start, start + tensor.nbytes


def _reach(tensor: torch.Tensor) -> int:
    """Elements from the first to the last in memory."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _filled(checkpoint: Checkpoint, items: list[Item]) -> memoryview:
    """Memory of a shard as its items would fill it."""
    live = items[0].shard
    flat = torch.empty(live.tensor.numel(), dtype=live.tensor.dtype)
    alike = Shard(live.region, flat.as_strided(live.tensor.shape, live.tensor.stride()))
    read(checkpoint, [item._replace(shard=alike) for item in items])
    return as_bytes(flat)
