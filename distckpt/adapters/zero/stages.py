"""Stages of a pipeline: weights that several of them use.

A tied weight has a copy on each stage that uses it, at a place of its own in the flat buffers of that stage. DeepSpeed
keeps the copies equal: the first of these stages saves the weight, and all fill theirs from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distckpt.adapters.zero.engine import model_of, private
from distckpt.errors import Unsupported
from distckpt.format.partition import Grid
from distckpt.state import GlobalTensor, Layout

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    import torch

    from distckpt.adapters.flat import FlatSlot


@dataclass(frozen=True, slots=True)
class TiedSlot:
    """Copy of a tied weight on a stage that does not save it. See slots.Slot. saved_by: a rank that does."""

    copy: FlatSlot
    saved_by: int

    @property
    def parameter(self) -> torch.Tensor:
        """See Slot.parameter."""
        return self.copy.parameter

    @property
    def key(self) -> Hashable:
        """See Slot.key."""
        return self.copy.key

    sharded = trusted = held = True

    def whole(self, name: str) -> GlobalTensor:
        """See Slot.whole."""
        return self._elsewhere(self.copy.whole(name))

    def part(self, tensor: torch.Tensor, name: str) -> GlobalTensor | None:
        """See Slot.part."""
        found = self.copy.part(tensor, name)
        return self._elsewhere(found) if found else None

    def scalar(self, tensor: torch.Tensor, name: str) -> GlobalTensor:
        """See Slot.scalar."""
        return self._elsewhere(self.copy.scalar(tensor, name))

    def absent(self, dtype: torch.dtype, name: str, *, scalar: bool) -> GlobalTensor:
        """See Slot.absent."""
        return self._elsewhere(self.copy.absent(dtype, name, scalar=scalar))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
        """See Slot.empty."""
        return self.copy.empty(shape, dtype)

    def _elsewhere(self, found: GlobalTensor) -> GlobalTensor:
        """Say that no rank of this stage saves it. How the first stage shares it out, that stage tells."""
        return replace(found, layout=Layout(Grid(found.shape, ((),) * len(found.shape), self.saved_by)))


def copies(engine: Any) -> Iterator[tuple[torch.Tensor, int]]:
    """(weight, a rank of the stage that saves it) of each tied weight that another stage than this one saves.

    Unsupported for what DeepSpeed lets become different on the stages that have it.
    """
    if not engine.pipeline_parallelism or model_of(engine).num_stages == 1:
        return
    module: Any = model_of(engine)
    if any(True for _ in getattr(module.loss_fn, "parameters", tuple)()):
        raise Unsupported("a pipeline whose loss has parameters: each stage has its own; make the loss the last layer")
    grid, topology = private(module, "_grid"), module.topology()
    for key, tied in private(module, "tied_comms").items():
        if len(tied["ranks"]) == 1:
            continue
        weights = {name: private(module, "_recursive_getattr")(tied["module"], name) for name in tied["weight_attr"]}
        for name, parameter in tied["module"].named_parameters():
            if not any(parameter is weight for weight in weights.values()):
                raise Unsupported(
                    f"tied_modules.{key}.{name}: each pipeline stage has its own, under one name: name it in the "
                    "tied_weight_attr of the TiedLayerSpec, or make it a layer of its own"
                )
        first = topology.get_coord(min(tied["ranks"])).pipe
        if grid.get_stage_id() != first:
            saved_by = grid.stage_to_global(stage_id=first, data=0)
            yield from ((weight, saved_by) for weight in weights.values())
