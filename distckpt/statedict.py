"""State dicts <-> canonical names: what a nested dict of tensors and values is called in a checkpoint.

Pure: what counts as a tensor is told by `kind_of` (the kind of a TensorRef, or None), so the same rules name live
tensors and what a file of another tool describes. By entry of the state dict:

    a flat dict of tensors (a model)             tensors `<key>.<fqn>`, no object; extra state: `<key>.extra_state`
    {"state": ..., "param_groups": [...]}        tensors `<key>.<parameter>.<state>`; object `<key>`: groups and values
    the same, flattened ("state.<fqn>.<state>")  the same
    a dict with such an optimizer in it          its entries, each led by `<key>.`
    a tensor                                     a tensor `<key>`
    anything else                                object `<key>`, in which a TensorRef stands for each tensor

Entries whose key cannot be a name (an int, a text with a space) share the object `state_dict`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, Unsupported
from distckpt.format.layout import is_name
from distckpt.format.objects import TensorRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    KindOf = Callable[[Any], "str | None"]

LEFT_OVER = "state_dict"
"""Object of the entries whose key cannot be a name."""

_EXTRA = "_extra_state"


@dataclass(slots=True)
class Named:
    """Tensors by canonical name, each what the tree held, and objects, in which TensorRefs stand for tensors."""

    tensors: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, tensor: Any) -> None:
        """Enter a tensor. Unsupported if the name is taken."""
        if name in self.tensors:
            raise Unsupported(f"{name}: two entries of the state dict have this name")
        self.tensors[name] = tensor

    def add_tree(self, tree: Any, prefix: str, kind_of: KindOf) -> Any:
        """Enter the tensors of a tree; return it with TensorRefs."""
        rest, found = extract(tree, prefix, kind_of)
        for name, tensor in found.items():
            self.add(name, tensor)
        return rest


def canonical(tree: Mapping[Any, Any], kind_of: KindOf, lead: str = "") -> Named:
    """Name everything in a state dict. Unsupported where two entries would have the same name."""
    named = Named()
    _name_entries(tree, lead, named, kind_of)
    return named


def _name_entries(tree: Mapping[Any, Any], lead: str, named: Named, kind_of: KindOf) -> None:
    left_over = {}
    for key, value in tree.items():
        if type(key) is str and kind_of(value) == "torch":
            named.add(lead + key, value)
        elif type(key) is str and is_name(key) and lead + key != LEFT_OVER:
            _name_entry(value, lead + key, named, kind_of)
        else:
            left_over[key] = value
    if left_over:
        named.objects[lead + LEFT_OVER] = named.add_tree(left_over, (lead + LEFT_OVER), kind_of)


def _name_entry(value: Any, name: str, named: Named, kind_of: KindOf) -> None:
    if is_model(value, kind_of):
        extra = {}
        for key, member in value.items():
            if is_extra_state(key):
                extra[key.removesuffix(_EXTRA).removesuffix(".")] = member
            else:
                named.add(f"{name}.{key}", member)
        if extra:
            named.objects[f"{name}.extra_state"] = named.add_tree(extra, f"{name}.extra_state", kind_of)
    elif is_optimizer(value):
        _name_optimizer(value["state"], value["param_groups"], name, named, kind_of)
    elif is_flattened_optimizer(value):
        _name_optimizer(*nested_optimizer(value), name, named, kind_of)
    elif has_optimizer(value):
        _name_entries(value, name + ".", named, kind_of)
    else:
        named.objects[name] = named.add_tree(value, name, kind_of)


def is_extra_state(key: str) -> bool:
    """Whether a key of a module's state dict is that of a module's extra state."""
    return key == _EXTRA or key.endswith("." + _EXTRA)


def is_model(value: Any, kind_of: KindOf) -> bool:
    """Whether a value is a flat dict of tensors by name (beside modules' extra state)."""
    return (
        isinstance(value, dict)
        and all(type(key) is str for key in value)
        and any(kind_of(member) == "torch" and not is_extra_state(key) for key, member in value.items())
        and all(kind_of(member) == "torch" or is_extra_state(key) for key, member in value.items())
    )


def is_optimizer(value: Any) -> bool:
    """Whether a value is what an optimizer's state_dict() returns, its parameters named by fqn or by position."""
    return (
        isinstance(value, dict)
        and value.keys() == {"state", "param_groups"}
        and isinstance(value["state"], dict)
        and all(isinstance(state, dict) for state in value["state"].values())
        and isinstance(value["param_groups"], list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in value["param_groups"])
    )


def is_flattened_optimizer(value: Any) -> bool:
    """Whether a value is an optimizer's state dict with `state.<fqn>.<state>`, `param_groups.<fqn>.<hyper>` as keys."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(type(k) is str and k.startswith(("state.", "param_groups.")) and k.count(".") > 1 for k in value)
        and any(k.startswith("param_groups.") for k in value)
    )


def has_optimizer(value: Any) -> bool:
    """Whether a dict has an optimizer's state dict among its entries, so that it is a state dict of its own."""
    return isinstance(value, dict) and any(is_optimizer(v) or is_flattened_optimizer(v) for v in value.values())


def nested_optimizer(value: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """(state, param_groups) of a flattened optimizer's state dict: parameters of equal hyper-parameters are a group."""
    state: dict[str, dict[str, Any]] = {}
    hypers: dict[str, dict[str, Any]] = {}
    for key, member in value.items():
        kind, _, rest = key.partition(".")
        fqn, _, name = rest.rpartition(".")
        (state if kind == "state" else hypers).setdefault(fqn, {})[name] = member
    groups: list[dict[str, Any]] = []
    for fqn, hyper in hypers.items():
        group = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == hyper), None)
        if group is None:
            groups.append(group := {**hyper, "params": []})
        group["params"].append(fqn)
    return state, groups


def _name_optimizer(
    state: Mapping[Any, Mapping[str, Any]], groups: list[dict[str, Any]], name: str, named: Named, kind_of: KindOf
) -> None:
    values: dict[Any, dict[str, Any]] = {}
    for parameter, members in state.items():
        for key, member in members.items():
            of_state = f"{name}.{parameter}.{key}"
            if kind_of(member) == "torch":
                named.add(of_state, member)
            else:
                values.setdefault(parameter, {})[key] = named.add_tree(member, of_state, kind_of)
    kept = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    named.objects[name] = {
        "optimizer": "",
        "groups": named.add_tree(kept, f"{name}.param_groups", kind_of),
        "values": values,
    }


def is_optimizer_object(value: Any) -> bool:
    """Whether an object is that of an optimizer: its groups, each a list of parameters, and its values."""
    return isinstance(value, dict) and value.keys() == {"optimizer", "groups", "values"}


# -- back into a state dict --------------------------------------------------------------------------------------


def refill(tree: Any, objects: Mapping[str, Any], tensors: Mapping[str, Any], kind_of: KindOf, lead: str = "") -> None:
    """Put the values of a checkpoint's objects into a state dict, in place; its tensors have been filled already.

    `tensors` are those that TensorRefs stand for. Keys that only the checkpoint has are added. Mismatch, with the
    path, where the checkpoint has another kind of thing.
    """
    for key, value in list(tree.items()):
        name = f"{lead}{key}"
        if type(key) is str and kind_of(value) == "torch":
            continue
        if not (type(key) is str and is_name(key)) or name == LEFT_OVER:
            kept = objects.get(lead + LEFT_OVER, {})
            if key in kept:
                tree[key] = _updated(value, kept[key], tensors, f"{lead}{LEFT_OVER}.{key}", kind_of)
        elif is_model(value, kind_of):
            extra = objects.get(f"{name}.extra_state", {})
            for member in filter(is_extra_state, list(value)):
                owner = member.removesuffix(_EXTRA).removesuffix(".")
                if owner in extra:
                    value[member] = insert(extra[owner], tensors)
        elif is_optimizer(value) or is_flattened_optimizer(value):
            if name in objects:
                _refill_optimizer(value, objects[name], tensors, name)
        elif has_optimizer(value):
            refill(value, objects, tensors, kind_of, name + ".")
        elif name in objects:
            tree[key] = _updated(value, objects[name], tensors, name, kind_of)


def _refill_optimizer(tree: dict[str, Any], saved: Any, tensors: Mapping[str, Any], name: str) -> None:
    if not is_optimizer_object(saved):
        raise Mismatch(f"{name}: an optimizer's state dict is expected, the checkpoint has something else under it")
    groups, values = insert(saved["groups"], tensors), insert(saved["values"], tensors)
    if is_optimizer(tree):
        tree["param_groups"][:] = groups
        for parameter, members in values.items():
            tree["state"].setdefault(parameter, {}).update(members)
        return
    of_parameter = {fqn: group for group in groups for fqn in group["params"]}
    for key in tree:
        kind, _, rest = key.partition(".")
        fqn, _, member = rest.rpartition(".")
        found = of_parameter.get(fqn, {}) if kind == "param_groups" else values.get(fqn, {})
        if member in found:
            tree[key] = found[member]


def _updated(live: Any, saved: Any, tensors: Mapping[str, Any], path: str, kind_of: KindOf) -> Any:
    """Return `live` with the saved values: tensors it holds stay (they have been filled), all else is replaced."""
    if kind_of(live) is not None:
        if not isinstance(saved, TensorRef):
            raise Mismatch(f"{path}: a tensor is expected, the checkpoint has a {type(saved).__name__}")
        return live if kind_of(live) == saved.kind == "torch" else insert(saved, tensors)
    if isinstance(live, dict) and isinstance(saved, dict):
        for key, value in saved.items():
            live[key] = (
                _updated(live[key], value, tensors, f"{path}.{key}", kind_of) if key in live else insert(value, tensors)
            )
        return live
    if isinstance(live, (list, tuple)) and type(live) is type(saved) and len(live) == len(saved):
        pairs = enumerate(zip(live, saved, strict=True))
        return type(live)(_updated(a, b, tensors, f"{path}[{i}]", kind_of) for i, (a, b) in pairs)
    return insert(saved, tensors)


# -- trees of values with tensors in them --------------------------------------------------------------------------


def extract(tree: Any, prefix: str, kind_of: KindOf) -> tuple[Any, dict[str, Any]]:
    """Take the tensors out of nested dicts, lists and tuples: (tree with TensorRefs, fqn -> tensor).

    Fqns are `prefix` and the path, joined by dots.
    """
    found: dict[str, Any] = {}

    def visit(value: Any, path: str) -> Any:
        if kind := kind_of(value):
            while path in found:  # int and str keys of one dict can read alike
                path += "'"
            found[path] = value
            return TensorRef(path, kind)
        return rebuilt(value, lambda v, key: visit(v, f"{path}.{key}"))

    return visit(tree, prefix), found


def insert(tree: Any, tensors: Mapping[str, Any]) -> Any:
    """Put tensors back where `extract` took them."""
    if isinstance(tree, TensorRef):
        tensor = tensors[tree.fqn]
        return tensor.numpy() if tree.kind == "numpy" else tensor
    return rebuilt(tree, lambda v, _key: insert(v, tensors))


def references(tree: Any) -> Iterator[str]:
    """Fqns of the tensors that a tree refers to."""
    if isinstance(tree, TensorRef):
        yield tree.fqn
    elif isinstance(tree, (dict, list, tuple)):
        for member in tree.values() if isinstance(tree, dict) else tree:
            yield from references(member)


def rebuilt(value: Any, visit: Callable[[Any, Any], Any]) -> Any:
    """Copy of a container with each member visited; any other value as it is."""
    if type(value) in {dict, OrderedDict}:
        return type(value)((k, visit(v, k)) for k, v in value.items())
    if type(value) in {list, tuple}:
        return type(value)(visit(v, i) for i, v in enumerate(value))
    return value
