"""Parameter groups of an optimizer, as lists of fqns with their hyper-parameters; saved ones matched with live ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer

    from distckpt.adapters.slots import Slot

    Named = tuple[str, Slot, int]
    """Fqn, slot, and which group it is in."""

OWN_FLAGS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""Keys of a group that say how this process computes, not what: they stay the live optimizer's own."""

_OF_EXPERTS = {"moe", "name"}
"""Keys by which DeepSpeed tells which ranks share the experts of a group: they stay the live optimizer's own."""


def described(optimizer: Optimizer, slots: Sequence[Named], prefix: str) -> list[dict[str, Any]]:
    """Groups as the checkpoint has them."""
    left = {"params", "param_names"}
    if any("moe" in group for group in optimizer.param_groups):
        left |= _OF_EXPERTS
    groups = [
        {k: _plain(v, k, prefix) for k, v in group.items() if k not in left} | {"params": []}
        for group in optimizer.param_groups
    ]
    for fqn, _, g in slots:
        groups[g]["params"].append(fqn)
    return groups


def _plain(value: Any, name: str, prefix: str) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dim():
            raise Unsupported(f"{prefix}: hyper-parameter {name} is a tensor of shape {tuple(value.shape)}")
        return value.item()
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, name, prefix) for v in value)
    return value


def check_form(value: Any, prefix: str) -> None:
    """FormatError unless an object is that of an optimizer, its parameters named by fqns or by positions."""
    match value:
        case {"optimizer": str(), "groups": [*groups], "values": dict(values)} if all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        ) and all(isinstance(state, dict) for state in values.values()):
            params = [p for group in groups for p in group["params"]]
            if all(type(p) is str for p in params) or all(type(p) is int for p in params):
                return
    raise FormatError(f"object {prefix} is not that of an optimizer: {shown(value)}")


def names_of(saved: Any, slots: Sequence[Named], rename: Callable[[str], str], prefix: str) -> dict[str | int, str]:
    """Fqn here of each parameter that was saved: renamed, or by its position in its group. Mismatch where neither can.

    torch's own `optimizer.state_dict()` names parameters by position alone.
    """
    params = [group["params"] for group in saved["groups"]]
    if not any(type(p) is int for of_group in params for p in of_group):
        return {fqn: rename(fqn) for of_group in params for fqn in of_group}
    mine: list[list[str]] = [[] for _ in params]
    for fqn, _, g in slots:
        if g < len(mine):
            mine[g].append(fqn)
    flat = len({id(slot.parameter) for _, slot, _ in slots}) < len(slots)
    if flat or [len(of_group) for of_group in mine] != [len(of_group) for of_group in params]:
        raise Mismatch(
            f"{prefix}: saved with parameters named by position, groups of {[len(g) for g in params]}; this optimizer "
            f"has groups of {[len(g) for g in mine]}{' in flat parameters' if flat else ''}: save it by fqn "
            "(torch.distributed.checkpoint.state_dict.get_optimizer_state_dict), or make the same groups"
        )
    pairs = zip(params, mine, strict=True)
    return {p: fqn for of_group, names in pairs for p, fqn in zip(of_group, names, strict=True)}


def matched(
    optimizer: Optimizer, saved: Any, slots: Sequence[Named], names: Mapping[str | int, str], prefix: str
) -> list[dict[str, Any]]:
    """Saved hyper-parameters for each live group, by fqn. Mismatch, with every problem.

    Saved parameters that this optimizer has not are not one of them: other ranks (pipeline stages) may have them, and
    a state that no rank takes is found by the plan.
    """
    of_parameter = {names[p]: group for group in saved["groups"] for p in group["params"]}
    found, problems = [], []
    for g in range(len(optimizer.param_groups)):
        fqns = [fqn for fqn, _, at in slots if at == g]
        if missing := [f for f in fqns if f not in of_parameter]:
            problems.append(f"{prefix}: the saved optimizer did not have {_shown(missing)} (group {g})")
            continue
        hypers = {id(of_parameter[f]): of_parameter[f] for f in fqns}
        if len({str({k: v for k, v in h.items() if k != "params"}) for h in hypers.values()}) > 1:
            problems.append(f"{prefix}: group {g} joins parameters of {len(hypers)} saved groups that differ")
        found.append(next(iter(hypers.values())) if hypers else {})
    problems += _other_kind(optimizer, saved["optimizer"], of_parameter, prefix)
    if problems:
        raise Mismatch("\n".join(problems))
    return found


def _other_kind(optimizer: Optimizer, was: str, of_parameter: Mapping[str, dict[str, Any]], prefix: str) -> list[str]:
    """Why the saved state is that of another optimizer: one of another class, with other hyper-parameters."""
    now = type(optimizer).__name__
    if was == now:
        return []
    known = {k for k, v in optimizer.defaults.items() if type(v) in {int, float, tuple}} - OWN_FLAGS
    lacking = {k for group in of_parameter.values() for k in known - group.keys()}
    if not lacking:
        return []
    names, was = ", ".join(sorted(lacking)), was or "another optimizer"
    text = f"{prefix}: saved from {was}, which has no {names}: {now} cannot go on from its state"
    return [f'{text}; use {was}, or load the model alone (only=("model",))']


def take_over(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Give the live groups the saved hyper-parameters."""
    for group, hyper in zip(optimizer.param_groups, saved, strict=True):
        for name, value in hyper.items():
            if name not in OWN_FLAGS:
                group[name] = _like_live(group.get(name), value)


def _like_live(live: Any, value: Any) -> Any:
    """Give the saved value in the live hyper-parameter's form: a tensor is filled in place, as graphs hold on to it."""
    plain = value.item() if isinstance(value, torch.Tensor) else value
    return live.fill_(plain) if isinstance(live, torch.Tensor) else plain


def _shown(fqns: list[str]) -> str:
    return ", ".join(fqns[:10]) + (f" and {len(fqns) - 10} more" if len(fqns) > 10 else "")
