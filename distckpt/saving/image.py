"""From live tensors to the content of a data file: which chunks a rank writes, and their bytes where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distckpt.errors import Unsupported
from distckpt.format import datafile
from distckpt.format.layout import chunk_name
from distckpt.state import as_bytes, cut, is_plain_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from distckpt.format.partition import Partition
    from distckpt.state import GlobalTensor, State

MODEL_LEAD = "model."


def own_chunks(state: State, partitions: Mapping[str, Partition], rank: int) -> dict[str, tuple[str, torch.Tensor]]:
    """Chunks that `rank` writes: name -> (fqn, view of live memory). Unsupported if it does not hold one of them."""
    found = {}
    for fqn, partition in partitions.items():
        for region in partition.of_file(rank):
            held: GlobalTensor | None = state.tensors.get(fqn)
            view = None
            for shard in held.shards if held else ():
                if (view := cut(shard, region)) is not None:
                    break
            if view is None:
                raise Unsupported(f"{fqn}: rank {rank} should hold {region}, and does not; other ranks say it does")
            found[chunk_name(fqn, region, partition.shape)] = (fqn, view)
    return found


def build(chunks: Mapping[str, tuple[str, torch.Tensor]], objects: bytes) -> datafile.Image:
    """Image of the data file with these chunks: the model's before the others within an item size."""
    return datafile.build(
        (
            datafile.Chunk(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), not fqn.startswith(MODEL_LEAD))
            for name, (fqn, t) in chunks.items()
        ),
        objects,
    )


def live(image: datafile.Image, chunks: Mapping[str, tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    """Content of an image's segments, where it lies; a tensor that is not plain memory is copied, one at a time."""
    for segment in image.segments:
        tensor = chunks[segment.name][1]
        if not is_plain_memory(tensor):
            tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        yield as_bytes(tensor)
