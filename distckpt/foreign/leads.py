"""Which entries of another tool's state dict are the model, the optimizer, the schedule: one mapping of names. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    KindOf = Callable[[Any], "str | None"]

USUAL = {
    "model": ("model_state_dict", "model_state", "state_dict", "module", "net"),
    "optim": ("optimizer", "optimizer_state_dict", "optimizer_state", "optims"),
    "lr_scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler_state_dict"),
}
"""What our leads are often called by others."""

_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


def arranged(
    tree: Mapping[Any, Any], names: Mapping[str, str], kind_of: KindOf, like: Mapping[Any, Any] | None = None
) -> dict[Any, Any]:
    """Tree with its entries under our leads: those that `names` gives (entry -> lead) first, then the usual ones.

    A usual name is taken only where no other claims the same lead. Tensors at the top are a model's. Mismatch for an
    entry that is not there. `like`: the state dict that is to be loaded: what that has, too, keeps its name.
    """
    like = like or {}
    rest = dict(tree)
    chosen: dict[str, Any] = {}
    for entry, lead in names.items():
        if lead in chosen:
            raise Mismatch(f"names={dict(names)!r}: two entries are to be {lead!r}")
        chosen[lead] = _taken(rest, entry, tree)
    rest = {key: value for key, value in rest.items() if key not in chosen} | chosen
    rest = _lifted(rest, like)
    for lead, usual in USUAL.items():
        claims = [name for name in usual if isinstance(rest.get(name), dict) and name not in {*chosen, *like}]
        if lead not in rest and len(claims) == 1:
            rest[lead] = rest.pop(claims[0])
    bare = {key: value for key, value in rest.items() if type(key) is str and kind_of(value) == "torch"}
    if bare and "model" not in rest and not bare.keys() & like.keys():
        extra = {k for k in rest if type(k) is str and k.endswith("_extra_state")}
        rest = {"model": {k: v for k, v in rest.items() if k in bare or k in extra}} | {
            k: v for k, v in rest.items() if k not in bare and k not in extra
        }
    if isinstance(model := rest.get("model"), dict):
        known = like.get("model")
        if not isinstance(known, dict) or not known.keys() & model.keys():
            rest["model"] = _unwrapped(model)
    return rest


def gathered(tree: Mapping[Any, Any], lead: str) -> dict[Any, Any]:
    """Tree whose entries that are of no part of the training state lie together, under one lead."""
    parts = {"model", "optim", "lr_scheduler", "deepspeed"}
    return {k: v for k, v in tree.items() if k in parts} | {lead: {k: v for k, v in tree.items() if k not in parts}}


def _taken(rest: dict[Any, Any], entry: str, tree: Mapping[Any, Any]) -> Any:
    """Remove an entry from the tree and return it; dots lead into nested dicts."""
    if entry in rest:
        return rest.pop(entry)
    head, dot, tail = entry.partition(".")
    if dot and isinstance(rest.get(head), dict):
        rest[head] = dict(rest[head])
        found = _taken(rest[head], tail, tree)
        if not rest[head]:
            del rest[head]
        return found
    raise Mismatch(f"names= speaks of the entry {entry!r}; the source has {shown(sorted(map(str, tree)))}")


def _lifted(tree: dict[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Entries of the one dict that holds all there is (`app`, in torch's own tutorial) as those of the tree.

    Also those of a model (all that a safetensors file is) for a state dict that is a model's own.
    """
    if "model" not in like and isinstance(model := tree.get("model"), dict) and model.keys() & like.keys():
        return {k: v for k, v in tree.items() if k != "model"} | model
    if tree.keys() & like.keys():
        return tree
    known = {name for lead, usual in USUAL.items() for name in (lead, *usual)}
    holders = [k for k, v in tree.items() if isinstance(v, dict) and v.keys() & known]
    if tree.keys() & known or len(holders) != 1:
        return tree
    inner = tree[holders[0]]
    return (
        tree
        if inner.keys() & (tree.keys() - {holders[0]})
        else {k: v for k, v in tree.items() if k != holders[0]} | inner
    )


def _unwrapped(model: dict[Any, Any]) -> dict[Any, Any]:
    """Model without the prefixes that wrappers leave in its names."""
    if not all(type(key) is str for key in model):
        return model
    names = {key: key for key in model}
    for prefix in _PREFIXES:
        names = {key: name.replace(prefix, "") for key, name in names.items()}
    if all(name.startswith("module.") for name in names.values()):
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    return {names[key]: value for key, value in model.items()} if len(set(names.values())) == len(names) else model
