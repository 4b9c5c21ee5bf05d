"""Names in DCP's flattened state dicts, and the canonical ones: each way. Pure.

DCP flattens nested dicts, and lists with dicts or tensors in them, into names joined by dots; keys of dicts become
text. Nested again, a state dict gets its canonical names by the one rule (`distckpt.statedict`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported
from distckpt.format.objects import TensorRef
from distckpt.statedict import canonical, entries, is_optimizer_object, nested, references

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from distckpt.statedict import Named

    Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """Stands for a tensor in a nested state dict: its name in the flattened one."""

    fqn: str


def kind_of(value: Any) -> str | None:
    """What statedict asks."""
    return "torch" if isinstance(value, Leaf) else None


# -- from a flattened state dict ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Structure:
    """What all ranks' flattened state dicts are together: path of each name, and which names are tensors."""

    paths: Mapping[str, Path]
    tensors: frozenset[str]

    def named(self, values: Mapping[str, Any]) -> Named:
        """Canonical names, each with its Leaf, and objects, of the nested state dict with these values."""
        return canonical(self._nested(values), kind_of)

    def outline(self) -> tuple[dict[str, str], tuple[str, ...]]:
        """(canonical name of each tensor that has another, leads of the models), known without any value."""
        # what makes an optimizer of a dict are its groups, each with a list of parameters
        known: dict[str, Any] = {fqn: [] if path[-1] == "params" else None for fqn, path in self.paths.items()}
        tree = self._nested(known)
        names = {leaf.fqn: name for name, leaf in canonical(tree, kind_of).tensors.items() if leaf.fqn != name}
        return names, tuple(entry.name for entry in entries(tree, kind_of) if entry.kind == "model")

    def _nested(self, values: Mapping[str, Any]) -> dict[str, Any]:
        leaves = {fqn: Leaf(fqn) if fqn in self.tensors else values[fqn] for fqn in self.paths}
        tree = _nest((self.paths[fqn], leaf) for fqn, leaf in leaves.items())
        _add_states(tree)
        return tree


def _nest(leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        holder: Any = root
        for key, following in pairwise(path):
            holder = _member(holder, key, [] if type(following) is int else {}, path)
        _put(holder, path[-1], leaf, path)
    return root


def _member(holder: Any, key: str | int, made: Any, path: Path) -> Any:
    there = (holder[key] if key < len(holder) else None) if type(key) is int else holder.get(key)
    if there is None:
        _put(holder, key, made, path)
        return made
    if type(there) is not type(made):
        raise Unsupported(f"{'.'.join(map(str, path))}: a dict on some ranks, a list on others")
    return there


def _put(holder: Any, key: str | int, value: Any, path: Path) -> None:
    if isinstance(holder, list) is not (type(key) is int):
        raise Unsupported(f"{'.'.join(map(str, path))}: a dict on some ranks, a list on others")
    if isinstance(holder, list):
        holder += [None] * (int(key) + 1 - len(holder))
    holder[key] = value


def _add_states(tree: Any) -> None:
    """Give optimizers without any state their empty one: DCP leaves empty dicts out."""
    if isinstance(tree, dict):
        for value in tree.values():
            _add_states(value)
        groups = tree.get("param_groups")
        if tree.keys() == {"param_groups"} and isinstance(groups, list) and all(isinstance(g, dict) for g in groups):
            tree["state"] = {}


# -- to a flattened state dict -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Offer:
    """What a checkpoint offers to DCP, by name in a flattened state dict: TensorRefs (kind torch), and values."""

    content: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    other_names: dict[str, Any] = field(default_factory=dict)
    """What it has under a second name.

    Hyper-parameters by parameter, as flattened optimizers ask for them; and whole dicts and lists without tensors, as
    DCP asks for them when it takes a checkpoint for one of torch before 2.4: as it does where a rank holds no shard of
    a ShardedTensor.
    """

    def find(self, fqn: str) -> Any:
        """TensorRef or value of this name."""
        return self.content[fqn] if fqn in self.content else self.other_names[fqn]

    def values(self) -> frozenset[str]:
        """Names of all that is no tensor."""
        found = self.content | self.other_names
        return frozenset(fqn for fqn, value in found.items() if not _is_tensor(value))


def offer(tensors: Iterable[str], aliases: Mapping[str, str], objects: Mapping[str, Any]) -> Offer:
    """Offer what a checkpoint has, under the names that DCP's planners ask for."""
    found = Offer()
    tree = nested(tensors, aliases, objects)
    for path, leaf in _flattened(tree, ()):
        fqn = ".".join(map(str, path))
        if fqn not in found.content:
            found.content[fqn], found.paths[fqn] = leaf, path
    found.other_names.update(_containers(tree, ()))
    for name, value in objects.items():
        if is_optimizer_object(value):
            for group in value["groups"]:
                for parameter in group["params"]:
                    lead = f"{name}.param_groups.{parameter}."
                    found.other_names.update({lead + key: v for key, v in group.items() if key != "params"})
    return found


def _flattened(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) as DCP's `flatten_state_dict` visits them."""
    if isinstance(value, Mapping):
        for key, member in value.items():
            yield from _flattened(member, (*path, str(key)))
    elif _is_leaf(value):
        yield path, value
    else:
        for i, member in enumerate(value):
            yield from _flattened(member, (*path, i))


def _containers(value: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """(name, dict or list) of each that has no tensor in it."""
    if isinstance(value, (Mapping, list)):
        if path and next(references(value), None) is None:
            yield ".".join(map(str, path)), value
        for key, member in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _containers(member, (*path, str(key)))


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, list) or not any(
        isinstance(member, Mapping) or (isinstance(member, list) and not _is_leaf(member)) or _is_tensor(member)
        for member in value
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef) and value.kind == "torch"
