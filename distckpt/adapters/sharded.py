"""ShardedTensor: what FSDP1's sharded state dicts and torchrec hold. No collectives: each rank knows the layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distckpt.errors import Unsupported
from distckpt.format.box import Box
from distckpt.format.partition import Pieces
from distckpt.state import GlobalTensor, Listed, Shard, check_material, dtype_name

if TYPE_CHECKING:
    from torch.distributed._shard.metadata import ShardMetadata
    from torch.distributed._shard.sharded_tensor.api import ShardedTensor


def describe(tensor: ShardedTensor, fqn: str) -> GlobalTensor:
    """Describe a ShardedTensor as a global tensor, its shards this rank's own. Unsupported, with the fqn."""
    whole = tensor.metadata()
    pieces = []
    for shard in whole.shards_metadata:
        rank = shard.placement.rank() if shard.placement is not None else None  # of the whole job, not of its group
        if rank is None:
            raise Unsupported(f"{fqn}: a ShardedTensor whose shard at {shard.shard_offsets} is on no rank")
        pieces.append((rank, _box(shard)))
    shards = []
    for local in tensor.local_shards():
        if type(local.tensor) not in {torch.Tensor, torch.nn.Parameter} or local.tensor.layout is not torch.strided:
            raise Unsupported(f"{fqn}: a ShardedTensor over {type(local.tensor).__qualname__} cannot be saved")
        check_material(local.tensor, fqn)
        if list(local.tensor.shape) != list(local.metadata.shard_sizes):
            raise Unsupported(
                f"{fqn}: its shard at {local.metadata.shard_offsets} says {local.metadata.shard_sizes}, and has "
                f"{list(local.tensor.shape)}"
            )
        shards.append(Shard(_box(local.metadata), local.tensor.detach()))
    shape = tuple(whole.size)
    listed = Listed(Pieces(shape, tuple(piece for piece in pieces if piece[1].numel)))
    dtype = dtype_name(torch.empty(0, dtype=whole.tensor_properties.dtype), fqn)
    return GlobalTensor(shape, dtype, listed, tuple(shards))


def _box(shard: ShardMetadata) -> Box:
    return Box(tuple(shard.shard_offsets), tuple(shard.shard_sizes))
