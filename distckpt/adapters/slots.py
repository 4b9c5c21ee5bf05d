"""Where the parameters of a model lie: one slot for each name, whatever wraps the model.

A slot is what model, gradients and optimizer state share: it knows the tensor that the optimizer holds its state by,
and which part of the global tensor any tensor laid out like that one is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distckpt.adapters import dtensor, fsdp1, tensors
from distckpt.adapters.zero import engine as engines
from distckpt.adapters.zero import experts, flats
from distckpt.adapters.zero import refresh as zero

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from torch import nn

    from distckpt.state import GlobalTensor

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


class Slot(Protocol):
    """A named parameter, as this rank has it."""

    @property
    def parameter(self) -> torch.Tensor:
        """What the optimizer has in its groups: the parameter itself, or the flat parameter that it is a part of."""
        ...

    @property
    def key(self) -> Hashable:
        """Equal for names of the same (tied) parameter."""
        ...

    @property
    def sharded(self) -> bool:
        """Whether ranks hold different parts of it."""
        ...

    @property
    def trusted(self) -> bool:
        """Whether its replicas are equal by construction."""
        ...

    @property
    def held(self) -> bool:
        """Whether the optimizer of this rank has state for it, once it has state at all."""
        ...

    def whole(self, name: str) -> GlobalTensor:
        """Describe the parameter's own memory."""
        ...

    def part(self, tensor: torch.Tensor, name: str) -> GlobalTensor | None:
        """Describe a tensor laid out element by element like `parameter`; None if it is not."""
        ...

    def scalar(self, tensor: torch.Tensor, name: str) -> GlobalTensor:
        """Describe a 0-d tensor that belongs to the parameter."""
        ...

    def absent(self, dtype: torch.dtype, name: str, *, scalar: bool) -> GlobalTensor:
        """Describe a state of which this rank holds nothing."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """Return memory, laid out like `parameter`, for a state of this global shape; None if it cannot be."""
        ...


class OwnSlot:
    """A parameter that is a tensor of its own: plain, or a DTensor. `trusted`: replicas are equal by construction."""

    held = True

    def __init__(self, parameter: torch.Tensor, *, trusted: bool) -> None:
        self.parameter = parameter
        self.key: Hashable = id(parameter)
        self.sharded = isinstance(parameter, DTensor)
        self.trusted = trusted or self.sharded

    def whole(self, name: str) -> GlobalTensor:
        """See Slot.whole."""
        return tensors.describe(self.parameter, name, trusted=self.trusted)

    def part(self, tensor: torch.Tensor, name: str) -> GlobalTensor | None:
        """See Slot.part. Next to a plain parameter a tensor of any shape is the same on every rank that has it."""
        if self.sharded and not (isinstance(tensor, DTensor) and type(dtensor.local_of(tensor)) is torch.Tensor):
            return None
        return tensors.describe(tensor, name, trusted=self.trusted)

    def scalar(self, tensor: torch.Tensor, name: str) -> GlobalTensor:
        """See Slot.scalar."""
        return tensors.describe(tensor, name, trusted=self.trusted)

    def absent(self, dtype: torch.dtype, name: str, *, scalar: bool) -> GlobalTensor:  # noqa: ARG002
        """See Slot.absent. A rank that has the parameter has its state: nobody asks."""
        raise AssertionError(name)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """See Slot.empty."""
        return tensors.empty_like(self.parameter.detach(), shape, dtype)


def bare(module: nn.Module) -> nn.Module:
    """Module without the wrappers around it that change every name."""
    while True:
        if engines.is_engine(module):
            module = engines.model_of(module)
        elif isinstance(module, DistributedDataParallel):
            module = module.module
        elif hasattr(module, "_orig_mod"):
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def clean(name: str) -> str:
    """Fqn for a name that torch gives: wrappers within the model stripped."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def naming(module: nn.Module) -> Callable[[str], str]:
    """What gives the fqn, equal on every rank, for a name that torch gives in the bare module."""
    of_experts = experts.naming(bare(module))
    return lambda name: clean(of_experts(name))


def keeps_replicas_equal(module: nn.Module) -> bool:
    """Whether DDP or DeepSpeed keeps plain parameters equal on all ranks.

    Of others (local experts, a model that nobody wrapped) it is found out at each save: what differs, each rank keeps.
    """
    return any(isinstance(m, DistributedDataParallel) or engines.is_engine(m) for m in module.modules())


def named_slots(module: nn.Module) -> Iterator[tuple[str, Slot]]:
    """(fqn, slot) of every parameter of a model, tied ones under each of their names."""
    trusted, named = keeps_replicas_equal(module), naming(module)
    if engines.is_engine(module):
        yield from _slots_of_engine(module)
        return
    flat: set[int] = set()
    for name, slot, parameters in fsdp1.slots(bare(module)):
        flat.update(map(id, parameters))
        yield named(name), slot
    for name, parameter in bare(module).named_parameters(remove_duplicate=False):
        if id(parameter) not in flat:
            yield named(name), OwnSlot(parameter, trusted=trusted)


def _slots_of_engine(engine: nn.Module) -> Iterator[tuple[str, Slot]]:
    """(fqn, slot) of every parameter of a DeepSpeed engine, in the order of its groups.

    Unsupported for a setup that cannot be saved.
    """
    engines.check(engine)
    found, places = flats.found_in(engine), flats.in_group_order(engine)
    parameters, named = bare(engine).named_parameters(remove_duplicate=False), naming(engine)
    for name, parameter in sorted(parameters, key=lambda item: places.get(id(item[1]), len(places))):
        master = found.get(id(parameter), parameter)
        yield named(name), OwnSlot(master, trusted=True) if isinstance(master, torch.Tensor) else master


def slots_of(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, Slot]]:
    """(fqn, slot) of every parameter of several models, each name led by its model's."""
    for lead, model in models.items():
        for name, slot in named_slots(model):
            yield f"{lead}.{name}" if lead else name, slot


def named_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(fqn, buffer) of every persistent buffer."""
    named = naming(module)
    for lead, owner in bare(module).named_modules(remove_duplicate=False):
        for name, buffer in owner.named_buffers(recurse=False, remove_duplicate=False):
            if name not in owner._non_persistent_buffers_set:
                yield named(f"{lead}.{name}" if lead else name), buffer


def named_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(fqn, module) of every module but wrappers, each once."""
    named = naming(module)
    for name, owner in bare(module).named_modules():
        yield named(name + ".").removesuffix("."), owner


def gather_nothing(module: nn.Module) -> None:
    """Have FSDP modules hold only their shards, as they do between steps: what a load fills is what they use next."""
    if engines.is_engine(module):
        zero.gather_nothing(module)
    for owner in module.modules():
        dtensor.reshard(owner)
        fsdp1.reshard(owner)


def use_what_is_loaded(module: nn.Module) -> None:
    """Bring what a load has filled to wherever a model computes with it. Collective for a DeepSpeed engine."""
    if engines.is_engine(module):
        zero.refresh(module)


def parallelism(module: nn.Module) -> str:
    """How a model is parallel, in words: recorded with a checkpoint and compared at a resume."""
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    if engines.is_engine(module):
        return engines.describe(module)
    if said := fsdp1.parallelism(bare(module)):
        return said
    sharded = next((p for p in module.parameters() if isinstance(p, DTensor)), None)
    if sharded is None:
        return "plain"
    mesh = sharded.device_mesh
    return f"DTensor on a mesh of {dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False)) or tuple(mesh.shape)}"
