"""What a live state dict takes of a checkpoint's objects: matched before anything moves, put in place after.

Pure: both sides are trees in which TensorRefs stand for tensors. Matching and refilling follow one rule: dicts meet key
by key, lists and tuples of one length member by member, anything else is replaced whole.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.format.objects import TensorRef
from distckpt.format.text import shown
from distckpt.statedict import (
    entries,
    insert,
    is_extra_state,
    is_optimizer_object,
    nested_optimizer,
    owner_of,
    parameters_of,
    references,
    state_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from distckpt.statedict import Entry, KindOf


_BY_POSITION = (
    ": parameters are named by position here. torch.distributed.checkpoint.state_dict.get_optimizer_state_dict names "
    "them by fqn, and TrainState does"
)


@dataclass(slots=True)
class Match:
    """How live objects take saved ones, both with TensorRefs."""

    taken: dict[str, str] = field(default_factory=dict)
    """Saved fqn -> live fqn of the tensor whose memory takes it."""
    fresh: list[str] = field(default_factory=list)
    """Saved fqns of tensors without a live counterpart."""
    missing: list[str] = field(default_factory=list)
    """Paths that only the live object has."""
    problems: list[str] = field(default_factory=list)

    def add(self, live: Any, saved: Any, name: str) -> None:
        """Match the live object of this name."""
        if is_optimizer_object(live):
            self._add_optimizer(live, saved, name)
        else:
            self._add_tree(live, saved, name)

    def _add_optimizer(self, live: dict[str, Any], saved: Any, name: str) -> None:
        if not is_optimizer_object(saved):
            self.problems.append(f"{name}: an optimizer's state dict is expected, the checkpoint has {shown(saved)}")
            return
        known = {str(p): group for group in saved["groups"] for p in group["params"]}
        for g, group in enumerate(live["groups"]):
            if lacking := [p for p in group["params"] if str(p) not in known]:
                how = _BY_POSITION if type(lacking[0]) is int else ""
                self.problems.append(f"{name}: the saved optimizer did not have {shown(lacking)} (group {g}){how}")
            of_group = {id(found): found for p in group["params"] if (found := known.get(str(p)))}
            if len({repr({k: v for k, v in h.items() if k != "params"}) for h in of_group.values()}) > 1:
                self.problems.append(f"{name}: group {g} joins parameters of {len(of_group)} saved groups that differ")
        self.fresh += references(saved["groups"])
        self._add_tree(live["values"], saved["values"], name)

    def _add_tree(self, live: Any, saved: Any, path: str) -> None:
        if isinstance(live, TensorRef) and live.kind == "torch":
            if isinstance(saved, TensorRef):
                self.taken[saved.fqn] = live.fqn
            else:
                self.problems.append(f"{path}: a tensor is expected, the checkpoint has {shown(saved)}")
        elif _are_dicts(live, saved):
            self.missing += [f"{path}.{key}" for key in live if key not in saved]
            for key, value in saved.items():
                if key in live:
                    self._add_tree(live[key], value, f"{path}.{key}")
                else:
                    self.fresh += references(value)
        elif _are_alike(live, saved):
            for i, (a, b) in enumerate(zip(live, saved, strict=True)):
                self._add_tree(a, b, f"{path}.{i}")
        else:
            self.fresh += references(saved)


def _are_dicts(live: Any, saved: Any) -> bool:
    return type(live) in {dict, OrderedDict} and type(saved) in {dict, OrderedDict}


def _are_alike(live: Any, saved: Any) -> bool:
    return type(live) in {list, tuple} and type(live) is type(saved) and len(live) == len(saved)


# -- back into a state dict --------------------------------------------------------------------------------------


def refill(tree: Mapping[Any, Any], objects: Mapping[str, Any], tensors: Mapping[str, Any], kind_of: KindOf) -> None:
    """Put the values of a checkpoint's objects into a state dict, in place; its own tensors have been filled already.

    `tensors`, by saved fqn: those that TensorRefs stand for, and states that only the checkpoint's optimizer has.
    """
    for entry in list(entries(tree, kind_of)):
        if entry.kind == "model":
            extra = objects.get(f"{entry.name}.extra_state", {})
            for key in filter(is_extra_state, list(entry.value)):
                if owner_of(key) in extra:
                    entry.value[key] = _merged(entry.value[key], extra[owner_of(key)], tensors, kind_of)
        elif entry.name not in objects:
            continue
        elif entry.kind in {"optimizer", "flattened"}:
            _refill_optimizer(entry, objects[entry.name], tensors, kind_of)
        elif entry.key is None:
            entry.holder.update(_merged(entry.value, objects[entry.name], tensors, kind_of))
        elif entry.kind == "tree":
            entry.holder[entry.key] = _merged(entry.value, objects[entry.name], tensors, kind_of)


def _refill_optimizer(entry: Entry, saved: Any, tensors: Mapping[str, Any], kind_of: KindOf) -> None:
    tree, flat = entry.value, entry.kind == "flattened"
    mine = parameters_of(nested_optimizer(tree)[1] if flat else tree["param_groups"])
    for parameter, key, value in _saved_states(entry.name, saved, tensors, mine):
        holder, at = (tree, f"state.{parameter}.{key}") if flat else (tree["state"].setdefault(parameter, {}), key)
        holder[at] = _merged(holder.get(at), value, tensors, kind_of)
    of_parameter = {str(p): group for group in insert(saved["groups"], tensors) for p in group["params"]}
    for holder, key, parameter, hyper in _hypers(tree, flat=flat):
        if hyper not in {"params", "param_names"} and hyper in of_parameter.get(parameter, {}):
            holder[key] = _like_live(holder[key], of_parameter[parameter][hyper], kind_of)


def _saved_states(
    name: str, saved: Any, tensors: Mapping[str, Any], mine: Mapping[str, Any]
) -> Iterator[tuple[Any, str, Any]]:
    """(parameter, state, value) of what the checkpoint has besides tensors that were filled in place."""
    for parameter, members in saved["values"].items():
        if str(parameter) in mine:
            yield from ((mine[str(parameter)], key, value) for key, value in members.items())
    referred = set(references(saved))
    for fqn, tensor in tensors.items():
        if fqn.startswith(name + ".") and fqn not in referred and (at := state_of(fqn, name, mine)):
            yield *at, tensor


def _hypers(tree: dict[str, Any], *, flat: bool) -> list[tuple[dict[str, Any], str, str, str]]:
    """(where it stands, key, a parameter that it is of, name) of each hyper-parameter."""
    if flat:
        found = [key for key in tree if key.startswith("param_groups.")]
        return [(tree, key, *key.removeprefix("param_groups.").rpartition(".")[::2]) for key in found]
    return [(g, key, str(g["params"][0]), key) for g in tree["param_groups"] if g["params"] for key in g]


def _like_live(live: Any, saved: Any, kind_of: KindOf) -> Any:
    """Give a hyper-parameter in the live one's form: a tensor is filled in place, as graphs hold on to it."""
    plain = saved.item() if kind_of(saved) == "torch" and not tuple(saved.shape) else saved
    if kind_of(live) == "torch" and isinstance(plain, (int, float)):
        return live.fill_(plain)
    return plain


def _merged(live: Any, saved: Any, tensors: Mapping[str, Any], kind_of: KindOf) -> Any:
    """Return `live` with the saved values. Its tensors have been filled; its dicts and lists stay the same objects."""
    if kind_of(live) == "torch" and isinstance(saved, TensorRef):
        return live
    if _are_dicts(live, saved):
        for key, value in saved.items():
            live[key] = _merged(live[key], value, tensors, kind_of) if key in live else insert(value, tensors)
        return live
    if _are_alike(live, saved):
        members = [_merged(a, b, tensors, kind_of) for a, b in zip(live, saved, strict=True)]
        if type(live) is tuple:
            return tuple(members)
        live[:] = members
        return live
    return insert(saved, tensors)
