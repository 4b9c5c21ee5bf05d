"""Optimizers of ZeRO-0, whose states carry no names: named by the order of an optimizer's parameters.

Of a pipeline, each stage's; of experts, each expert-parallel rank's. An order names them all; which of them are whose
is told by how many parameters each has, and by the shapes of their states.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.foreign.deepspeed_checks import ep_size
from distckpt.foreign.deepspeed_groups import MASTER, Members, chunk, states_of
from distckpt.foreign.deepspeed_layout import together
from distckpt.foreign.described import Tensor, whole
from distckpt.foreign.located import Located
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.foreign.deepspeed_files import TagFiles
    from distckpt.foreign.deepspeed_model import Weights
    from distckpt.format.box import Shape

    Order = list[list[str]]
    """Names of an optimizer's parameters, by group."""


def saved_by_position(files: TagFiles) -> list[tuple[int, dict[str, Any]]]:
    """(file, optimizer in it) of each pipeline stage or expert-parallel rank; [] where there is none."""
    trees = [(file, files.trees[file]) for file in files.of_experts.values()]
    found = [(file, tree.get("optimizer")) for file, tree in trees or [(s.first, s.model) for s in files.stages]]
    return [(file, saved) for file, saved in found if isinstance(saved, dict)]


def groups_of(saved: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups of such an optimizer."""
    found = saved.get("optimizer_state_dict", saved).get("param_groups")
    return found if isinstance(found, list) else []


def orders_of(files: TagFiles, weights: Weights, order: Order) -> list[Order] | str:
    """Order of each optimizer's own parameters, of an order of them all; or why there is none."""
    optimizers = [saved for _, saved in saved_by_position(files)]
    shapes = weights.shapes
    if odd := next((n for names in order for n in names if n not in shapes), None):
        return f"it has no {odd}"
    wanted = [_shapes_in(saved) for saved in optimizers]
    if files.layers:
        return by_stage(order, wanted, shapes)
    found = _by_rank(weights, order, optimizers) if files.of_experts else [order]
    if not isinstance(found, str) and any(
        [*map(len, own)] == [*map(len, of)] and not _fits(own, of, shapes)
        for own, of in zip(found, wanted, strict=True)
    ):
        return MISFIT
    return found


MISFIT = "its states have other shapes than the optimizer's parameters"


def _shapes_in(saved: Mapping[str, Any]) -> list[list[Shape | None]]:
    """Shapes of an optimizer's parameters, by group; None where its states do not tell."""
    if "fp32_groups_flat" in saved:
        return []
    masters, states = saved.get("fp32_groups"), saved.get("state", {})
    if isinstance(masters, list):
        return [[m.shape for m in group] for group in masters]

    def of_states(members: Mapping[str, Any]) -> Shape | None:
        shapes = {v.shape for v in members.values() if isinstance(v, Located) and v.shape}
        return shapes.pop() if len(shapes) == 1 else None

    return [[of_states(states.get(p, {})) for p in group["params"]] for group in groups_of(saved)]


# -- experts ---------------------------------------------------------------------------------------------------------


def _by_rank(weights: Weights, order: Order, optimizers: list[dict[str, Any]]) -> list[Order] | str:
    """Of each expert-parallel rank: its experts' parameters in groups of their own, as DeepSpeed splits them off."""
    experts, found = weights.experts, []
    parts = [[[n for n in g if (experts.number_of(n) is not None) is moe] for g in order] for moe in (False, True)]
    for rank, saved in enumerate(optimizers):
        groups = groups_of(saved)
        own: dict[int, list[str]] = {}
        count = 0
        for moe, names in enumerate(parts):
            places = [g for g, group in enumerate(groups) if bool(group.get("moe")) == moe]
            for group in (g for g in names if g):
                size = ep_size(groups[places[0]]) if places else 1
                left = [n for n in group if experts.is_of(n, size, experts.part(rank, len(optimizers), size))]
                count += len(left)
                while left and places and len(left) >= (n := len(groups[places[0]]["params"])):
                    own[places.pop(0)], left = left[:n], left[n:]
        if len(own) < len(groups) or sum(map(len, own.values())) != count:
            counts = [len(group["params"]) for group in groups]
            return f"its groups have {counts} parameters, the optimizer's {[len(g) for g in order]} over all ranks"
        found.append([own[g] for g in range(len(groups))])
    return found


# -- stages ----------------------------------------------------------------------------------------------------------

_TIED = "tied_modules."


def by_stage(order: Order, wanted: list[list[list[Shape | None]]], shapes: Mapping[str, Shape]) -> list[Order] | str:
    """Order of each stage: successive layers, and tied ones, so that counts and shapes are those wanted; or why not.

    wanted: shape of each parameter of each group of each stage (None: not known).
    """
    keys = {name: _layer_of(name) for group in order for name in group}
    tied = sorted({key for key in keys.values() if isinstance(key, str)})
    layers = sorted({key for key in keys.values() if isinstance(key, int)})
    if len(tied) > _MOST_TIED:
        return f"{len(tied)} tied layers: more than are tried"
    choices = [frozenset(c) for n in range(len(tied) + 1) for c in combinations(tied, n)]

    @cache
    def solved(stage: int, start: int) -> list[list[Order]]:
        """At most two ways to give the layers from `start` on to the stages from `stage` on."""
        if stage == len(wanted):
            return [[]] if start == len(layers) else []
        found = []
        for stop in range(start, len(layers) + 1):
            for more in choices:
                chosen = {*layers[start:stop], *more}
                own = [some for group in order if (some := [n for n in group if keys[n] in chosen])]
                if [[len(g)] for g in own] == [[len(g)] for g in wanted[stage]] and _fits(own, wanted[stage], shapes):
                    found += [[own, *rest] for rest in solved(stage + 1, stop)]
        return found[:2]

    found = solved(0, 0)
    if len(found) == 1:
        return found[0]
    return "its stages can share out the parameters in several ways" if found else "its stages have other parameters"


_MOST_TIED = 4


def _layer_of(name: str) -> int | str:
    """Layer that a parameter belongs to: its number, or the key of a tied one."""
    head, _, rest = name.partition(".")
    return int(head) if head.isdigit() else f"{_TIED}{rest.partition('.')[0]}"


def _fits(names: Order, wanted: list[list[Shape | None]], shapes: Mapping[str, Shape]) -> bool:
    pairs = ((n, s) for group, of in zip(names, wanted, strict=True) for n, s in zip(group, of, strict=True))
    return all(shape in {None, shapes[name]} for name, shape in pairs)


# -- what they hold --------------------------------------------------------------------------------------------------


def plain(file: int, saved: Mapping[str, Any], order: Order) -> dict[str, Any] | None:
    """State dict of an optimizer, by position where the order does not fit; None where it has no whole tensors."""
    saved = saved if "fp32_groups_flat" in saved else saved.get("optimizer_state_dict", saved)
    if saved.keys() != {"state", "param_groups"}:
        return None
    state: dict[Any, dict[str, Any]] = {
        p: {k: whole(file, v) if isinstance(v, Located) else v for k, v in members.items()}
        for p, members in saved["state"].items()
    }
    groups = saved["param_groups"]
    if [len(n) for n in order] == [len(g["params"]) for g in groups]:
        named = dict(zip([p for g in groups for p in g["params"]], [n for of in order for n in of], strict=True))
        state = {named[p]: members for p, members in state.items()}
        groups = [{**g, "params": [named[p] for p in g["params"]]} for g in groups]
    return {"state": state, "param_groups": groups}


def mixed_members(
    files: TagFiles, file: int, saved: Mapping[str, Any], order: Order, shapes: Mapping[str, Shape]
) -> list[Members] | str:
    """Members of each group of an optimizer over 16-bit weights, or why this order does not fit it."""
    masters = saved.get("fp32_groups", saved.get("fp32_groups_flat"))
    if not isinstance(masters, list) or len(masters) != len(order):
        return f"it has {len(masters) if isinstance(masters, list) else 'no'} groups, the optimizer has {len(order)}"
    found = []
    for number, (names, group) in enumerate(zip(order, masters, strict=True)):
        if missing := [n for n in names if n not in shapes]:
            return f"it has no {missing[0]}"
        made = Members(number, {name: shapes[name] for name in names})
        if isinstance(group, Located):
            why = _from_flat(made, file, group, states_of(saved, number, files.name(file)))
        else:
            ids = saved["optimizer_state_dict"]["param_groups"][number]["params"]
            why = _from_whole(made, file, group, [saved["optimizer_state_dict"]["state"].get(p, {}) for p in ids])
        if why:
            return f"group {number}: {why}"
        found.append(made)
    return found


def _from_flat(made: Members, file: int, flat: Located, states: Mapping[str, Any]) -> str:
    """FP16_Optimizer: one flat buffer a group."""
    numels = {name: prod(shape) for name, shape in made.shapes.items()}
    total = sum(numels.values())
    if flat.shape != (total,):
        return f"its buffer has shape {flat.shape}, the parameters {total} elements"
    for state, value in {MASTER: flat, **states}.items():
        if isinstance(value, Located) and value.shape == flat.shape:
            pieces = together(numels, [0] * len(numels), max(1, total))
            made.tensors[state] = {
                p.name: Tensor(value.dtype, made.shapes[p.name], (chunk(file, value, p),)) for p in pieces
            }
        else:
            made.values[state] = whole(file, value) if isinstance(value, Located) else value
    return ""


def _from_whole(made: Members, file: int, masters: list[Any], states: list[dict[str, Any]]) -> str:
    """FP16_UnfusedOptimizer: a tensor for each parameter."""
    if [getattr(m, "shape", None) for m in masters] != [*made.shapes.values()] or len(states) != len(masters):
        return f"shapes {shown([getattr(m, 'shape', None) for m in masters])}, not {shown([*made.shapes.values()])}"
    for name, master, state in zip(made.shapes, masters, states, strict=True):
        for key, value in {MASTER: master, **state}.items():
            if isinstance(value, Located):
                made.tensors.setdefault(key, {})[name] = whole(file, value)
            else:
                made.values[key] = value
    return ""
