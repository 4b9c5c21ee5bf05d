"""Optimizer state by fqn, for any torch optimizer over any parameters that slots know.

Each state of a parameter that is a tensor is `prefix.<fqn>.<state>`; a tensor subclass (torchao's 8-bit state) is the
tensors it flattens into. Everything else is one object: parameter groups as lists of fqns with their
hyper-parameters, and the states that are not tensors.

A state of a sharded parameter that is not laid out like the shard (Adafactor's factors, blocks of 8-bit states) cannot
be resharded: each rank keeps its own, with the place of its shard, and only the same place can take it back.

Invariant: `step()` is never called to make state exist. What a fresh optimizer lacks is made from the checkpoint's own
description, and handed over only when it is filled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from distckpt import comm
from distckpt.adapters import groups, subclasses, tensors
from distckpt.errors import Mismatch, Unsupported
from distckpt.format.box import Box
from distckpt.state import GlobalTensor, JoinedObject, RankObject, State, plain, torch_dtype
from distckpt.statedict import insert, references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.optim import Optimizer

    from distckpt.adapters.groups import Named
    from distckpt.adapters.slots import Slot
    from distckpt.state import Saved

_SCALARS = {"step", "eta", "mu", "mu_product"}
"""States of torch's optimizers that are 0-d whatever the parameter's shape."""

_KEEP_APART = "resume where they are apart: FSDP2, FullyShardedDataParallel(use_orig_params=True), DDP"


@dataclass(slots=True)
class _Loading:
    """What `targets` prepares and `restore` hands over.

    made: tensors that values refer to. states: new states by parameter. scalars: (fqn, its scalar state, that of the
    flat parameter it is a part of), which must turn out equal. bare: (fqn, slot) of parameters without saved state.
    """

    saved: Saved
    state: State
    made: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[torch.Tensor, dict[str, Any]] = field(default_factory=dict)
    scalars: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    bare: list[tuple[str, Slot]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def fresh(self, key: str, template: torch.Tensor) -> torch.Tensor:
        """Return memory for a tensor that a value refers to."""
        if key not in self.saved.tensors:
            raise Mismatch(f"{key}: the optimizer's object names it, the checkpoint has no such tensor")
        info = self.saved.tensors[key]
        self.made[key] = tensors.empty_like(template, info.shape, torch_dtype(info.dtype))
        return self.made[key]

    def refuse(self, key: str, was: str) -> None:
        """Enter the problem that a state cannot be resharded."""
        self.problems.append(
            f"{key}: is not laid out element by element like its parameter (it is {was}), so it cannot be resharded: "
            'resume with the layout it was saved with, or load the model alone (only=("model",))'
        )


class OptimizerAdapter:
    """One optimizer, over parameters among `slots` (called when asked for: fqns and slots, tied ones under each).

    parameters: what it holds in each of its groups, where its groups do not tell (ZeRO-3 fills them only in a step).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        slots: Callable[[], Iterable[tuple[str, Slot]]],
        prefix: str,
        *,
        parameters: Callable[[], list[list[torch.Tensor]]] | None = None,
    ) -> None:
        self._optimizer, self._known, self._prefix = optimizer, slots, prefix
        self._parameters = parameters or (lambda: [group["params"] for group in optimizer.param_groups])
        self._of_rank = f"{prefix}.@rank"
        """Object of the states that cannot be resharded, and lead (with the rank's number) of their tensors."""
        self._loading: _Loading | None = None

    def _slots(self) -> list[Named]:
        """(fqn, slot, index of the group) of every parameter, each once, in the order of the groups."""
        of_parameter: dict[int, dict[Any, tuple[str, Slot]]] = {}
        for fqn, slot in self._known():
            of_parameter.setdefault(id(slot.parameter), {}).setdefault(slot.key, (fqn, slot))
        found = []
        for g, parameters in enumerate(self._parameters()):
            for i, p in enumerate(parameters):
                if id(p) not in of_parameter:
                    raise Unsupported(
                        f"{self._prefix}: parameter {i} of group {g}, shape {tuple(p.shape)}, belongs to no "
                        "model of this state: pass its model too, and make the optimizer after wrapping the model"
                    )
                found += [(fqn, slot, g) for fqn, slot in of_parameter[id(p)].values()]
        return found

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups as they are saved: fqns in order, and hyper-parameters."""
        return groups.described(self._optimizer, self._slots(), self._prefix)

    # -- save --------------------------------------------------------------------------------------------------

    def capture(self) -> State:
        """See Stateful.capture."""
        captured, slots = State(), self._slots()
        values: dict[str, dict[str, Any]] = {}
        of_rank: dict[str, dict[str, Any]] = {}
        schemas = self._schemas(slots)
        for fqn, slot, g in slots:
            state, lead = self._optimizer.state.get(slot.parameter, {}), f"{self._prefix}.{fqn}."
            if not state and not slot.held:
                captured.tensors.update(_absent(slot, lead, schemas.get(g, {})))
            for name, value in state.items():
                found, rest = self._one_state(lead + name, value, slot)
                if found is None:
                    kept = of_rank.setdefault(fqn, {"place": _place(slot), "states": {}})
                    kept["states"][name] = self._keep(captured, f"{fqn}.{name}", value)
                    continue
                captured.tensors.update(found)
                if rest is not None:
                    values.setdefault(fqn, {})[name] = rest[0]
        described = groups.described(self._optimizer, slots, self._prefix)
        whole = {"optimizer": type(self._optimizer).__name__, "groups": described, "values": values}
        captured.objects[self._prefix] = JoinedObject(whole, joins="params")
        if of_rank:
            captured.objects[self._of_rank] = RankObject(of_rank, "derive")
        return captured

    def _schemas(self, slots: list[Named]) -> dict[int, dict[str, tuple[bool, torch.dtype | None]]]:
        """States of a parameter of each group: name -> (0-d, dtype where it is not the parameter's).

        A rank without an element of a parameter has no state for it, but says what those with elements say of it, so
        that all say the same.
        """
        found: dict[int, dict[str, tuple[bool, torch.dtype | None]]] = {}
        for _, slot, g in slots:
            if g not in found and (state := self._optimizer.state.get(slot.parameter)):
                found[g] = {
                    name: (value.dim() == 0, None if value.dtype == slot.parameter.dtype else value.dtype)
                    for name, value in state.items()
                    if isinstance(value, torch.Tensor) and not subclasses.is_flattened(value)
                }
        return found

    def _one_state(self, key: str, value: Any, slot: Slot) -> tuple[dict[str, GlobalTensor] | None, tuple[Any] | None]:
        """Return (tensors by fqn, the value that goes into the object, if any); no tensors: it is for `_keep`."""
        rest: tuple[Any] | None = None
        if subclasses.is_flattened(value):
            flat, described = subclasses.flatten(value, key)
            rest = (described,)
        elif isinstance(value, torch.Tensor):
            if value.dim() == 0:
                return {key: slot.scalar(value, key)}, None
            part = slot.part(value, key)
            if part is not None:
                return {key: part}, None
            flat = {key: value}
        else:
            tree, flat = tensors.extract(value, key)
            rest = (tree,)
        if flat and slot.sharded:
            return None, None
        return {f: tensors.describe(t, f, trusted=slot.trusted) for f, t in flat.items()}, rest

    def _keep(self, captured: State, key: str, value: Any) -> Any:
        """Enter a state that only this rank, with this shard, can take back; return it with TensorRefs."""
        lead = f"{self._of_rank}{comm.current().rank}.{key}"
        if subclasses.is_flattened(value):
            flat, rest = subclasses.flatten(value, lead)
        else:
            rest, flat = tensors.extract(value, lead)
        captured.tensors.update({fqn: plain(t.detach(), fqn, trusted=True) for fqn, t in flat.items()})
        return rest

    # -- load --------------------------------------------------------------------------------------------------

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets. What the live optimizer holds is filled in place; the rest is made, uninitialised."""
        self._loading = None
        if self._prefix not in saved.objects:
            return State(objects={self._prefix: True})
        content, slots = saved.objects[self._prefix], self._slots()
        groups.check_form(content, self._prefix)
        names = groups.names_of(content, slots, saved.rename, self._prefix)
        groups.matched(self._optimizer, content, slots, names, self._prefix)
        saved_name = {fqn: p for p, fqn in names.items()}
        keys = self._saved_keys(saved, content)
        loading = self._loading = _Loading(saved, State(objects={self._prefix: True}))
        for key in references(content["groups"]):
            if key in saved.tensors and prod(saved.tensors[key].shape) != 1:
                raise Mismatch(
                    f"{key}: a hyper-parameter of shape {list(saved.tensors[key].shape)}; a number is expected"
                )
            loading.state.tensors[key] = plain(loading.fresh(key, torch.empty(0)), key, trusted=True)
        for fqn, slot, g in slots:
            loading.states.setdefault(slot.parameter, {})
            was = saved_name.get(fqn, fqn)
            for name, value in content["values"].get(was, {}).items():
                _value_target(loading, f"{self._prefix}.{was}.", name, value, slot)
            for name, key in keys.get(was, {}).items():
                if key not in loading.state.tensors:
                    self._tensor_target(loading, key, name, slot, self._optimizer.param_groups[g])
        self._rank_targets(loading, {fqn: slot for fqn, slot, _ in slots})
        loading.bare = [
            (fqn, slot) for fqn, slot, _ in slots if not _has_state(saved_name.get(fqn, fqn), keys, content)
        ]
        if loading.problems:
            raise Mismatch("\n".join(loading.problems))
        tensors.refuse_own_values(self._prefix, loading.state.tensors, saved)
        return loading.state

    def _saved_keys(self, saved: Saved, content: Any) -> dict[Any, dict[str, str]]:
        """Saved state tensors, parameter -> state -> fqn."""
        known = {str(p): p for group in content["groups"] for p in group["params"]}
        known |= {saved.rename(p): p for p in known.values() if isinstance(p, str)}
        lead = self._prefix + "."
        found: dict[Any, dict[str, str]] = {}
        for key in saved.tensors:
            if key.startswith(lead):
                parameter = key.removeprefix(lead)
                while (cut := parameter.rpartition(".")[0]) and parameter not in known:
                    parameter = cut
                if parameter in known:
                    found.setdefault(known[parameter], {})[key.removeprefix(f"{lead}{parameter}.")] = key
        return found

    def _tensor_target(self, loading: _Loading, key: str, name: str, slot: Slot, group: dict[str, Any]) -> None:
        """Enter the memory that a saved state fills: the live tensor, or one made as the optimizer would.

        A state that was saved in the dtype of its parameter has that of the parameter here.
        """
        info, shape = loading.saved.tensors[key], slot.whole(key).shape
        scalar = name in _SCALARS or (info.shape == () and shape != ())
        of = loading.saved.tensors.get(f"model.{key.removeprefix(self._prefix + '.').removesuffix('.' + name)}")
        alike = of is not None and of.dtype == info.dtype and not scalar
        dtype = slot.parameter.dtype if alike else torch_dtype(info.dtype)
        if not slot.held:
            loading.state.tensors[key] = slot.absent(dtype, key, scalar=scalar)
            return
        new, live = loading.states[slot.parameter], self._optimizer.state.get(slot.parameter, {}).get(name)
        if scalar:
            memory = live if name not in new and isinstance(live, torch.Tensor) and live.dim() == 0 else None
            if memory is None:
                on_device = group.get("capturable") or group.get("fused")
                memory = torch.empty(info.shape, dtype=dtype, device=slot.parameter.device if on_device else "cpu")
            if name in new:
                loading.scalars.append((key, memory, new[name]))
            new.setdefault(name, memory)
            loading.state.tensors[key] = plain(memory, key, trusted=True)
            return
        for memory in (new.get(name), live, slot.empty(info.shape, dtype)):
            if isinstance(memory, torch.Tensor) and not subclasses.is_flattened(memory):
                part = slot.part(memory, key)
                if part is not None and part.shape == info.shape:
                    new[name], loading.state.tensors[key] = memory, part
                    return
        loading.refuse(key, f"a state of shape {list(info.shape)} of a parameter of shape {list(shape)}")

    def _rank_targets(self, loading: _Loading, slots: Mapping[str, Slot]) -> None:
        """Enter the states that cannot be resharded."""
        saved = loading.saved
        if self._of_rank not in saved.objects:
            return
        loading.state.objects[self._of_rank] = True
        for fqn, kept in saved.objects[self._of_rank].items():
            slot, place = slots.get(saved.rename(fqn)), kept["place"]
            for name, value in kept["states"].items():
                if saved.resharded or slot is None or place != _place(slot):
                    was = f"a state beside {place['regions']} of {place['shape']} on one of {saved.world_size} ranks"
                    loading.refuse(f"{self._prefix}.{fqn}.{name}", was)
                    continue
                for part in _inner(value, f"{self._of_rank}{saved.rank}.{fqn}.{name}"):
                    memory = loading.fresh(part, torch.empty(0, device=slot.parameter.device))
                    loading.state.tensors[part] = plain(memory, part, trusted=True)
                loading.states[slot.parameter][name] = value

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore. A parameter without saved state has none afterwards, as with load_state_dict."""
        loading, self._loading = self._loading, None
        if loading is None:
            return []
        if differing := [f"{key} is {a.item()}, not {b.item()}" for key, a, b in loading.scalars if a != b]:
            raise Mismatch(
                f"parameters that lie in one flat buffer cannot have different states of this kind ({differing[0]}); "
                f"{_KEEP_APART}"
            )
        content, slots = saved.objects[self._prefix], self._slots()
        names = groups.names_of(content, slots, saved.rename, self._prefix)
        matching = groups.matched(self._optimizer, content, slots, names, self._prefix)
        groups.take_over(self._optimizer, insert(matching, loading.made))
        saved_name = {fqn: p for p, fqn in names.items()}
        fqns = {id(slot.parameter): saved_name.get(fqn, fqn) for fqn, slot, _ in slots}
        for p, new in loading.states.items():
            if new:
                finished = {name: self._finished(loading, f"{fqns[id(p)]}.{name}", v, p) for name, v in new.items()}
                self._optimizer.state[p] = finished
            else:
                self._optimizer.state.pop(p, None)
        notes = list(_zeroed(loading, self._prefix))
        was, now = content["optimizer"], type(self._optimizer).__name__
        if was not in {now, ""}:
            notes.append(f"{self._prefix}: saved from {was}, loaded into {now}")
        return notes

    def _finished(self, loading: _Loading, key: str, value: Any, p: torch.Tensor) -> Any:
        if subclasses.is_description(value):
            own = f"{self._of_rank}{loading.saved.rank}.{key}"
            lead = own if f"{own}.{value['inner'][0]}" in loading.made else f"{self._prefix}.{key}"
            return subclasses.unflatten(value, lead, loading.made, self._optimizer, p)
        made = value if isinstance(value, torch.Tensor) else insert(value, loading.made)
        return _counted(made, self._optimizer) if key.endswith(".step") else made


def _counted(step: Any, optimizer: Optimizer) -> Any:
    """Give a step in the optimizer's own form: DeepSpeed's count in an int, torch's (but SparseAdam) in a tensor."""
    kind = type(optimizer)
    if type(step) is int and kind.__module__.startswith("torch.") and kind is not torch.optim.SparseAdam:
        return torch.tensor(float(step))
    return int(step) if isinstance(step, torch.Tensor) and kind.__module__.startswith("deepspeed.ops.") else step


def _has_state(fqn: Any, keys: Mapping[Any, Any], content: Any) -> bool:
    return bool(keys.get(fqn) or content["values"].get(fqn))


def _zeroed(loading: _Loading, prefix: str) -> Iterator[str]:
    """Zero the states of parameters that were saved without any, where others in the same flat buffer have some."""
    for fqn, slot in loading.bare:
        states = loading.states.get(slot.parameter, {})
        for value in states.values():
            part = slot.part(value, fqn) if isinstance(value, torch.Tensor) and value.dim() else None
            for shard in part.shards if part else ():
                shard.tensor.zero_()
        if states:
            yield f"{prefix}.{fqn}: saved without state; zeros, with the step of what lies in one flat buffer with it"


def _inner(value: Any, key: str) -> list[str]:
    """Names of the tensors that a state, saved under `key`, refers to."""
    return subclasses.names_in(value, key) if subclasses.is_description(value) else [*references(value)]


def _value_target(loading: _Loading, lead: str, name: str, value: Any, slot: Slot) -> None:
    """Enter a state that is no tensor, or one of several."""
    new, key = loading.states[slot.parameter], lead + name
    if (inner := _inner(value, key)) and slot.sharded:
        loading.refuse(key, "a state of a parameter that was not sharded")
        return
    if not slot.held:
        return
    if name in new and new[name] != value:
        loading.problems.append(
            f"{key}: parameters that lie in one flat buffer have different values of it ({new[name]!r}, {value!r}); "
            f"{_KEEP_APART}"
        )
    new[name] = value
    for part in inner:
        made = loading.fresh(part, torch.empty(0, device=slot.parameter.device))
        loading.state.tensors[part] = tensors.describe(made, part)


def _absent(slot: Slot, lead: str, schema: Mapping[str, tuple[bool, torch.dtype | None]]) -> dict[str, GlobalTensor]:
    return {
        lead + name: slot.absent(dtype or slot.parameter.dtype, lead + name, scalar=scalar)
        for name, (scalar, dtype) in schema.items()
    }


def _place(slot: Slot) -> dict[str, Any]:
    """What of a parameter this rank holds, as a value."""
    found = slot.whole("a parameter")
    regions = [shard.region for shard in found.shards]
    told = [[[*r.offsets], [*r.sizes]] if isinstance(r, Box) else [r.start, r.stop] for r in regions]
    return {"shape": list(found.shape), "regions": told}
