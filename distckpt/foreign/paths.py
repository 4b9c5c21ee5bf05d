"""Canonical names -> the nested state dict that they stand for, as paths: the way back from `statedict.canonical`.

Pure. Dicts and lists are gone through as DCP goes through them: keys become texts, a list is opened only where it holds
tensors or dicts, and a tuple never is.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

from distckpt.format.objects import TensorRef
from distckpt.statedict import LEFT_OVER, is_optimizer_object

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from distckpt.loading.open import Checkpoint

TreePath: TypeAlias = tuple[str | int, ...]

_EXTRA = ".extra_state"


def entries_of(checkpoint: Checkpoint) -> tuple[dict[str, TreePath], dict[TreePath, Any]]:
    """(path of each tensor, values by path). A tensor inside a value, as in a tuple, has no path of its own."""
    tensors: dict[str, TreePath] = {}
    values: dict[TreePath, Any] = {}
    inside: set[str] = set()
    for name in checkpoint.manifest.objects:
        for path, value in _of_object(name, checkpoint.object(name)):
            if isinstance(value, TensorRef):
                tensors[value.fqn] = path
            else:
                values[path] = value
                inside |= {ref.fqn for ref in _references(value)}
    optimizers = {n: checkpoint.object(n) for n in checkpoint.manifest.objects}
    optimizers = {n: value for n, value in optimizers.items() if is_optimizer_object(value)}
    for fqn in checkpoint.manifest.tensors:
        if fqn not in tensors and fqn not in inside:
            tensors[fqn] = _of_tensor(fqn, optimizers)
    return tensors, values


def _of_tensor(fqn: str, optimizers: Mapping[str, Any]) -> TreePath:
    for name, value in optimizers.items():
        if fqn.startswith(name + "."):
            rest = fqn.removeprefix(name + ".")
            known = {str(p) for group in value["groups"] for p in group["params"]} | set(map(str, value["values"]))
            parameter = rest.rpartition(".")[0]
            while parameter and parameter not in known:
                parameter = parameter.rpartition(".")[0]
            parameter = parameter or rest.rpartition(".")[0]
            return (*name.split("."), "state", parameter, rest.removeprefix(parameter + "."))
    return tuple(fqn.split(".", 1))


def _of_object(name: str, value: Any) -> Iterator[tuple[TreePath, Any]]:
    if is_optimizer_object(value):
        lead = tuple(name.split("."))
        for i, group in enumerate(value["groups"]):
            yield from _leaves(group, (*lead, "param_groups", i))
        for parameter, members in value["values"].items():
            yield from _leaves(members, (*lead, "state", str(parameter)))
    elif name.endswith(_EXTRA) and isinstance(value, dict):
        lead = (name.removesuffix(_EXTRA),)
        for owner, state in value.items():
            yield from _leaves(state, (*lead, f"{owner}._extra_state" if owner else "_extra_state"))
    elif name == LEFT_OVER and isinstance(value, dict):
        yield from _leaves(value, ())
    else:
        yield from _leaves(value, (name,))


def _leaves(value: Any, path: TreePath) -> Iterator[tuple[TreePath, Any]]:
    if isinstance(value, dict) and not isinstance(value, Counter):
        for key, member in value.items():
            yield from _leaves(member, (*path, str(key)))
    elif isinstance(value, list) and _is_opened(value):
        for i, member in enumerate(value):
            yield from _leaves(member, (*path, i))
    else:
        yield path, value


def _is_opened(value: list[Any]) -> bool:
    return any(
        isinstance(member, (dict, TensorRef)) or (isinstance(member, list) and _is_opened(member)) for member in value
    )


def _references(value: Any) -> Iterator[TensorRef]:
    if isinstance(value, TensorRef):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _references(member)
