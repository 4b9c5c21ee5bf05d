"""Experts of DeepSpeed's MoE layers: each rank has some of a layer's, and calls them by its own count.

Expert k of expert-parallel rank r, of which each has n, is expert r * n + k of the layer, as in DeepSpeed's own
checkpoints.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch.distributed import get_rank

from distckpt.adapters.zero.engine import private

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

_WITHIN = "experts.deepspeed_experts."


def _identity(name: str) -> str:
    return name


def naming(module: nn.Module) -> Callable[[str], str]:
    """What makes a name within a module, of this rank, the name that all ranks know it by. Imports nothing."""
    known = sys.modules.get("deepspeed.moe.sharded_moe")
    first: dict[str, int] = {}
    for name, layer in module.named_modules() if known else ():
        if known and isinstance(layer, known.MOELayer) and (count := _before(layer)):
            first[f"{name}.{_WITHIN}" if name else _WITHIN] = count
    if not first:
        return _identity

    def renamed(name: str) -> str:
        for lead, count in first.items():
            if name.startswith(lead):
                own, dot, rest = name.removeprefix(lead).partition(".")
                return f"{lead}{int(own) + count}{dot}{rest}" if own else name
        return name

    return renamed


def _before(layer: Any) -> int:
    """How many experts of a layer are those of ranks before this one."""
    group = private(layer, "ep_group")
    return int(get_rank(group) * private(layer, "num_local_experts")) if group is not None else 0
