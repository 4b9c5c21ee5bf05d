"""From live tensors to the content of a data file: which chunks a rank writes, and their bytes where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from distckpt.errors import Unsupported
from distckpt.format import datafile
from distckpt.format.box import Box
from distckpt.format.layout import chunk_name
from distckpt.format.partition import regions_of
from distckpt.state import Everywhere, Layout, cut

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from distckpt.format.box import Region
    from distckpt.format.partition import Partition
    from distckpt.saving.merge import Agreed
    from distckpt.state import GlobalTensor, State

MODEL_LEAD = "model."


@dataclass(frozen=True, slots=True)
class Laid:
    """The chunks of one rank's data file, laid out: in file order, the fqn and region of each."""

    packed: datafile.Packed
    places: tuple[tuple[str, Region], ...]


def lay_out(tensors: Mapping[str, Agreed], partitions: Mapping[str, Partition], rank: int) -> Laid:
    """Lay out what `rank` writes: the model's chunks before the others within an item size."""
    places, chunks = {}, []
    for fqn, partition in partitions.items():
        for region in regions_of(partition, rank):
            name = chunk_name(fqn, region, partition.shape)
            places[name] = (fqn, region)
            sizes = region.sizes if isinstance(region, Box) else (region.numel,)
            chunks.append(datafile.Chunk(name, tensors[fqn].dtype, sizes, not fqn.startswith(MODEL_LEAD)))
    packed = datafile.pack(chunks)
    return Laid(packed, tuple(places[segment.name] for segment in packed.segments))


def held(state: State, laid: Laid, rank: int) -> list[torch.Tensor]:
    """Views of live memory, of each chunk in file order. Unsupported if `rank`, this one, does not hold one of them."""
    found = [view_of(state, fqn, region, rank) for fqn, region in laid.places]
    for view, (fqn, _), segment in zip(found, laid.places, laid.packed.segments, strict=True):
        if view.nbytes != segment.nbytes:
            raise Unsupported(
                f"{fqn}: the part of rank {rank} has {view.nbytes} bytes, and should have {segment.nbytes}"
            )
    return found


def view_of(state: State, fqn: str, region: Region, rank: int) -> torch.Tensor:
    """View of live memory: a region of a tensor. Unsupported if `rank`, this one, does not hold it."""
    whole: GlobalTensor | None = state.tensors.get(fqn)
    for shard in whole.shards if whole else ():
        if (view := cut(shard, region)) is not None:
            return view
    raise Unsupported(f"{fqn}: rank {rank} should hold {region}, and does not; other ranks say it does")


def local_bytes(state: State, world_size: int) -> int:
    """About how many bytes a rank will write of a state: what it holds, divided by those who hold the same."""
    found = 0
    for whole in state.tensors.values():
        layout = whole.layout
        if isinstance(layout, Everywhere):
            copies = world_size if whole.trusted else 1
        else:
            copies = prod(split.count for split in layout.replicas) if isinstance(layout, Layout) else 1
        found += sum(shard.tensor.nbytes for shard in whole.shards) // copies
    return found
