"""Canonical names -> the nested state dict that they stand for: the way back from `statedict.canonical`.

Pure. As paths, dicts and lists are gone through as DCP goes through them: keys become texts, a list is opened only
where it holds tensors or dicts, and a tuple never is.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, TypeAlias

from distckpt.format.objects import TensorRef
from distckpt.statedict import nested, rebuilt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distckpt.loading.open import Checkpoint

TreePath: TypeAlias = tuple[str | int, ...]


def tree_of(checkpoint: Checkpoint, *, ties: bool = True) -> dict[str, Any]:
    """All that is in a checkpoint as one nested dict, a TensorRef for each tensor; a NumPy array becomes one, too.

    ties: whether tied parameters stand under all their names.
    """
    content = checkpoint.manifest
    objects = {name: checkpoint.object(name) for name in content.objects}
    found: dict[str, Any] = _of_torch(nested(content.tensors, content.aliases if ties else {}, objects))
    return found


def _of_torch(value: Any) -> Any:
    if isinstance(value, TensorRef):
        return TensorRef(value.fqn)
    return rebuilt(value, lambda member, _key: _of_torch(member))


def entries_of(checkpoint: Checkpoint) -> tuple[dict[str, TreePath], dict[TreePath, Any]]:
    """(path of each tensor, values by path). A tensor inside a value, as in a tuple, has no path of its own."""
    tensors: dict[str, TreePath] = {}
    values: dict[TreePath, Any] = {}
    for path, value in _leaves(tree_of(checkpoint, ties=False), ()):
        if isinstance(value, TensorRef):
            tensors[value.fqn] = path
        else:
            values[path] = value
    return tensors, values


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
