"""Working weights of an engine, from masters that a load has filled. Collective where ranks share the weights out."""

from __future__ import annotations

from typing import Any

import torch

from distckpt.adapters.zero.engine import owner_of, private


def gather_nothing(engine: Any) -> None:
    """Have each rank hold only its pieces. ZeRO-3 keeps small parameters gathered, and would go on to use those."""
    if hasattr(owner_of(engine), "checkpoint_event_prologue"):
        owner_of(engine).checkpoint_event_prologue()


@torch.no_grad()
def refresh(engine: Any) -> None:
    """Make the weights that the model computes with from the masters, in every place where they lie."""
    owner = owner_of(engine)
    if hasattr(owner, "fp32_partitioned_groups_flat"):
        for i, flat in enumerate(owner.fp32_partitioned_groups_flat):
            if flat.numel():
                private(owner, "_reassign_or_swap_out_partitioned_parameters")(i)
    elif hasattr(owner, "update_lp_params") and getattr(owner, "using_real_optimizer", True):
        owner.update_lp_params()
        owner._hp_optimizer_states_linked = False
        private(owner, "_link_all_hp_params")()
    elif hasattr(owner, "fp32_groups_flat"):
        for members, flat in zip(private(owner, "fp16_groups"), owner.fp32_groups_flat, strict=True):
            copies = flat.split([p.numel() for p in members])
            for p, master in zip(members, copies, strict=True):
                p.copy_(master.view_as(p))
    elif hasattr(owner, "fp32_groups"):
        for members, copies in zip(private(owner, "fp16_groups"), owner.fp32_groups, strict=True):
            for p, master in zip(members, copies, strict=True):
                p.copy_(master)
    for p in engine.module.parameters():  # hpZ's copy within a node: DeepSpeed forgets those of frozen parameters
        if getattr(p, "ds_secondary_tensor", None) is not None:
            p.ds_secondary_tensor = None
    if hasattr(owner, "checkpoint_event_epilogue"):
        owner.checkpoint_event_epilogue()
