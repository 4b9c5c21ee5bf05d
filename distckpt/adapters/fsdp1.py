"""FSDP1 (`FullyShardedDataParallel`): parameters as flat runs of a flat parameter's shard. No collectives, no copies.

FSDP1 lays the parameters of a module one after another (with padding between them) into a flat parameter, and cuts
that evenly. What is read here is private to torch, checked at torch 2.13; `private` guards each name.

    local shard    flat[rank * period : (rank + 1) * period]; parameter i lies at `offset_in_shard` of it
    use_orig_params=True    the optimizer has each parameter's own 1-D view of the shard (none where it has no element)
    use_orig_params=False   the optimizer has the flat parameter: its states are cut as the shard is
    NO_SHARD                every rank holds the whole flat parameter
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from torch.distributed import get_process_group_ranks
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._runtime_utils import _reshard

from distckpt.adapters.dtensor import private
from distckpt.adapters.flat import FlatSlot, Ranks, storage_order
from distckpt.errors import Unsupported
from distckpt.format.box import Run
from distckpt.format.partition import FlatEven, Split

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn


def slots(module: nn.Module) -> Iterator[tuple[str, FlatSlot, list[torch.Tensor]]]:
    """(name, slot, parameters that it stands for) of each parameter that FSDP1 holds, tied ones under each name.

    Unsupported, with the fqn, for a layout that this adapter does not know.
    """
    for path, owner in module.named_modules():
        if not isinstance(owner, FullyShardedDataParallel) or private(owner, "_handle") is None:
            continue
        lead, flat = path + "." * bool(path), private(private(owner, "_handle"), "flat_param")
        names = private(flat, "_fqns")
        found = list(_slots_of(owner, lead))
        for name, slot in zip(names, found, strict=True):
            yield lead + name, slot, _stands_for(flat)
        for alias, primary in _tied(flat):
            yield lead + alias, found[names.index(primary)], []


def _stands_for(flat: Any) -> list[torch.Tensor]:
    return [flat, *(private(flat, "_params") or []), *(private(flat, "_shared_params") or [])]


def _tied(flat: Any) -> Iterator[tuple[str, str]]:
    """(name, the name it is tied to), as the flat parameter's module has them."""
    for info in private(flat, "_shared_param_infos"):
        names = (info.module_name, info.param_name), (info.prim_module_name, info.prim_param_name)
        yield tuple(f"{module}.{name}" if module else name for module, name in names)  # type: ignore[misc]


def _slots_of(owner: FullyShardedDataParallel, lead: str) -> Iterator[FlatSlot]:
    handle = private(owner, "_handle")
    flat = private(handle, "flat_param")
    shard = flat._local_shard if hasattr(flat, "_local_shard") else flat.data  # set by the first forward pass
    sharded, ranks = private(handle, "uses_sharded_strategy"), _ranks(owner)
    padded, padding = private(flat, "_numels_with_padding"), private(flat, "_is_padding_mask")
    starts = accumulate(padded, initial=0)
    offsets = [start for start, is_padding in zip(starts, padding, strict=False) if not is_padding]
    period = prod(private(flat, "_sharded_size"))
    rows = zip(flat._fqns, flat._shapes, flat._strides, flat._shard_param_infos, flat._param_extensions, strict=True)
    for i, (name, shape, strides, info, extension) in enumerate(rows):
        if extension is not None:
            raise Unsupported(
                f"{lead}{name}: FSDP1 over tensor parallelism cannot be saved; use FSDP2 (fully_shard) with it"
            )
        stride = ranks.stride or 1
        divided = FlatEven(tuple(shape), period, offsets[i], ranks.pieces[0], stride) if sharded else None
        run = Run(info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else Run(0, 0)
        known = (
            [*FlatEven(tuple(shape), period, offsets[i], 0).of_file(ranks.own)] if sharded else [Run(0, prod(shape))]
        )
        if [run] != (known or [Run(0, 0)]):
            raise Unsupported(
                f"{lead}{name}: FSDP1 says that this rank holds {run} of shape {tuple(shape)}, not {known}"
            )
        yield FlatSlot(
            flat._params[i] if flat._params is not None else flat,
            (id(flat), i),
            tuple(shape),
            storage_order(tuple(shape), strides),
            shard.detach(),
            run,
            info.offset_in_shard or 0,
            divided,
            ranks,
            flat._params is not None,
        )


def _ranks(owner: FullyShardedDataParallel) -> Ranks:
    handle = private(owner, "_handle")
    ranks = tuple(get_process_group_ranks(private(handle, "process_group")))
    own = private(handle, "rank")
    inter = getattr(owner, "_inter_node_pg", None)
    if inter is None or not private(handle, "uses_sharded_strategy"):
        return Ranks(ranks, own, ())
    copies = get_process_group_ranks(inter)
    step = copies[1] - copies[0] if len(copies) > 1 else 0
    if step <= 0 or copies != [copies[0] + i * step for i in range(len(copies))]:
        return Ranks(ranks, own, ())  # each shard group says its own: the ranks find out that they are replicas
    first = ranks[own] - copies[0]  # how far this rank's shard group lies from the first
    return Ranks(tuple(r - first for r in ranks), own, (Split(len(copies), step),))


def reshard(owner: nn.Module) -> None:
    """Free what a forward pass has gathered, so that the next one gathers what a load has put into the shards."""
    if isinstance(owner, FullyShardedDataParallel) and (handle := private(owner, "_handle")) is not None:
        flat = private(handle, "flat_param")
        if private(handle, "uses_sharded_strategy") and hasattr(flat, "_local_shard"):
            _reshard(owner, handle, True)


def parallelism(module: nn.Module) -> str:
    """Describe the outermost FSDP1 module, "" if there is none."""
    for owner in module.modules():
        if isinstance(owner, FullyShardedDataParallel):
            return f"FullyShardedDataParallel, {owner.sharding_strategy.name}"
    return ""
