"""The tensors that are saved and loaded: each cut along its first dimension over the ranks, all of different values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distckpt import TrainState

if TYPE_CHECKING:
    from benchmarks.ranks import World

LARGE = 8 << 20
"""Bytes of a rank's part of a large tensor, in the benchmarks of large ones."""
SMALL = 32 << 10


class Wrong(Exception):
    """What was loaded is not what was saved."""


class Holder(nn.Module):
    """Tensors as a module's parameters."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=t.is_floating_point()))


class Sharded:
    """`count` tensors of which each rank holds `each` bytes. `local`: its parts; `whole`: the same as DTensors."""

    def __init__(self, world: World, count: int, each: int) -> None:
        torch.manual_seed(world.rank)
        shape = (each // 4 // 64, 64) if each % 256 == 0 else (each // 4,)
        mesh = init_device_mesh(world.device.type, (world.size,))
        self.local = {f"w{i}": torch.rand(shape, device=world.device) for i in range(count)}
        self.whole = {name: DTensor.from_local(t, mesh, [Shard(0)]) for name, t in self.local.items()}
        self._truth = {name: t.cpu().clone() for name, t in self.local.items()}
        self.nbytes = count * each * world.size

    @classmethod
    def large(cls, world: World, nbytes: int) -> Sharded:
        """Tensors of 8 MiB a rank (fewer bytes: of less), so many bytes over all ranks."""
        own = nbytes // world.size
        each = min(LARGE, max(SMALL, own // 4) // SMALL * SMALL)
        return cls(world, max(1, own // each), each)

    @classmethod
    def small(cls, world: World, nbytes: int) -> Sharded:
        """Tensors of 32 KiB a rank, so many bytes over all ranks."""
        return cls(world, max(1, nbytes // world.size // SMALL), SMALL)

    def state(self) -> TrainState:
        """The tensors as distckpt takes them."""
        return TrainState(model=Holder(self.whole), rng=False)

    def part(self, leads: tuple[str, ...]) -> dict[str, Any]:
        """Tensors whose names begin like this, as DTensors."""
        return {name: t for name, t in self.whole.items() if name.startswith(leads)}

    def scrub(self) -> None:
        """Overwrite every tensor, so that a load must bring it back."""
        for t in self.local.values():
            t.fill_(-1)

    def verify(self, leads: tuple[str, ...] = ("",)) -> None:
        """Wrong unless every tensor (whose name begins so) is bit for bit what it was made as."""
        wrong = [
            name
            for name, t in self.local.items()
            if name.startswith(leads) and not torch.equal(as_bits(t.cpu()), as_bits(self._truth[name]))
        ]
        if wrong:
            raise Wrong(f"{len(wrong)} of {len(self.local)} tensors are not as they were saved: {', '.join(wrong[:4])}")


def as_bits(t: torch.Tensor) -> torch.Tensor:
    """Memory of a tensor as bytes: what is not a number is equal to itself, too."""
    return t.contiguous().view(-1).view(torch.uint8)
