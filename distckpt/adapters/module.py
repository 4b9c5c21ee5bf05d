"""Models: plain modules, DDP, and modules whose parameters are DTensors (FSDP2, TP, HSDP).

Fqns are those of the bare model: wrappers (DDP, torch.compile, activation checkpointing) leave no trace in them.
Tied parameters are stored once, under the first name; the others are aliases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt.adapters import tensors
from distckpt.adapters.dtensor import private
from distckpt.errors import Mismatch, Unsupported
from distckpt.state import State, plain
from distckpt.statedict import insert

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from distckpt.state import GlobalTensor, Saved

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def bare(module: nn.Module) -> nn.Module:
    """Module without the wrappers around it that change every name."""
    while isinstance(module, DistributedDataParallel) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, DistributedDataParallel) else module._orig_mod  # type: ignore[assignment]
    return module


def clean(name: str) -> str:
    """Fqn for a name that torch gives: wrappers within the model stripped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(fqn, parameter) of a model, tied ones under each of their names, in the order of the modules."""
    for name, parameter in bare(module).named_parameters(remove_duplicate=False):
        yield clean(name), parameter


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(fqn, buffer) of every persistent buffer."""
    for lead, owner in bare(module).named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            if name not in owner._non_persistent_buffers_set:
                yield clean(f"{lead}.{name}" if lead else name), buffer


def keeps_replicas_equal(module: nn.Module) -> bool:
    """Whether DDP keeps plain parameters equal on all ranks.

    Of others (local experts, a model that nobody wrapped) it is found out at each save: what differs, each rank keeps.
    """
    return any(isinstance(m, DistributedDataParallel) for m in module.modules())


class ModuleAdapter:
    """A model's parameters, persistent buffers and extra state, each name led by `prefix.`."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._module, self._prefix = module, prefix
        self._extra = f"{prefix}.extra_state"
        self._made: dict[str, torch.Tensor] = {}

    def capture(self) -> State:
        """See Stateful.capture. FSDP modules are resharded first, as they are between steps anyway."""
        captured = self._tensors()
        extra = {
            clean(name): owner.get_extra_state()
            for name, owner in bare(self._module).named_modules()
            if type(owner).get_extra_state is not nn.Module.get_extra_state
        }
        return State.merged([captured, tensors.capture_tree(self._extra, extra)] if extra else [captured])

    def _tensors(self) -> State:
        for owner in self._module.modules():
            if isinstance(owner, FSDPModule):
                owner.reshard()
        state, first = State(), dict[int, str]()

        def add(name: str, tensor: torch.Tensor, *, trusted: bool) -> None:
            fqn = f"{self._prefix}.{name}"
            if id(tensor) in first:
                state.aliases[fqn] = first[id(tensor)]
            else:
                first[id(tensor)] = fqn
                if fqn in state.tensors:
                    raise Unsupported(
                        f"{fqn}: two tensors of the model have this name once wrappers are stripped from it"
                    )
                state.tensors[fqn] = tensors.describe(tensor, fqn, trusted=trusted)

        equal = keeps_replicas_equal(self._module)
        for name, parameter in named_parameters(self._module):
            add(name, parameter, trusted=equal or isinstance(parameter, DTensor))
        for name, buffer in _named_buffers(self._module):
            add(name, buffer, trusted=False)
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
        live = self._tensors()
        named = [f"{self._prefix}.{name}" for name, _ in named_parameters(self._module)]
        tensors.refuse_own_values(self._prefix, named, saved)
        if shared := [fqn for fqn, t in live.tensors.items() if any(_is_expanded(s.tensor) for s in t.shards)]:
            raise Mismatch(
                f"{', '.join(shared[:5])}: expanded, elements that share memory cannot be loaded one by one: clone() "
                "such a tensor in the model, or register it with persistent=False"
            )
        return State.merged([live, State(made, objects=takes)])

    def _extra_owners(self) -> Iterator[tuple[str, nn.Module]]:
        for name, owner in bare(self._module).named_modules():
            if type(owner).set_extra_state is not nn.Module.set_extra_state:
                yield clean(name), owner

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        extra: dict[str, Any] = insert(saved.objects.get(self._extra, {}), self._made)
        for name, owner in self._extra_owners():
            if name in extra:
                owner.set_extra_state(extra[name])
        self._made = {}
        return []


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True))


class GradientAdapter:
    """Accumulated gradients, `prefix.<fqn of the parameter>`; a parameter without one has none in the checkpoint."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self._module, self._prefix = module, prefix
        self._made: list[tuple[nn.Parameter, torch.Tensor | None]] = []

    def capture(self) -> State:
        """See Stateful.capture. Unsupported where FSDP keeps gradients that it has not reduced yet."""
        for name in _unreduced(self._module):
            raise Unsupported(
                f"{self._prefix}.{name}: FSDP holds a gradient that it has not reduced over the ranks, which is of no "
                "rank's shard yet: save after a backward pass with set_requires_gradient_sync(True)"
            )
        return State(
            {
                f"{self._prefix}.{name}": tensors.describe(p.grad, f"{self._prefix}.{name}", trusted=False)
                for name, p in bare(self._module).named_parameters()
                if p.grad is not None
                for name in [clean(name)]
            }
        )

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets."""
        state = State()
        self._made = []
        tensors.refuse_own_values(self._prefix, [n for n in saved.tensors if n.startswith(self._prefix + ".")], saved)
        for name, p in bare(self._module).named_parameters():
            fqn = f"{self._prefix}.{clean(name)}"
            info = saved.tensors.get(fqn)
            grad = tensors.empty_like(p.detach(), tuple(p.shape), p.dtype) if info else None
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


def parallelism(module: nn.Module) -> str:
    """How a model is parallel, in words: recorded with a checkpoint and compared at a resume."""
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    sharded = next((p for p in module.parameters() if isinstance(p, DTensor)), None)
    if sharded is None:
        return "plain"
    mesh = sharded.device_mesh
    return f"DTensor on a mesh of {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)) or tuple(mesh.shape)}"
