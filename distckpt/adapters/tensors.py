"""One tensor of any kind as a GlobalTensor: where the kinds are told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from distckpt import statedict
from distckpt.adapters import dtensor, sharded
from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format.partition import Copies
from distckpt.state import GlobalTensor, State, plain, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.state import Saved


def describe(tensor: torch.Tensor, fqn: str, *, trusted: bool = True) -> GlobalTensor:
    """Describe any tensor. Unsupported, with the fqn, for a kind that cannot be saved."""
    if isinstance(tensor, DTensor):
        return dtensor.describe(tensor, fqn)
    if isinstance(tensor, ShardedTensor):
        return sharded.describe(tensor, fqn)
    return plain(tensor, fqn, trusted=trusted)


def empty_like(template: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor of this shape (elements) and dtype, of the template's kind and device."""
    if isinstance(template, DTensor):
        return dtensor.like(template, shape, dtype)
    if shape == tuple(template.shape):
        return torch.empty_like(template, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=template.device)


def kind_of(value: Any) -> str | None:
    """What statedict asks: whether a value counts as a tensor, and of which kind. NumPy arrays count."""
    if isinstance(value, torch.Tensor):
        return "torch"
    return "numpy" if type(value) is np.ndarray and value.dtype != object else None


def as_torch(value: Any, fqn: str) -> torch.Tensor:
    """Tensor of a value that counts as one: a NumPy array shares its memory where it is contiguous."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    except (TypeError, ValueError) as e:  # a dtype that torch has not, or of another byte order
        raise Unsupported(f"{fqn}: a NumPy array of dtype {value.dtype} cannot be saved") from e


def extract(tree: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the tensors out of nested dicts, lists and tuples: (tree with TensorRefs, fqn -> tensor)."""
    rest, found = statedict.extract(tree, prefix, kind_of)
    return rest, {fqn: as_torch(value, fqn) for fqn, value in found.items()}


def refuse_own_values(lead: str, fqns: Iterable[str], saved: Saved) -> None:
    """Mismatch where saved ranks each had values of their own for one of these, and other ranks would share them out.

    The caller of the load can choose rank 0's for all: `per_rank={lead: "first"}`.
    """
    if not saved.resharded or saved.per_rank.get(lead) == "first":
        return
    infos = ((fqn, saved.tensors.get(fqn)) for fqn in fqns)
    if own := [fqn for fqn, info in infos if info and isinstance(info.partition, Copies)]:
        raise Mismatch(
            f"{', '.join(own[:10])}: each of the {saved.world_size} ranks had values of its own, which "
            f"{saved.target_world_size} ranks cannot share out: resume on {saved.world_size} ranks, or take rank 0's "
            f"on every rank with per_rank={{{lead!r}: 'first'}}"
        )


def ties(models: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, str]:
    """Tied tensors of models (each fqn -> tensor): fqn -> the fqn that names the same memory first."""
    found = {}
    for model in models:
        first: dict[Any, str] = {}
        for fqn, tensor in model.items():
            local = dtensor.local_of(tensor) if isinstance(tensor, DTensor) else tensor
            if type(local) not in {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}:
                continue
            storage = local.untyped_storage()._cdata  # tells memory apart where there are no elements, too
            memory = (storage, local.storage_offset(), local.dtype, local.shape, local.stride(), tensor.shape)
            if first.setdefault(memory, fqn) != fqn:
                found[fqn] = first[memory]
    return found


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor share memory."""
    return not tensor.is_contiguous() and any(
        n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )


def capture_tree(name: str, tree: Any, *, trusted: bool = False) -> State:
    """State of a value whose tensors, if any, are named `name.<path>`; the rest is the object `name`."""
    rest, tensors = extract(tree, name)
    return State({fqn: describe(t, fqn, trusted=trusted) for fqn, t in tensors.items()}, {}, {name: rest})


def tree_targets(name: str, saved: Saved) -> dict[str, torch.Tensor]:
    """Fresh CPU tensors for all that the object `name` of a checkpoint refers to. FormatError for what is not there."""
    made = {}
    for fqn in statedict.references(saved.objects.get(name)):
        if fqn not in saved.tensors:
            raise FormatError(f"object {name} refers to tensor {fqn!r}, which the checkpoint does not have")
        made[fqn] = torch.empty(saved.tensors[fqn].shape, dtype=torch_dtype(saved.tensors[fqn].dtype))
    return made
