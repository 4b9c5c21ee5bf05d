"""Hugging Face Accelerate: what `accelerator.save_state` would save, as a TrainState for a Checkpointer."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, StateWarning
from distckpt.run.trainstate import TrainState

try:
    from accelerate.data_loader import SeedableRandomSampler, get_sampler
    from accelerate.utils import DistributedType
except ImportError as e:
    raise ImportError(f"this needs accelerate: pip install 'distckpt[accelerate]' ({e})") from e

from torch.utils.data import RandomSampler

if TYPE_CHECKING:
    from accelerate import Accelerator


def train_state(accelerator: Accelerator, **more: Any) -> TrainState:
    """All that `accelerator.prepare` and `register_for_checkpointing` were given, as one TrainState.

    Models, optimizers, schedulers, scaler, generators, registered objects, and the positions of data loaders. Call it
    when everything is prepared, and save when an optimizer step is done (`accelerator.sync_gradients`): gradients that
    are being accumulated are not kept. more: what else TrainState takes (progress, config, ...).

    Accelerate knows where a loader is with `DataLoaderConfiguration(use_stateful_dataloader=True)`, and in which order
    it shuffles with `use_seedable_sampler=True`; what a loader does not tell is warned of (StateWarning). Make loaders
    with `generator=torch.Generator()`: each time one without is iterated it draws from the generator of dropout, once
    more after a resume than in a run that went through. A loader's position is that of one rank: at another world size
    a load refuses it, with what would repeat.
    """
    by_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    optimizers = [] if by_deepspeed else [getattr(o, "optimizer", o) for o in accelerator._optimizers]
    schedulers = [s for s in accelerator._schedulers if type(s).__name__ != "DeepSpeedSchedulerWrapper"]
    loaders = [loader for loader in accelerator._dataloaders if _tells(loader)]
    return TrainState(
        model=_named(accelerator._models),
        optimizer=_named(optimizers),
        lr_scheduler=_named(schedulers),
        scaler=None if by_deepspeed else accelerator.scaler,
        dataloader=_Loaders(loaders) if loaders else None,
        registered={str(i): found for i, found in enumerate(accelerator._custom_objects)},
        **more,
    )


def _named(values: list[Any]) -> Any:
    """One value as it is, several by their position."""
    return (values or [None])[0] if len(values) < 2 else {str(i): value for i, value in enumerate(values)}


def _tells(loader: Any) -> bool:
    """Whether a loader's position can be kept."""
    if not getattr(loader, "use_stateful_dataloader", False):
        why = "its position is not kept: DataLoaderConfiguration(use_stateful_dataloader=True) has it kept"
    elif isinstance(sampler := get_sampler(loader), RandomSampler) and not isinstance(sampler, SeedableRandomSampler):
        why = (
            "a resume within an epoch draws its order anew: DataLoaderConfiguration(use_seedable_sampler=True) does not"
        )
    else:
        return True
    warnings.warn(f"a data loader of {len(loader.dataset)} samples: {why}", StateWarning, stacklevel=3)
    return bool(getattr(loader, "use_stateful_dataloader", False))


class _Loaders:
    """Positions of loaders: each in its epoch, which epoch that is, and what it shuffles by."""

    def __init__(self, loaders: list[Any]) -> None:
        self._loaders = loaders

    def state_dict(self) -> dict[str, Any]:
        return {"loaders": [_position(loader) for loader in self._loaders]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found = state_dict["loaders"]
        if len(found) != len(self._loaders):
            raise Mismatch(f"dataloader: {len(found)} were prepared when this was saved, {len(self._loaders)} are here")
        for loader, position in zip(self._loaders, found, strict=True):
            loader.load_state_dict(position["state"])
            loader.iteration = position["iteration"]
            if isinstance(sampler := get_sampler(loader), SeedableRandomSampler):
                sampler.initial_seed = position["seed"]


def _position(loader: Any) -> dict[str, Any]:
    sampler = get_sampler(loader)
    return {
        "state": loader.state_dict(),
        "iteration": loader.iteration + loader.end_of_dataloader,  # what comes after the last batch is another epoch
        "seed": sampler.initial_seed if isinstance(sampler, SeedableRandomSampler) else None,
    }
