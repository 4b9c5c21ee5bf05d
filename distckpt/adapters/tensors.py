"""One tensor of any kind as a GlobalTensor: where the kinds are told apart."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from distckpt.adapters import dtensor
from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format.objects import TensorRef
from distckpt.format.partition import Copies
from distckpt.state import GlobalTensor, State, plain, torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distckpt.state import Saved


def describe(tensor: torch.Tensor, fqn: str, *, trusted: bool = True) -> GlobalTensor:
    """Describe any tensor. Unsupported, with the fqn, for a kind that cannot be saved."""
    if isinstance(tensor, DTensor):
        return dtensor.describe(tensor, fqn)
    return plain(tensor, fqn, trusted=trusted)


def empty_like(template: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor of this shape (elements) and dtype, of the template's kind and device."""
    if isinstance(template, DTensor):
        return dtensor.like(template, shape, dtype)
    if shape == tuple(template.shape):
        return torch.empty_like(template, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=template.device)


def extract(tree: Any, prefix: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Take the tensors out of nested dicts, lists and tuples: (tree with TensorRefs, fqn -> tensor).

    NumPy arrays count as tensors. Fqns are `prefix` and the path, joined by dots.
    """
    found: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            return keep(value, path, "torch")
        if isinstance(value, np.ndarray) and value.dtype != object:
            try:
                return keep(torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)), path, "numpy")
            except TypeError as e:
                raise Unsupported(f"{path}: a NumPy array of dtype {value.dtype} cannot be saved") from e
        return _rebuilt(value, lambda v, key: visit(v, f"{path}.{key}"))

    def keep(tensor: torch.Tensor, path: str, kind: str) -> TensorRef:
        while path in found:  # int and str keys of one dict can read alike
            path += "'"
        found[path] = tensor
        return TensorRef(path, kind)

    return visit(tree, prefix), found


def insert(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Put tensors back where `extract` took them."""
    if isinstance(tree, TensorRef):
        tensor = tensors[tree.fqn]
        return tensor.numpy() if tree.kind == "numpy" else tensor
    return _rebuilt(tree, lambda v, _key: insert(v, tensors))


def references(tree: Any) -> list[str]:
    """Fqns that a tree refers to."""
    found: list[str] = []

    def visit(value: Any, _key: Any) -> Any:
        if isinstance(value, TensorRef):
            found.append(value.fqn)
        return _rebuilt(value, visit)

    visit(tree, None)
    return found


def _rebuilt(value: Any, visit: Callable[[Any, Any], Any]) -> Any:
    """Copy of a container with each member visited; any other value as it is."""
    if type(value) in {dict, OrderedDict}:
        return type(value)((k, visit(v, k)) for k, v in value.items())
    if type(value) in {list, tuple}:
        return type(value)(visit(v, i) for i, v in enumerate(value))
    return value


def refuse_own_values(lead: str, fqns: Iterable[str], saved: Saved) -> None:
    """Mismatch where saved ranks each had values of their own for one of these, and other ranks would share them out.

    The caller of the load can choose rank 0's for all: `per_rank={lead: "first"}`.
    """
    infos = ((fqn, saved.tensors.get(fqn)) for fqn in fqns)
    own = [fqn for fqn, info in infos if info and isinstance(info.partition, Copies)]
    if own and saved.resharded and saved.per_rank.get(lead) != "first":
        raise Mismatch(
            f"{', '.join(own[:10])}: each of the {saved.world_size} ranks had values of its own, which "
            f"{saved.target_world_size} ranks cannot share out: resume on {saved.world_size} ranks, or take rank 0's "
            f"on every rank with per_rank={{{lead!r}: 'first'}}"
        )


def capture_tree(name: str, tree: Any, *, trusted: bool = False) -> State:
    """State of a value whose tensors, if any, are named `name.<path>`; the rest is the object `name`."""
    rest, tensors = extract(tree, name)
    return State({fqn: describe(t, fqn, trusted=trusted) for fqn, t in tensors.items()}, {}, {name: rest})


def tree_targets(name: str, saved: Saved) -> dict[str, torch.Tensor]:
    """Fresh CPU tensors for all that the object `name` of a checkpoint refers to. FormatError for what is not there."""
    made = {}
    for fqn in references(saved.objects.get(name)):
        if fqn not in saved.tensors:
            raise FormatError(f"object {name} refers to tensor {fqn!r}, which the checkpoint does not have")
        made[fqn] = torch.empty(saved.tensors[fqn].shape, dtype=torch_dtype(saved.tensors[fqn].dtype))
    return made
