"""Groups of a checkpoint's optimizer as ZeRO lays them out: what each has for all its parameters."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, Unsupported
from distckpt.format.box import Box
from distckpt.format.text import shown
from distckpt.loading.stream import Stretch, stream
from distckpt.statedict import is_optimizer_object, parameters_of, references, state_of

if TYPE_CHECKING:
    from distckpt.format.box import Shape
    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint


@dataclass(slots=True, eq=False)
class Group:
    """Parameters of a group, in its order.

    flat: states laid out like the parameters, with their dtypes. scalars: states of one element, equal for all, with
    the tensor that has it. values: states that are no tensors, equal for all.
    """

    hyper: dict[str, Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    flat: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, tuple[str, TensorInfo]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def ordered(self, names: list[str]) -> Group:
        """The same with its parameters in this order."""
        return replace(self, shapes={name: self.shapes[name] for name in names})


def groups_of(checkpoint: Checkpoint, notes: list[str]) -> list[Group]:
    """Groups, [] where there is no optimizer. Unsupported or Mismatch, with the fqns, for what ZeRO has no place for.

    A parameter without state beside others that have one was never trained: it counts as frozen, and is noted.
    """
    content = checkpoint.manifest
    optimizers = [n for n in content.objects if is_optimizer_object(checkpoint.object(n))]
    if not optimizers:
        return []
    if optimizers != ["optim"]:
        raise Unsupported(f"{checkpoint.name}: has the optimizers {optimizers}; a tag has one: only= keeps one")
    value = checkpoint.object("optim")
    parameters = parameters_of(value["groups"])
    if unnamed := [p for p in parameters.values() if not isinstance(p, str)]:
        raise Unsupported(
            f"{checkpoint.name}: its optimizer names parameters by position ({shown(unnamed)}), in groups of "
            f"{[len(group['params']) for group in value['groups']]}: say their order with order= (--param-order)"
        )
    tensors: dict[str, dict[str, str]] = {}
    for fqn in content.tensors:
        if fqn.startswith("optim.") and (at := state_of(fqn, "optim", parameters)):
            tensors.setdefault(at[0], {})[at[1]] = fqn
    if deep := [p for p, of in value["values"].items() if [*references(of)]]:
        raise Unsupported(f"{checkpoint.name}: states of {shown(deep)} are no tensors laid out like the parameters")
    found = []
    for group in value["groups"]:
        made = Group({k: v for k, v in group.items() if k not in {"params", "param_names"}})
        has_state = {p for p in group["params"] if p in tensors or value["values"].get(p)}
        still = [p for p in group["params"] if has_state and p not in has_state]
        if still:
            notes.append(f"{', '.join(still[:8])}: without a state, which others of the group have: taken for frozen")
        for name in (p for p in group["params"] if p not in still):
            _enter(made, checkpoint, name, tensors.get(name, {}), value["values"].get(name, {}))
        if made.shapes:
            found.append(made)
    _check_equal(checkpoint, found, tensors)
    return found


def _enter(made: Group, checkpoint: Checkpoint, name: str, states: dict[str, str], values: dict[str, Any]) -> None:
    content = checkpoint.manifest
    info = content.tensors.get(content.aliases.get(f"model.{name}", f"model.{name}"))
    if info is None:
        raise Mismatch(f"{checkpoint.name}: the optimizer has {name}, the model has not")
    first = not made.shapes
    made.shapes[name] = info.shape
    flat = {s: content.tensors[f].dtype for s, f in states.items() if content.tensors[f].shape == info.shape}
    scalars = {s: (f, content.tensors[f]) for s, f in states.items() if s == "step" or s not in flat}
    flat = {s: dtype for s, dtype in flat.items() if s not in scalars}
    if odd := [f for f, i in scalars.values() if i.shape not in {(), (1,)}]:
        raise Unsupported(f"{odd[0]}: is not laid out like its parameter, of shape {info.shape}: ZeRO cannot cut it")
    if first:
        made.flat, made.scalars, made.values = flat, scalars, dict(values)
    if (made.flat.keys(), made.scalars.keys()) != (flat.keys(), scalars.keys()):
        one = next(iter(made.shapes))
        raise Mismatch(f"optim: {one} has the states {sorted({*made.flat, *made.scalars})}, {name} {sorted(states)}")
    if made.values != values:
        raise Mismatch(f"optim: {name} has {values}, others of its group {made.values}: a flat group of ZeRO has one")


def _check_equal(checkpoint: Checkpoint, groups: list[Group], tensors: dict[str, dict[str, str]]) -> None:
    """Mismatch where parameters of a group are at different steps: a flat buffer has one."""
    for group in groups:
        for state, (_, info) in group.scalars.items():
            names = [tensors[name][state] for name in group.shapes]
            wanted = [Stretch.whole(fqn, Box.whole(info.shape), info.dtype) for fqn in names]
            values = [bytes(data) for _, data in stream(checkpoint, wanted, 1 << 20)]
            if odd := [(f, v) for f, v in zip(names, values, strict=True) if v != values[0]]:
                raise Mismatch(
                    f"{odd[0][0]} is {_number(odd[0][1], info)}, {names[0]} {_number(values[0], info)}: parameters of "
                    f"one group share a flat buffer in ZeRO, which has one {state} ({len(odd)} of {len(names)} differ)"
                )


def _number(data: bytes, info: TensorInfo) -> Any:
    form = {"float32": "f", "float64": "d", "int64": "q", "int32": "i"}.get(info.dtype)
    return struct.unpack(f"<{form}", data)[0] if form else data.hex()
