"""A nested state dict as a state: what `distckpt.save` takes and `distckpt.load` fills, in place.

Values may be tensors of any kind, NumPy arrays, Python values, nested dicts with keys of any type, and at the top
objects with state_dict() and load_state_dict(). Only DTensors are taken to be equal where ranks hold the same of them:
of everything else that differs, each rank keeps its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from distckpt.adapters import tensors
from distckpt.adapters.refill import Match, refill
from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format.layout import is_name
from distckpt.state import GlobalTensor, JoinedObject, State, torch_dtype
from distckpt.statedict import LEFT_OVER, canonical, is_optimizer_object, parameters_of, references, state_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from distckpt.format.manifest import TensorInfo
    from distckpt.state import Saved
    from distckpt.statedict import Named


class StateDictAdapter:
    """One state dict. `only`: leads of the names to load; the entries of others are not touched."""

    def __init__(self, state_dict: dict[Any, Any], only: tuple[str, ...] | None = None) -> None:
        self._live, self._only = state_dict, only
        self._view: dict[Any, Any] = {}
        self._filled: dict[str, torch.Tensor] = {}
        self.unusable: str | None = None
        """See TrainState.unusable."""

    def parameter_groups(self) -> None:
        """See Loadable.parameter_groups: a state dict has no order of its own."""

    def capture(self) -> State:
        """See Stateful.capture."""
        self._check()
        named = canonical(_taken(self._live), tensors.kind_of)
        aliases = tensors.ties(named.models)
        objects = {name: _joinable(value) for name, value in named.objects.items()}
        return State(_described(named, named.tensors.keys() - aliases.keys()), aliases, objects)

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets. What trees and optimizers of the checkpoint have besides is made, uninitialised."""
        self._check()
        self._view = _taken({key: value for key, value in self._live.items() if self._wants(key)})
        named = canonical(self._view, tensors.kind_of)
        aliases = tensors.ties(named.models)
        direct = named.tensors.keys() - aliases.keys() - set(references([*named.objects.values()]))
        state = State(_described(named, direct), aliases, dict.fromkeys(named.objects, True))
        self._filled = {}
        for name, live in named.objects.items():
            if name in saved.objects:
                self._match(name, live, named, saved, state)
        state.tensors.update({fqn: tensors.describe(t, fqn, trusted=False) for fqn, t in self._filled.items()})
        _refuse(state.tensors, saved)
        return state

    def _check(self) -> None:
        if not isinstance(self._live, dict):
            raise Unsupported(
                f"a {type(self._live).__qualname__} is no state dict; give a dict, such as {{'model': model}}"
            )

    def _match(self, name: str, live: Any, named: Named, saved: Saved, state: State) -> None:
        """Find memory for the tensors of one object."""
        found = Match()
        found.add(live, saved.objects[name], name)
        if found.problems:
            state.problems[name] = "\n".join(found.problems)
            return
        state.objects.update(dict.fromkeys(found.missing, True))
        self._filled.update({fqn: named.tensors[own] for fqn, own in found.taken.items()})
        for fqn in found.fresh:
            if fqn not in saved.tensors:
                raise FormatError(f"object {name} refers to tensor {fqn!r}, which the checkpoint does not have")
            info = saved.tensors[fqn]
            self._filled[fqn] = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if is_optimizer_object(live):
            self._filled.update(_new_states(name, live, named, saved, state))

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        refill(self._view, saved.objects, self._filled, tensors.kind_of)
        for key, value in self._view.items():
            owner: Any = self._live.get(key)
            if _is_stateful(owner):
                owner.load_state_dict(value)
            else:
                self._live[key] = value
        self._view, self._filled = {}, {}
        return []

    def _wants(self, key: Any) -> bool:
        name = key if type(key) is str and is_name(key.partition(".")[0]) else LEFT_OVER
        leads = (name,) if self._only is None else self._only
        return any(f"{lead}.".startswith(f"{name}.") or f"{name}.".startswith(f"{lead}.") for lead in leads)


def _is_stateful(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _taken(state_dict: Mapping[Any, Any]) -> dict[Any, Any]:
    """State dict with the state of each object in the object's place."""
    return {key: value.state_dict() if _is_stateful(value) else value for key, value in state_dict.items()}


def _joinable(value: Any) -> Any:
    """Optimizer of whose parameters each rank (a pipeline stage) may have some: they must have names of their own."""
    named = is_optimizer_object(value) and all(type(p) is str for group in value["groups"] for p in group["params"])
    return JoinedObject(value, joins="params") if named else value


def _described(named: Named, fqns: Iterable[str]) -> dict[str, GlobalTensor]:
    return {
        fqn: tensors.describe(tensors.as_torch(named.tensors[fqn], fqn), fqn, trusted=False) for fqn in sorted(fqns)
    }


def _refuse(targets: Mapping[str, GlobalTensor], saved: Saved) -> None:
    """Mismatch for tensors that this load would make wrong: of one rank's values, or of shared elements."""
    by_lead: dict[str, list[str]] = {}
    for fqn in targets:
        by_lead.setdefault(fqn.partition(".")[0], []).append(fqn)
    for lead, fqns in by_lead.items():
        tensors.refuse_own_values(lead, fqns, saved)
    if shared := [fqn for fqn, t in targets.items() if any(tensors.is_expanded(s.tensor) for s in t.shards)]:
        raise Mismatch(
            f"{', '.join(shared[:5])}: expanded, elements that share memory cannot be loaded one by one: clone() it"
        )


# -- states that only the checkpoint's optimizer has -------------------------------------------------------------


def _new_states(
    name: str, live: Mapping[str, Any], named: Named, saved: Saved, state: State
) -> Iterator[tuple[str, torch.Tensor]]:
    """Memory for saved states of this optimizer's parameters that it has not made yet.

    Each is laid out as its parameter, where a model of the state dict has it. Without one, and with sharded tensors
    about, how it would be sharded cannot be told: it stays a name that the state does not have.
    """
    parameters = parameters_of(live["groups"])
    known = state.tensors.keys() | set(references(saved.objects[name]))
    sharded = any(isinstance(tensor, (DTensor, ShardedTensor)) for tensor in named.tensors.values())
    for fqn, info in saved.tensors.items():
        if fqn.startswith(name + ".") and fqn not in known and (at := state_of(fqn, name, parameters)):
            like = _parameter(str(at[0]), info, named) if info.shape else None
            if like is not None:
                yield fqn, tensors.empty_like(like, info.shape, torch_dtype(info.dtype))
            elif not sharded or not info.shape:
                yield fqn, torch.empty(info.shape, dtype=torch_dtype(info.dtype))


def _parameter(fqn: str, info: TensorInfo, named: Named) -> torch.Tensor | None:
    """Tensor of a model that has this fqn and the state's shape."""
    for model in named.models:
        for name, tensor in model.items():
            if name.endswith(f".{fqn}") and tuple(tensor.shape) == info.shape and not isinstance(tensor, ShardedTensor):
                found: torch.Tensor = tensor.detach()
                return found
    return None
