"""State dicts <-> canonical names: what a nested dict of tensors and values is called in a checkpoint.

Pure: what counts as a tensor is told by `kind_of` (the kind of a TensorRef, or None), so the same rules name live
tensors and what a file of another tool describes. By entry of the state dict:

    a flat dict of tensors (a model)             tensors `<key>.<fqn>`, no object; extra state: `<key>.extra_state`
    {"state": ..., "param_groups": [...]}        tensors `<key>.<parameter>.<state>`; object `<key>`: groups and values
    the same, flattened ("state.<fqn>.<state>")  the same
    a dict with such an optimizer in it, or of
    nothing but models                           its entries, each led by `<key>.`
    a tensor                                     a tensor `<key>`
    anything else                                object `<key>`, in which a TensorRef stands for each tensor

Entries whose key cannot be a name (an int, a text with a space) share the object `state_dict`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported
from distckpt.format.layout import is_name
from distckpt.format.objects import TensorRef

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    KindOf = Callable[[Any], "str | None"]

LEFT_OVER = "state_dict"
"""Object of the entries whose key cannot be a name."""

_EXTRA = "_extra_state"


@dataclass(slots=True)
class Named:
    """Tensors by canonical name, each what the tree held, and objects, in which TensorRefs stand for tensors."""

    tensors: dict[str, Any] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    """Of each model among the entries, its tensors by canonical name: those that may be tied."""

    def add(self, name: str, tensor: Any) -> None:
        """Enter a tensor. Unsupported if the name is taken."""
        if name in self.tensors:
            raise Unsupported(f"{name}: two entries of the state dict have this name")
        self.tensors[name] = tensor

    def add_object(self, name: str, tree: Any, kind_of: KindOf) -> None:
        """Enter a tree as an object, and its tensors."""
        self.objects[name] = self.add_tree(tree, name, kind_of)

    def add_tree(self, tree: Any, prefix: str, kind_of: KindOf) -> Any:
        """Enter the tensors of a tree; return it with TensorRefs."""
        rest, found = extract(tree, prefix, kind_of)
        for name, tensor in found.items():
            self.add(name, tensor)
        return rest


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a state dict, in `holder` under `key` (None: all whose key cannot be a name), and what it is."""

    holder: dict[Any, Any]
    key: str | None
    name: str
    value: Any
    kind: str


def entries(tree: Mapping[Any, Any], kind_of: KindOf, lead: str = "") -> Iterator[Entry]:
    """Yield the entries of a state dict. Kinds: tensor, model, optimizer, flattened (optimizer), tree."""
    holder: Any = tree
    left_over = {}
    for key, value in tree.items():
        name = f"{lead}{key}"
        if type(key) is str and key and kind_of(value) == "torch":
            yield Entry(holder, key, name, value, "tensor")
        elif type(key) is not str or not is_name(key) or key == LEFT_OVER:
            left_over[key] = value
        elif is_model(value, kind_of):
            yield Entry(holder, key, name, value, "model")
        elif is_optimizer(value):
            yield Entry(holder, key, name, value, "optimizer")
        elif is_flattened_optimizer(value):
            yield Entry(holder, key, name, value, "flattened")
        elif has_parts(value, kind_of):
            yield from entries(value, kind_of, f"{name}.")
        else:
            yield Entry(holder, key, name, value, "tree")
    if left_over:
        yield Entry(holder, None, f"{lead}{LEFT_OVER}", left_over, "tree")


def canonical(tree: Mapping[Any, Any], kind_of: KindOf, lead: str = "") -> Named:
    """Name everything in a state dict. Unsupported where two entries would have the same name."""
    named = Named()
    for entry in entries(tree, kind_of, lead):
        match entry.kind:
            case "tensor":
                named.add(entry.name, entry.value)
            case "model":
                _name_model(entry.value, entry.name, named, kind_of)
            case "optimizer":
                _name_optimizer(entry.value["state"], entry.value["param_groups"], entry.name, named, kind_of)
            case "flattened":
                _name_optimizer(*nested_optimizer(entry.value), entry.name, named, kind_of)
            case _:
                named.add_object(entry.name, entry.value, kind_of)
    return named


def _name_model(value: Mapping[str, Any], name: str, named: Named, kind_of: KindOf) -> None:
    tensors = {f"{name}.{key}": member for key, member in value.items() if not is_extra_state(key)}
    for fqn, tensor in tensors.items():
        named.add(fqn, tensor)
    named.models.append(tensors)
    if extra := {owner_of(key): member for key, member in value.items() if is_extra_state(key)}:
        named.add_object(f"{name}.extra_state", extra, kind_of)


def owner_of(key: str) -> str:
    """Module of a key of extra state."""
    return key.removesuffix(_EXTRA).removesuffix(".")


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


def has_parts(value: Any, kind_of: KindOf) -> bool:
    """Whether a dict is a state dict of its own: it has an optimizer among its entries, or nothing but models."""
    if not isinstance(value, dict) or not value:
        return False
    if any(is_optimizer(v) or is_flattened_optimizer(v) for v in value.values()):
        return True
    return all(type(key) is str and is_name(key) and is_model(v, kind_of) for key, v in value.items())


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
    parameters = parameters_of(groups)
    values: dict[Any, dict[str, Any]] = {}
    for parameter, members in state.items():
        for key, member in members.items():
            of_state = f"{name}.{parameter}.{key}"
            if kind_of(member) == "torch":
                named.add(of_state, member)
            else:
                owner = parameters.get(str(parameter), parameter)
                values.setdefault(owner, {})[key] = named.add_tree(member, of_state, kind_of)
    kept = [{k: _number(v, kind_of) for k, v in group.items() if k != "param_names"} for group in groups]
    named.objects[name] = {
        "optimizer": "",
        "groups": named.add_tree(kept, f"{name}.param_groups", kind_of),
        "values": values,
    }


def parameters_of(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters of an optimizer's groups, fqns or positions, by their text: as it stands in the names of states."""
    return {str(parameter): parameter for group in groups for parameter in group["params"]}


def _number(value: Any, kind_of: KindOf) -> Any:
    """Hyper-parameter as a value: a live tensor of no dimensions is its number."""
    if kind_of(value) == "torch" and hasattr(value, "item") and not tuple(value.shape):
        return value.item()
    return rebuilt(value, lambda v, _key: _number(v, kind_of)) if type(value) in {list, tuple} else value


def is_optimizer_object(value: Any) -> bool:
    """Whether an object is that of an optimizer: its groups, each a list of parameters, and its values."""
    return (
        isinstance(value, dict)
        and value.keys() == {"optimizer", "groups", "values"}
        and isinstance(value["groups"], list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in value["groups"])
        and isinstance(value["values"], dict)
        and all(isinstance(state, dict) for state in value["values"].values())
    )


def state_of(fqn: str, name: str, parameters: Mapping[str, Any]) -> tuple[Any, str] | None:
    """(parameter, state) of a tensor of the optimizer `name`; None where it is of none of these parameters."""
    found = fqn.removeprefix(name + ".")
    while "." in found:
        found = found.rpartition(".")[0]
        if found in parameters:
            return parameters[found], fqn.removeprefix(f"{name}.{found}.")
    return None


# -- the way back --------------------------------------------------------------------------------------------------


def nested(tensors: Iterable[str], aliases: Mapping[str, str], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Nested state dict that canonical names were made from: a TensorRef for each tensor that no object refers to."""
    tree: dict[str, Any] = {}
    inside = set(references([*objects.values()]))
    rest = {fqn: TensorRef(aliases.get(fqn, fqn)) for fqn in (*tensors, *aliases) if fqn not in inside}
    for name, value in objects.items():
        lead, _, last = name.rpartition(".")
        if is_optimizer_object(value):
            _enter(tree, name, _optimizer(name, value, rest))
        elif last == LEFT_OVER and isinstance(value, dict):
            (_inner(tree, lead) if lead else tree).update(value)
        elif last == "extra_state" and isinstance(value, dict):
            for owner, state in value.items():
                _inner(tree, lead)[f"{owner}.{_EXTRA}" if owner else _EXTRA] = state
        else:
            _enter(tree, name, value)
    for fqn, ref in rest.items():
        lead, dot, name = fqn.partition(".")
        if dot and isinstance(tree.setdefault(lead, {}), dict):
            tree[lead][name] = ref
        else:
            tree[fqn] = ref
    return tree


def _optimizer(name: str, value: dict[str, Any], rest: dict[str, TensorRef]) -> dict[str, Any]:
    """State dict of an optimizer; its tensors are taken out of `rest`."""
    parameters = parameters_of(value["groups"])
    state: dict[Any, dict[str, Any]] = {parameter: dict(values) for parameter, values in value["values"].items()}
    for fqn in [n for n in rest if n.startswith(name + ".")]:
        parameter, _, key = fqn.removeprefix(name + ".").rpartition(".")
        owner, key = state_of(fqn, name, parameters) or (parameter, key)  # of a parameter that no group has
        state.setdefault(owner, {})[key] = rest.pop(fqn)
    return {"state": state, "param_groups": value["groups"]}


def _inner(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Dict at a name, made if it is not there."""
    holder = tree
    for key in name.split("."):
        if not isinstance(holder.setdefault(key, {}), dict):
            return tree  # a value is in the way: what is put here stands at the top, under its whole name
        holder = holder[key]
    return holder


def _enter(tree: dict[str, Any], name: str, value: Any) -> None:
    lead, _, last = name.rpartition(".")
    holder = _inner(tree, lead) if lead else tree
    holder[last if not lead or holder is not tree else name] = value


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
