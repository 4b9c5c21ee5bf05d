"""Tensor subclasses that flatten into plain tensors (torchao's low-bit optimizer states), by `__tensor_flatten__`.

Over a DTensor it is the local tensor that is flattened: its blocks are cut from this rank's shard.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from distckpt.adapters import dtensor
from distckpt.errors import Mismatch
from distckpt.state import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer

_SUBCLASS = "tensor_subclass"


def is_flattened(value: Any) -> bool:
    """Whether a value is a tensor of a subclass that flattens into plain ones, or a DTensor over such."""
    if isinstance(value, DTensor):
        return is_flattened(dtensor.local_of(value))
    return isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__")


def is_description(value: Any) -> bool:
    """Whether a value is what `flatten` makes of a tensor."""
    return isinstance(value, dict) and _SUBCLASS in value


def flatten(value: Any, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(its tensors, each named `key.<part>`; what else is needed to put them together again)."""
    local: Any = dtensor.local_of(value) if isinstance(value, DTensor) else value
    names, context = local.__tensor_flatten__()
    described = {
        _SUBCLASS: type(local).__qualname__,
        "module": type(local).__module__,
        "inner": list(names),
        "context": _context_to_values(context),
        "shape": tuple(local.shape),
        "stride": tuple(local.stride()),
    }
    return {f"{key}.{n}": getattr(local, n) for n in names}, described


def names_in(described: dict[str, Any], key: str) -> list[str]:
    """Names of the tensors that `flatten` made."""
    return [f"{key}.{n}" for n in described["inner"]]


def unflatten(
    described: dict[str, Any], key: str, made: Mapping[str, torch.Tensor], optimizer: Optimizer, p: torch.Tensor
) -> torch.Tensor:
    """Tensor subclass from its parts. Its class must be of the optimizer's own package: a checkpoint picks no code.

    For a parameter that is a DTensor it becomes the local tensor of one.
    """
    package = type(optimizer).__module__.partition(".")[0]
    module = sys.modules.get(described["module"]) if described["module"].partition(".")[0] == package else None
    found = getattr(module, described[_SUBCLASS], None)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor)):
        raise Mismatch(
            f"{key}: was a {described['module']}.{described[_SUBCLASS]}; a {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__} cannot take it over: use the optimizer it was saved from"
        )
    inner = {n: made[f"{key}.{n}"] for n in described["inner"]}
    whole: torch.Tensor = found.__tensor_unflatten__(  # type: ignore[attr-defined]
        inner, _context_from_values(described["context"]), described["shape"], described["stride"]
    )
    return dtensor.with_local(p, whole) if isinstance(p, DTensor) else whole


def _context_to_values(context: Any) -> Any:
    """Put what torch adds to a flattening context, dtypes and sizes, as values that the format has."""
    if isinstance(context, torch.dtype):
        return ("torch.dtype", str(context).removeprefix("torch."))
    if isinstance(context, torch.Size):
        return ("torch.Size", list(context))
    return type(context)(map(_context_to_values, context)) if isinstance(context, (list, tuple)) else context


def _context_from_values(context: Any) -> Any:
    if isinstance(context, tuple) and len(context) == 2 and context[0] == "torch.dtype":
        return torch_dtype(context[1])
    if isinstance(context, tuple) and len(context) == 2 and context[0] == "torch.Size":
        return torch.Size(context[1])
    return type(context)(map(_context_from_values, context)) if isinstance(context, (list, tuple)) else context
