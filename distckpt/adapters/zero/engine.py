"""What an engine is, and which setups of it cannot be saved."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported

if TYPE_CHECKING:
    from torch import nn

KNOWN = (0, 19)
"""Version of DeepSpeed whose private names are known here."""


def is_engine(module: Any) -> bool:
    """Whether a module is a DeepSpeed engine. Imports nothing."""
    found = sys.modules.get("deepspeed.runtime.engine")
    return found is not None and isinstance(module, found.DeepSpeedEngine)


def private(owner: Any, name: str) -> Any:
    """Private attribute of DeepSpeed's, guarded: they were checked at 0.19.8."""
    try:
        return getattr(owner, name)
    except AttributeError as e:
        raise Unsupported(
            f"deepspeed {version()}: {type(owner).__name__} has no {name}; this adapter knows deepspeed "
            f"{'.'.join(map(str, KNOWN))}"
        ) from e


def version() -> str:
    """Version of the DeepSpeed that is loaded."""
    return str(getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version"))


def model_of(engine: Any) -> nn.Module:
    """Model that an engine trains."""
    found: nn.Module = engine.module
    return found


def owner_of(engine: Any) -> Any:
    """What DeepSpeed has put around the optimizer (or the optimizer itself, or None)."""
    return private(engine, "optimizer")


def optimizer_of(engine: Any) -> Any:
    """Optimizer that makes the steps, None where the engine has none."""
    owner = owner_of(engine)
    found = getattr(owner, "optimizer", owner)
    return found if hasattr(found, "param_groups") and hasattr(found, "state") else None


def describe(engine: Any) -> str:
    """How an engine is parallel, in words."""
    said = f"DeepSpeed ZeRO-{int(engine.zero_optimization_stage())}, {type(owner_of(engine)).__name__}"
    return f"{said}, a pipeline of {engine.num_stages} stages" if engine.pipeline_parallelism else said


def check(engine: Any) -> None:
    """Unsupported for a setup whose state lies elsewhere than this adapter looks, or means something else there."""
    if tuple(int(n) for n in version().split(".")[:2] if n.isdigit()) < KNOWN:
        raise Unsupported(f"deepspeed {version()}: this adapter knows deepspeed {'.'.join(map(str, KNOWN))} and later")
    owner = owner_of(engine)
    for lies, what, instead in _REFUSED:
        if lies(engine, owner):
            raise Unsupported(f"a DeepSpeed engine with {what} cannot be saved or loaded: {instead}")


def _tensor_parallel(engine: Any) -> int:
    """Ranks that share out each tensor. To DeepSpeed the stages of a pipeline are model parallel, too."""
    if engine.pipeline_parallelism:
        return int(private(engine, "grid").get_slice_parallel_world_size())
    return int(private(engine, "mp_world_size"))


def _has(owner: Any, name: str) -> bool:
    return bool(getattr(owner, name, False))


_REFUSED = (
    (
        lambda _, owner: _has(owner, "swap_optimizer") or _has(owner, "params_in_nvme_and_cpu"),
        "state offloaded to NVMe",
        "offload to the CPU, or save with DeepSpeed's own save_checkpoint",
    ),
    (
        lambda _, owner: _has(owner, "offloaded_states"),
        "states put away by offload_states()",
        "call reload_states() first",
    ),
    (
        lambda _, owner: hasattr(owner, "backup_optimizer"),
        "an optimizer offloaded in part (offload_optimizer.ratio)",
        "use ratio 1.0",
    ),
    (lambda _, owner: _has(owner, "zenflow"), "ZenFlow", "turn it off"),
    (
        lambda engine, _: _tensor_parallel(engine) > 1,
        "tensor parallelism",
        "its ranks hold different tensors under one name; use FSDP2 with tensor parallelism",
    ),
    (
        lambda engine, _: len(private(engine, "moe_layers")) < len(private(engine, "num_experts")),
        "MoE layers that DeepSpeed put in (AutoEP)",
        "its ranks hold different experts under one name; use deepspeed.moe.layer.MoE",
    ),
    (
        lambda engine, _: _has(engine, "has_moe_layers") and engine.pipeline_parallelism,
        "MoE layers in a pipeline",
        "use one of the two",
    ),
)
"""(whether an engine is so, what it has, what to do)."""
