"""Models: their parameters (as slots), persistent buffers and extra state; and accumulated gradients.

Fqns are those of the bare model: wrappers (DDP, torch.compile, activation checkpointing) leave no trace in them.
Tied parameters are stored once, under the first name; the others are aliases.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from distckpt.adapters import dtensor, tensors
from distckpt.adapters.dtensor import private
from distckpt.adapters.flat import FlatSlot
from distckpt.adapters.slots import (
    clean,
    gather_nothing,
    named_buffers,
    named_modules,
    named_slots,
    use_what_is_loaded,
)
from distckpt.adapters.zero.engine import is_engine
from distckpt.errors import Mismatch, Unsupported
from distckpt.state import State, plain
from distckpt.statedict import insert

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    import torch

    from distckpt.adapters.slots import Slot
    from distckpt.state import GlobalTensor, Saved


class ModuleAdapter:
    """A model's parameters, persistent buffers and extra state, each name led by `prefix.`."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module, self._prefix = module, prefix
        self._extra = f"{prefix}.extra_state"
        self._made: dict[str, torch.Tensor] = {}

    def capture(self) -> State:
        """See Stateful.capture. FSDP modules are resharded first, as they are between steps anyway."""
        captured = self._tensors()
        extra = {
            name: owner.get_extra_state()
            for name, owner in named_modules(self.module)
            if type(owner).get_extra_state is not nn.Module.get_extra_state
        }
        return State.merged([captured, tensors.capture_tree(self._extra, extra)] if extra else [captured])

    def _tensors(self) -> State:
        for owner in self.module.modules():
            dtensor.reshard(owner)
        state, first = State(), dict[Any, str]()

        def add(name: str, key: Hashable, describe: Callable[[str], GlobalTensor]) -> None:
            fqn = f"{self._prefix}.{name}"
            if key in first:
                state.aliases[fqn] = first[key]
            else:
                first[key] = fqn
                if fqn in state.tensors:
                    raise Unsupported(
                        f"{fqn}: two tensors of the model have this name once wrappers are stripped from it"
                    )
                state.tensors[fqn] = describe(fqn)

        for name, slot in named_slots(self.module):
            add(name, slot.key, slot.whole if slot.parameter.requires_grad else partial(_frozen, slot))
        for name, buffer in named_buffers(self.module):
            add(name, id(buffer), partial(tensors.describe, buffer, trusted=False))
        return state

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets."""
        owners = {name for name, _ in self._extra_owners()}
        if (names := set(saved.objects.get(self._extra, {}))) - owners:
            raise Mismatch(
                f"the checkpoint has extra state of modules that the model has not: {sorted(names - owners)}"
            )
        self._made = tensors.tree_targets(self._extra, saved)
        made: dict[str, GlobalTensor] = {fqn: plain(t, fqn, trusted=False) for fqn, t in self._made.items()}
        takes = {self._extra: True} if owners else {}
        gather_nothing(self.module)
        live = self._tensors()
        named = (f"{self._prefix}.{name}" for name, _ in named_slots(self.module))
        tensors.refuse_own_values(self._prefix, named, saved)
        if shared := [fqn for fqn, t in live.tensors.items() if any(tensors.is_expanded(s.tensor) for s in t.shards)]:
            raise Mismatch(
                f"{', '.join(shared[:5])}: expanded, elements that share memory cannot be loaded one by one: clone() "
                "such a tensor in the model, or register it with persistent=False"
            )
        return State.merged([live, State(made, objects=takes)])

    def _extra_owners(self) -> Iterator[tuple[str, nn.Module]]:
        for name, owner in named_modules(self.module):
            if type(owner).set_extra_state is not nn.Module.set_extra_state:
                yield name, owner

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        use_what_is_loaded(self.module)
        extra: dict[str, Any] = insert(saved.objects.get(self._extra, {}), self._made)
        for name, owner in self._extra_owners():
            if name in extra:
                owner.set_extra_state(extra[name])
        self._made = {}
        return []


def _frozen(slot: Slot, fqn: str) -> GlobalTensor:
    return replace(slot.whole(fqn), frozen=True)


class GradientAdapter:
    """Accumulated gradients, `prefix.<fqn of the parameter>`; a parameter without one has none in the checkpoint."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._module, self._prefix = module, prefix
        self._made: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def capture(self) -> State:
        """See Stateful.capture. Unsupported where FSDP keeps gradients that it has not reduced yet."""
        if is_engine(self._module):
            raise Unsupported(
                f"{self._prefix}: a DeepSpeed engine keeps gradients in buffers of its own, which cannot be saved: "
                "save after its step(), without gradients=True"
            )
        for name in _unreduced(self._module):
            raise Unsupported(
                f"{self._prefix}.{name}: FSDP holds a gradient that it has not reduced over the ranks, which is of no "
                "rank's shard yet: save after a backward pass with set_requires_gradient_sync(True)"
            )
        return State(
            {
                f"{self._prefix}.{name}": tensors.describe(slot.parameter.grad, f"{self._prefix}.{name}", trusted=False)
                for name, slot in self._slots()
                if slot.parameter.grad is not None
            }
        )

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        """Slots, each once. Unsupported where FSDP1 keeps gradients: it makes them views of its own in each step."""
        seen = set()
        for name, slot in named_slots(self._module):
            if slot.key not in seen:
                seen.add(slot.key)
                if slot.parameter.grad is not None and isinstance(slot, FlatSlot):
                    raise Unsupported(
                        f"{self._prefix}.{name}: accumulated gradients of FSDP1 cannot be saved: save right after "
                        "zero_grad(), or use FSDP2 (fully_shard)"
                    )
                yield name, slot

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets."""
        state = State()
        self._made = []
        tensors.refuse_own_values(self._prefix, [n for n in saved.tensors if n.startswith(self._prefix + ".")], saved)
        for name, slot in self._slots():
            fqn, p = f"{self._prefix}.{name}", slot.parameter
            if isinstance(slot, FlatSlot) and fqn in saved.tensors:
                raise Mismatch(f"{fqn}: FSDP1 cannot take over accumulated gradients; save right after zero_grad()")
            grad = tensors.empty_like(p.detach(), tuple(p.shape), p.dtype) if fqn in saved.tensors else None
            if grad is not None:
                state.tensors[fqn] = tensors.describe(grad, fqn, trusted=False)
            self._made.append((p, grad))
        return state

    def restore(self, saved: Saved) -> list[str]:  # noqa: ARG002
        """See Stateful.restore."""
        for p, grad in self._made:
            p.grad = grad
        self._made = []
        return []


def _unreduced(module: nn.Module) -> Iterator[str]:
    """Fqns of parameters of FSDP2 whose gradient was accumulated without reducing it."""
    for owner in module.modules():
        if isinstance(owner, FSDPModule):
            for group in private(private(owner, "_get_fsdp_state")(), "_fsdp_param_groups"):
                for p in private(group, "fsdp_params"):
                    whole = getattr(p, "_unsharded_param", None)  # set by the first all-gather
                    if private(p, "unsharded_accumulated_grad") is not None or getattr(whole, "grad", None) is not None:
                        yield clean(private(p, "_param_fqn") or "a parameter")
