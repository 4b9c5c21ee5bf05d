"""Parameters of an engine as slots: pieces of flat fp32 buffers, or tensors of their own.

    ZeRO-1, ZeRO-2, BF16_Optimizer    parameters of a group lie one after another in a flat buffer, cut evenly: rank r
                                      has elements [r * period, (r + 1) * period) of it, the last ones padding
    ZeRO-3                            each parameter is cut evenly for itself, in pieces of ceil(numel / ranks); the
                                      pieces of a sub-group lie one after another in a rank's flat buffer
    FP16_Optimizer                    every rank has the whole flat buffer of a group
    FP16_UnfusedOptimizer             every rank has an fp32 copy of each parameter
    others, and frozen parameters     the parameter itself (under ZeRO-3, this rank's piece of it)

What an optimizer's groups hold is the flat buffer, so the slots of its parameters share their `parameter`.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

from torch.distributed import get_process_group_ranks, get_rank

from distckpt.adapters.flat import FlatSlot, Ranks
from distckpt.adapters.zero.engine import owner_of, private
from distckpt.adapters.zero.stages import TiedSlot, copies
from distckpt.errors import Unsupported
from distckpt.format.box import Run
from distckpt.format.partition import FlatEven

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    Found = tuple[torch.Tensor, FlatSlot | torch.Tensor]
    """A parameter of the model, and where its master weight is."""


def masters(engine: Any) -> list[list[torch.Tensor]]:
    """What the optimizer of an engine holds in each of its groups, between steps too (ZeRO-3 fills them only then)."""
    owner = owner_of(engine)
    if not hasattr(owner, "fp32_partitioned_groups_flat"):
        return [group["params"] for group in private(owner, "param_groups")]
    found: list[list[torch.Tensor]] = [[] for _ in private(owner, "param_groups")]
    for i, flat in enumerate(owner.fp32_partitioned_groups_flat):
        found[private(owner, "sub_group_to_group_id")[i]].append(flat)
    return found


def in_group_order(engine: Any) -> dict[int, int]:
    """Place of each trained parameter in the optimizer's groups as they were given, by its id.

    Not in the flat buffers, in which `round_robin_gradients` changes it.
    """
    owner = owner_of(engine)
    names = ("bit16_groups", "bf16_groups", "fp16_groups")
    groups = next((getattr(owner, name) for name in names if getattr(owner, name, None)), None)
    if groups is None:
        groups = [group["params"] for group in getattr(owner, "param_groups", ())]
    return {id(p): i for i, p in enumerate(p for group in groups for p in group)}


def found_in(engine: Any) -> dict[int, FlatSlot | TiedSlot | torch.Tensor]:
    """Where each parameter has its master, by the parameter's id; those of which it is the parameter are not in it."""
    owner = owner_of(engine)
    if hasattr(owner, "fp32_partitioned_groups_flat"):
        pieces = _apart(owner)
    elif hasattr(owner, "single_partition_of_fp32_groups"):
        pieces = _together(private(owner, "round_robin_bit16_groups"), owner.single_partition_of_fp32_groups, owner)
    elif hasattr(owner, "fp32_groups_flat_partition"):
        pieces = _together(private(owner, "bf16_groups"), owner.fp32_groups_flat_partition, owner)
    elif hasattr(owner, "fp32_groups_flat"):
        pieces = _everywhere(private(owner, "fp16_groups"), owner.fp32_groups_flat)
    elif hasattr(owner, "fp32_groups"):
        pairs = zip(private(owner, "fp16_groups"), owner.fp32_groups, strict=True)
        pieces = ((p, copy) for group, copies in pairs for p, copy in zip(group, copies, strict=True))
    else:
        pieces = iter(())
    found: dict[int, FlatSlot | TiedSlot | torch.Tensor] = {id(parameter): slot for parameter, slot in pieces}
    for parameter in engine.module.parameters():
        if id(parameter) not in found and hasattr(parameter, "ds_tensor"):
            found[id(parameter)] = _frozen(parameter)
    for parameter, saved_by in copies(engine):
        slot = found.get(id(parameter))
        if isinstance(slot, FlatSlot) and slot.sharded:
            found[id(parameter)] = TiedSlot(slot, saved_by)
    return found


def _slot(
    parameter: torch.Tensor, shape: Sequence[int], flat: torch.Tensor, place: tuple[int, int, int], ranks: Ranks
) -> FlatSlot:
    """Slot of a parameter; `place`: (period, offset, start in this rank's buffer) of it."""
    period, offset, start = place
    divided = FlatEven(tuple(shape), max(1, period), offset, ranks.pieces[0], ranks.stride or 1)
    own = FlatEven(tuple(shape), max(1, period), offset, 0).of_file(ranks.own)
    run = next(own, Run(0, 0))
    assert isinstance(run, Run)
    if start + run.numel > flat.numel():
        raise Unsupported(f"{tuple(shape)} at {place}: does not lie in the flat buffer of {flat.numel()} elements")
    return FlatSlot(flat, id(parameter), tuple(shape), None, flat.detach(), run, start, divided, ranks, False)


def _together(groups: Sequence[Sequence[torch.Tensor]], flats: Sequence[torch.Tensor], owner: Any) -> Iterator[Found]:
    aligned = getattr(owner, "round_robin_bit16_offsets", None)  # parameter_alignment pads between parameters
    for g, (members, flat) in enumerate(zip(groups, flats, strict=True)):
        ranks = _ranks(private(owner, "real_dp_process_group")[g])
        offsets = aligned[g] if aligned else accumulate((p.numel() for p in members), initial=0)
        for p, offset in zip(members, offsets, strict=False):
            start = max(0, offset - ranks.own * flat.numel())
            yield p, _slot(p, p.shape, flat, (flat.numel(), offset, min(start, flat.numel())), ranks)


def _apart(owner: Any) -> Iterator[Found]:
    for members, flat in zip(private(owner, "fp16_groups"), owner.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for p in members:
            period = private(p, "partition_numel")()
            ranks = _ranks(private(p, "ds_process_group"))
            yield p, _slot(p, private(p, "ds_shape"), flat, (period, 0, start), ranks)
            start += period


def _everywhere(groups: Sequence[Sequence[torch.Tensor]], flats: Sequence[torch.Tensor]) -> Iterator[Found]:
    here = Ranks((0,), 0, ())
    for members, flat in zip(groups, flats, strict=True):
        start = 0
        for p in members:
            shape, run = tuple(p.shape), Run(0, prod(p.shape))
            yield p, FlatSlot(flat, id(p), shape, None, flat.detach(), run, start, None, here, False)
            start += p.numel()


def _frozen(parameter: torch.Tensor) -> FlatSlot:
    piece = private(parameter, "ds_tensor")
    if hasattr(piece, "ds_quant_scale"):
        raise Unsupported("frozen weights that ZeRO-3 has quantized (zero_quantized_nontrainable_weights)")
    ranks = _ranks(private(parameter, "ds_process_group"))
    return _slot(parameter, private(parameter, "ds_shape"), piece, (private(piece, "ds_numel"), 0, 0), ranks)


def _ranks(group: Any) -> Ranks:
    return Ranks(tuple(get_process_group_ranks(group)), get_rank(group), ())
