"""Optimizer state by fqn, for any torch optimizer over any parameters that the other adapters know.

Each state of a parameter that is a tensor is `prefix.<fqn>.<state>`; a tensor subclass (torchao's 8-bit state) is the
tensors it flattens into. Everything else is one object: parameter groups as lists of fqns with their
hyper-parameters, and the states that are not tensors.

Invariant: `step()` is never called to make state exist. What a fresh optimizer lacks is made from the checkpoint's own
description, and handed over only when it is filled.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor

from distckpt.adapters import dtensor, tensors
from distckpt.adapters.module import keeps_replicas_equal, named_parameters
from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format.text import shown
from distckpt.state import State, torch_dtype
from distckpt.statedict import insert, references

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from torch.optim import Optimizer

    from distckpt.format.manifest import TensorInfo
    from distckpt.state import Saved

_OWN_FLAGS = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}
"""Keys of a group that say how this process computes, not what: they stay the live optimizer's own."""

_SCALARS = {"step", "eta", "mu", "mu_product"}
"""States of torch's optimizers that are 0-d whatever the parameter's shape."""


class OptimizerAdapter:
    """One optimizer, over parameters of `models` (prefix of the names -> model)."""

    def __init__(self, optimizer: Optimizer, models: Mapping[str, nn.Module], prefix: str) -> None:
        self._optimizer, self._models, self._prefix = optimizer, models, prefix
        self._made: dict[str, torch.Tensor] = {}
        self._states: dict[torch.Tensor, dict[str, Any]] = {}

    # -- names -------------------------------------------------------------------------------------------------

    def _names(self) -> dict[int, str]:
        """Fqn of each parameter by identity, checked to name every parameter of every group."""
        names: dict[int, str] = {}
        for lead, model in self._models.items():
            for name, parameter in named_parameters(model):
                names.setdefault(id(parameter), f"{lead}.{name}" if lead else name)
        for g, group in enumerate(self._optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if id(p) not in names:
                    raise Unsupported(
                        f"{self._prefix}: parameter {i} of group {g}, shape {tuple(p.shape)}, belongs to no "
                        "model of this state: pass its model too, and make the optimizer after wrapping the model"
                    )
        return names

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """Yield (fqn, parameter, its group)."""
        names = self._names()
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                yield names[id(p)], p, group

    # -- save --------------------------------------------------------------------------------------------------

    def capture(self) -> State:
        """See Stateful.capture."""
        captured = State()
        values: dict[str, dict[str, Any]] = {}
        equal = all(keeps_replicas_equal(model) for model in self._models.values())
        for fqn, p, _ in self._parameters():
            trusted = equal or isinstance(p, DTensor)
            for name, value in self._optimizer.state.get(p, {}).items():
                key = f"{self._prefix}.{fqn}.{name}"
                found, rest = self._one_state(key, value, p)
                captured.tensors.update({f: tensors.describe(t, f, trusted=trusted) for f, t in found.items()})
                if rest is not None:
                    values.setdefault(fqn, {})[name] = rest[0]
        names = self._names()
        groups = [
            {k: self._hyper(v, k) for k, v in group.items() if k not in {"params", "param_names"}}
            | {"params": [names[id(p)] for p in group["params"]]}
            for group in self._optimizer.param_groups
        ]
        captured.objects[self._prefix] = {
            "optimizer": type(self._optimizer).__name__,
            "groups": groups,
            "values": values,
        }
        return captured

    @staticmethod
    def _one_state(key: str, value: Any, p: torch.Tensor) -> tuple[dict[str, torch.Tensor], tuple[Any] | None]:
        """Return (tensors by fqn, the value that goes into the object, if there is one)."""
        if isinstance(value, DTensor):
            if is_flattened(local := dtensor.local_of(value)):
                raise Unsupported(
                    f"{key}: a DTensor over {type(local).__qualname__} cannot be saved: its blocks are cut per rank, "
                    "and another world size could not read them; use this optimizer on unsharded parameters"
                )
            return {key: value}, None
        if isinstance(value, torch.Tensor) and is_flattened(value):
            flat = _flatten(value, key)
            return flat[0], (flat[1],)
        if isinstance(value, torch.Tensor):
            if isinstance(p, DTensor) and value.dim() > 0:
                raise Unsupported(
                    f"{key}: a plain tensor of shape {tuple(value.shape)} for a parameter that is a DTensor of shape "
                    f"{tuple(p.shape)}: which part of a global state it is cannot be known"
                )
            return {key: value}, None
        rest, found = tensors.extract(value, key)
        return found, (rest,)

    def _hyper(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            if value.dim():
                raise Unsupported(f"{self._prefix}: hyper-parameter {name} is a tensor of shape {tuple(value.shape)}")
            return value.item()
        if isinstance(value, (list, tuple)):
            return type(value)(self._hyper(v, name) for v in value)
        return value

    # -- load --------------------------------------------------------------------------------------------------

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets. What the live optimizer holds is filled in place; the rest is made, uninitialised."""
        self._made, self._states = {}, {}
        if self._prefix not in saved.objects:
            return State(objects={self._prefix: True})
        _check_form(saved.objects[self._prefix], self._prefix)
        self._groups(saved)
        by_parameter = self._saved_states(saved)
        values = {saved.rename(fqn): v for fqn, v in saved.objects[self._prefix]["values"].items()}
        wanted: dict[str, torch.Tensor] = {}
        for fqn, p, group in self._parameters():
            live, new = self._optimizer.state.get(p, {}), dict[str, Any]()
            lead = f"{self._prefix}.{fqn}."
            for name, value in values.get(fqn, {}).items():
                for key in _flattened_names(value, lead + name) or [*references(value)]:
                    self._made[key] = wanted[key] = _fresh(saved, key, torch.empty(0, device=p.device))
                new[name] = value
            for key in by_parameter.get(fqn, []):
                name = key.removeprefix(lead)
                if key not in wanted:
                    new[name] = wanted[key] = _state_tensor(saved.tensors[key], name, p, group, live.get(name))
            self._states[p] = new
        tensors.refuse_own_values(self._prefix, wanted, saved)
        found = {key: tensors.describe(t, key) for key, t in wanted.items()}
        return State(found, objects={self._prefix: True})

    def _saved_states(self, saved: Saved) -> dict[str, list[str]]:
        """Fqns of saved state tensors, by the parameter (of this optimizer) that they belong to."""
        mine = {fqn for fqn, _, _ in self._parameters()}
        lead = self._prefix + "."
        found: dict[str, list[str]] = {}
        for key in saved.tensors:
            if key.startswith(lead):
                fqn = key.removeprefix(lead)
                while (cut := fqn.rpartition(".")[0]) and fqn not in mine:
                    fqn = cut
                if fqn in mine:
                    found.setdefault(fqn, []).append(key)
        return found

    def _groups(self, saved: Saved) -> list[dict[str, Any]]:
        """Saved hyper-parameters for each live group, matched by fqn. Mismatch, with every problem."""
        names = self._names()
        of_parameter = {
            saved.rename(fqn): group for group in saved.objects[self._prefix]["groups"] for fqn in group["params"]
        }
        found, problems = [], []
        for g, group in enumerate(self._optimizer.param_groups):
            fqns = [names[id(p)] for p in group["params"]]
            if missing := [f for f in fqns if f not in of_parameter]:
                problems.append(f"{self._prefix}: the saved optimizer did not have {_shown(missing)} (group {g})")
                continue
            hypers = {id(of_parameter[f]): of_parameter[f] for f in fqns}
            if len({str({k: v for k, v in h.items() if k != "params"}) for h in hypers.values()}) > 1:
                problems.append(f"{self._prefix}: group {g} joins parameters of {len(hypers)} saved groups that differ")
            found.append(next(iter(hypers.values())) if hypers else {})
        mine = {f for group in self._optimizer.param_groups for f in (names[id(p)] for p in group["params"])}
        if extra := [f for f in of_parameter if f not in mine]:
            problems.append(f"{self._prefix}: this optimizer does not have {_shown(extra)} of the saved one")
        problems += self._other_kind(saved, of_parameter)
        if problems:
            raise Mismatch("\n".join(problems))
        return found

    def _other_kind(self, saved: Saved, of_parameter: Mapping[str, dict[str, Any]]) -> list[str]:
        """Why the saved state is that of another optimizer: one of another class, with other hyper-parameters."""
        was, now = saved.objects[self._prefix]["optimizer"], type(self._optimizer).__name__
        if was == now:
            return []
        known = {k for k, v in self._optimizer.defaults.items() if type(v) in {int, float, tuple}} - _OWN_FLAGS
        lacking = {k for group in of_parameter.values() for k in known - group.keys()}
        if not lacking:
            return []
        names = ", ".join(sorted(lacking))
        text = f"{self._prefix}: saved from {was}, which has no {names}: {now} cannot go on from its state"
        return [f'{text}; use {was}, or load the model alone (only=("model",))']

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore. A parameter without saved state has none afterwards, as with load_state_dict."""
        if self._prefix not in saved.objects:
            return []
        notes = []
        saved_class = saved.objects[self._prefix]["optimizer"]
        if saved_class != type(self._optimizer).__name__:
            notes.append(f"{self._prefix}: saved from {saved_class}, loaded into {type(self._optimizer).__name__}")
        for group, hyper in zip(self._optimizer.param_groups, self._groups(saved), strict=True):
            for name, value in hyper.items():
                if name not in _OWN_FLAGS:
                    group[name] = _like_live(group.get(name), value)
        for p, new in self._states.items():
            if new:
                self._optimizer.state[p] = {name: self._finished(name, value, p) for name, value in new.items()}
            else:
                self._optimizer.state.pop(p, None)
        self._made, self._states = {}, {}
        return notes

    def _finished(self, name: str, value: Any, p: torch.Tensor) -> Any:
        if isinstance(value, dict) and _SUBCLASS in value:
            fqn = f"{self._prefix}.{self._names()[id(p)]}.{name}"
            return _unflatten(value, fqn, self._made, self._optimizer)
        return value if isinstance(value, torch.Tensor) else insert(value, self._made)


def _check_form(value: Any, prefix: str) -> None:
    """FormatError unless an object is one that `capture` makes."""
    match value:
        case {"optimizer": str(), "groups": [*groups], "values": dict(values)} if all(
            isinstance(group, dict)
            and isinstance(group.get("params"), list)
            and all(isinstance(fqn, str) for fqn in group["params"])
            for group in groups
        ) and all(isinstance(state, dict) for state in values.values()):
            return
    raise FormatError(f"object {prefix} is not that of an optimizer: {shown(value)}")


def _shown(fqns: list[str]) -> str:
    return ", ".join(fqns[:10]) + (f" and {len(fqns) - 10} more" if len(fqns) > 10 else "")


def _state_tensor(info: TensorInfo, name: str, p: torch.Tensor, group: dict[str, Any], live: Any) -> torch.Tensor:
    """Memory for one saved state: the live tensor where there is one, else one made as the optimizer would."""
    if isinstance(live, torch.Tensor) and tuple(live.shape) == info.shape and not is_flattened(live):
        return live
    if name in _SCALARS or (info.shape == () and p.dim()):
        on_device = group.get("capturable") or group.get("fused")
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype), device=p.device if on_device else "cpu")
    return tensors.empty_like(p.detach(), info.shape, torch_dtype(info.dtype))


def _fresh(saved: Saved, key: str, template: torch.Tensor) -> torch.Tensor:
    if key not in saved.tensors:
        raise Mismatch(f"{key}: the optimizer's object names it, the checkpoint has no such tensor")
    info = saved.tensors[key]
    return tensors.empty_like(template, info.shape, torch_dtype(info.dtype))


def _like_live(live: Any, value: Any) -> Any:
    """Give the saved value in the live hyper-parameter's form: a tensor is filled in place, as graphs hold on to it."""
    if isinstance(live, torch.Tensor):
        return live.fill_(value)
    return value


# -- tensor subclasses (torchao's low-bit states), through __tensor_flatten__ ------------------------------------

_SUBCLASS = "tensor_subclass"


def is_flattened(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a subclass that flattens into plain ones."""
    return not isinstance(tensor, DTensor) and hasattr(tensor, "__tensor_flatten__")


def _flatten(value: Any, key: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    names, context = value.__tensor_flatten__()
    described = {
        _SUBCLASS: type(value).__qualname__,
        "module": type(value).__module__,
        "inner": list(names),
        "context": _context_to_values(context),
        "shape": tuple(value.shape),
        "stride": tuple(value.stride()),
    }
    return {f"{key}.{n}": getattr(value, n) for n in names}, described


def _flattened_names(value: Any, key: str) -> list[str]:
    return [f"{key}.{n}" for n in value["inner"]] if isinstance(value, dict) and _SUBCLASS in value else []


def _unflatten(value: dict[str, Any], key: str, made: dict[str, torch.Tensor], optimizer: Optimizer) -> torch.Tensor:
    """Tensor subclass from its parts. Its class must be of the optimizer's own package: a checkpoint picks no code."""
    package = type(optimizer).__module__.partition(".")[0]
    module = sys.modules.get(value["module"]) if value["module"].partition(".")[0] == package else None
    found = getattr(module, value[_SUBCLASS], None)
    if not (isinstance(found, type) and issubclass(found, torch.Tensor)):
        raise Mismatch(
            f"{key}: was a {value['module']}.{value[_SUBCLASS]}; a {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__} cannot take it over: use the optimizer it was saved from"
        )
    inner = {n: made[f"{key}.{n}"] for n in value["inner"]}
    whole: torch.Tensor = found.__tensor_unflatten__(  # type: ignore[attr-defined]
        inner, _context_from_values(value["context"]), value["shape"], value["stride"]
    )
    return whole


def _context_to_values(context: Any) -> Any:
    """Put what torch adds to a flattening context, dtypes and sizes, as values that the format has."""
    if isinstance(context, torch.dtype):
        return ("torch.dtype", str(context).removeprefix("torch."))
    if isinstance(context, torch.Size):
        return ("torch.Size", list(context))
    return type(context)(map(_context_to_values, context)) if isinstance(context, (list, tuple)) else context


def _context_from_values(context: Any) -> Any:
    if isinstance(context, tuple) and len(context) == 2 and context[0] == "torch.dtype":
        return torch_dtype(context[1])
    if isinstance(context, tuple) and len(context) == 2 and context[0] == "torch.Size":
        return torch.Size(context[1])
    return type(context)(map(_context_from_values, context)) if isinstance(context, (list, tuple)) else context
