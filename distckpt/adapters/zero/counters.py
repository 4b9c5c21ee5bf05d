"""What an engine counts, and its loss scale: one object, `deepspeed`, which a state without an engine may leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.adapters import tensors
from distckpt.adapters.zero.engine import owner_of, version
from distckpt.errors import Mismatch
from distckpt.state import State, plain
from distckpt.statedict import insert

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from distckpt.state import Saved

NAME = "deepspeed"
_COUNTS = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class CountersAdapter:
    """Counters of engines (lead -> engine), their loss scalers, random-LTD scheduler and curriculum sampler."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self._engines = engines
        self._made: dict[str, torch.Tensor] = {}

    def capture(self) -> State:
        """See Stateful.capture."""
        said = {lead: _captured(engine) for lead, engine in self._engines.items()}
        return tensors.capture_tree(NAME, {"version": version(), "engines": said}, trusted=False) if said else State()

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets."""
        said = saved.objects.get(NAME)
        if said is not None and not (isinstance(said, dict) and isinstance(said.get("engines"), dict)):
            raise Mismatch(f"{NAME}: not what an engine counts: {said!r:.200}")
        self._made = tensors.tree_targets(NAME, saved)
        return State({fqn: plain(t, fqn, trusted=False) for fqn, t in self._made.items()}, objects={NAME: False})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        said = insert(saved.objects.get(NAME, {"engines": {}}), self._made)["engines"]
        self._made = {}
        notes = []
        for lead, engine in self._engines.items():
            if content := said.get(lead):
                notes += [f"{lead}: {note}" for note in _restored(engine, content)]
            else:
                notes.append(f"{lead}: no counters or loss scale of an engine were saved; they stay as they are")
        if said and not self._engines:
            notes.append("the counters and the loss scale of a DeepSpeed engine have no place here")
        return notes


def _captured(engine: Any) -> dict[str, Any]:
    said: dict[str, Any] = {name: getattr(engine, name) for name in _COUNTS}
    if (scaler := _scaler(engine)) is not None:
        said["loss_scale"] = {name: _number(getattr(scaler, name)) for name in _SCALE if hasattr(scaler, name)}
    return said | {name: value.state_dict() for name, value in _schedulers(engine)}


def _restored(engine: Any, said: Mapping[str, Any]) -> Iterator[str]:
    for name in _COUNTS:
        if name in said:
            setattr(engine, name, said[name])
    scaler, saved = _scaler(engine), said.get("loss_scale")
    if scaler is not None and saved is not None:
        for name in _SCALE:
            if name in saved and hasattr(scaler, name):
                setattr(scaler, name, saved[name])
    elif scaler is not None:
        yield "no loss scale was saved; it begins anew"
    elif saved is not None:
        yield "the saved loss scale is not used: this engine scales no losses"
    for name, value in _schedulers(engine):
        if name in said:
            value.load_state_dict(said[name])


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _scaler(engine: Any) -> Any:
    """What scales the losses of an engine, None where it keeps nothing that moves."""
    owner = owner_of(engine)
    scaler = getattr(owner, "loss_scaler", None) or getattr(owner, "loss_scale_config", None)
    return scaler if getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)) else None


def _schedulers(engine: Any) -> Iterator[tuple[str, Any]]:
    """(name, what has a state) of the engine's helpers: torch autocast's GradScaler, random-LTD, curriculum."""
    places = (owner_of(engine), "torch_autocast_gradscaler"), (engine, "torch_autocast_z0_gradscaler")
    if scaler := next((found for place in places if (found := getattr(*place, None))), None):
        yield "grad_scaler", scaler
    if engine.random_ltd_enabled() and engine.random_ltd_scheduler is not None:
        yield "random_ltd", engine.random_ltd_scheduler
    if engine.training_dataloader is not None and engine.curriculum_learning_enabled():
        yield "data_sampler", engine.training_dataloader.data_sampler
