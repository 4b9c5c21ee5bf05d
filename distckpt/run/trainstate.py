"""TrainState: everything that a training job must not lose, under one roof.

It is a list of parts, each a Stateful; capture, targets and restore go through them in order (the random number
generators last, so that nothing a restore draws moves them).
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from distckpt import __version__, comm
from distckpt.adapters import peft, tensors
from distckpt.adapters.module import GradientAdapter, ModuleAdapter
from distckpt.adapters.optimizer import OptimizerAdapter
from distckpt.adapters.slots import parallelism, slots_of
from distckpt.adapters.zero.counters import CountersAdapter
from distckpt.adapters.zero.engine import is_engine, optimizer_of, owner_of
from distckpt.adapters.zero.flats import masters
from distckpt.errors import Mismatch, StateUnusable, StateWarning, Unsupported
from distckpt.format.layout import is_name
from distckpt.run.dataloader import DataLoaderAdapter
from distckpt.run.rng import RngAdapter
from distckpt.state import JoinedObject, Saved, State, plain
from distckpt.statedict import insert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.optim import Optimizer

    from distckpt.adapters.slots import Slot
    from distckpt.state import Stateful


class HasStateDict(Protocol):
    """Whatever can be asked for its state and given it back."""

    def state_dict(self) -> Any:
        """State, of values that the format has."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over a state."""
        ...


@dataclass
class Progress:
    """Where training is: optimizer steps done, epoch, samples consumed since the run began."""

    global_step: int = 0
    epoch: int = 0
    samples_seen: int = 0

    def advance(self, samples: int) -> None:
        """Count one optimizer step over `samples` samples (all ranks together)."""
        self.global_step += 1
        self.samples_seen += samples

    def state_dict(self) -> dict[str, int]:
        """Return the counters."""
        return asdict(self)

    def check_state_dict(self, state_dict: Any) -> None:
        """Mismatch unless it has every counter."""
        if not isinstance(state_dict, dict) or any(type(state_dict.get(name)) is not int for name in asdict(self)):
            raise Mismatch(f"progress: expected the counts {', '.join(asdict(self))}; found {state_dict!r:.200}")

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take over the counters."""
        for name in asdict(self):
            setattr(self, name, state_dict[name])


class TrainState:
    """The state of a training job.

    model, optimizer: one, or a dict of several (EMA, GAN, RL). A DeepSpeed engine given as a model brings its
    optimizer, lr_scheduler, counters and loss scale with it. lr_scheduler, scaler, sampler, progress and every `extra`
    value: anything with state_dict() and load_state_dict(), or a dict of such; one that also has
    check_state_dict(state) can refuse a state (with Mismatch) before anything has changed. dataloader: a torchdata
    StatefulDataLoader, kept per rank. rng: whether the generators of Python, NumPy, torch and CUDA are kept, per rank.
    gradients: whether accumulated gradients are. config, code_version, tokenizer (a name, or an object with
    get_vocab()): recorded, and compared with a StateWarning on resume.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Mapping[str, nn.Module] | None = None,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        lr_scheduler: Any = None,
        scaler: HasStateDict | None = None,
        sampler: HasStateDict | None = None,
        dataloader: HasStateDict | None = None,
        progress: HasStateDict | None = None,
        rng: bool = True,
        gradients: bool = False,
        config: Mapping[str, Any] | None = None,
        code_version: str | None = None,
        tokenizer: Any = None,
        **extra: Any,
    ) -> None:
        models, optimizers = _named(model, "model"), _named(optimizer, "optim")
        _check_kinds(models, optimizers)
        of_models = {lead.removeprefix("model").removeprefix("."): m for lead, m in models.items()}
        values = {"trainer_state": progress, "lr_scheduler": lr_scheduler, "scaler": scaler, "sampler_state": sampler}
        _check_names(extra, taken=(*values, *_PARTS))
        values |= extra
        parts: dict[str, Stateful] = {lead: ModuleAdapter(m, lead) for lead, m in models.items()}
        engines = {lead: m for lead, m in models.items() if is_engine(m)}
        known = partial(slots_of, of_models)
        parts |= {lead: OptimizerAdapter(o, known, lead) for lead, o in optimizers.items()}
        if gradients:
            of_gradients = {"grad" + lead.removeprefix("model"): m for lead, m in models.items()}
            parts |= {lead: GradientAdapter(m, lead) for lead, m in of_gradients.items()}
        for name, value in values.items():
            parts |= {lead: ValueAdapter(v, lead) for lead, v in _named(value, name).items()}
        for lead, engine in engines.items():
            parts |= _brought_by(engine, lead.removeprefix("model"), known, optimizers, parts)
        parts["deepspeed"] = CountersAdapter(engines)
        if dataloader is not None:
            parts["dataloader"] = DataLoaderAdapter(dataloader)
        for lead, wrapped in models.items():
            if holder := peft.holder_of(wrapped):
                name = peft.NAME + lead.removeprefix("model")
                parts[name] = peft.PeftAdapter(wrapped, holder, name)
        parts["environment"] = EnvironmentAdapter(models, config, code_version, tokenizer)
        parts["rng"] = RngAdapter(enabled=rng)
        self._parts = parts
        self._progress = progress
        self._count_epochs: list[Any] = [
            value for value in (progress, sampler) if isinstance(getattr(value, "epoch", None), int)
        ]
        self.unusable: str | None = None
        """Why the state must not be saved or trained on, where a load failed half-way."""

    @property
    def epoch(self) -> int | None:
        """Epoch that `progress` or `sampler` is in, whichever is further; None where neither counts them."""
        return max((int(value.epoch) for value in self._count_epochs), default=None)

    @property
    def samples(self) -> int | None:
        """Samples that `progress` counts; None where it counts none."""
        seen = getattr(self._progress, "samples_seen", None)
        return seen if isinstance(seen, int) else None

    @property
    def models(self) -> list[nn.Module]:
        """The models."""
        return [part.module for part in self._parts.values() if isinstance(part, ModuleAdapter)]

    def capture(self) -> State:
        """See Stateful.capture. StateUnusable after a load that failed half-way."""
        if self.unusable:
            raise StateUnusable(
                f"the state is a mix since {self.unusable}; load a whole checkpoint, or restart the job"
            )
        return State.merged(part.capture() for part in self._parts.values())

    def gradients(self) -> State:
        """Gradients as they are now, `grad.<fqn>`. Unsupported where a backend keeps them in buffers of its own."""
        of_models = {lead: part for lead, part in self._parts.items() if isinstance(part, ModuleAdapter)}
        return State.merged(
            GradientAdapter(part.module, "grad" + lead.removeprefix("model")).capture()
            for lead, part in of_models.items()
        )

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """See Loadable.parameter_groups."""
        part = self._parts.get("optim")
        return part.groups() if isinstance(part, OptimizerAdapter) else None

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets. A part's Mismatch becomes a problem of the targets: the plan tells them all at once."""
        found: list[State] = []
        problems: dict[str, str] = {}
        for lead, part in self._parts.items():
            try:
                found.append(part.targets(saved))
            except Mismatch as e:  # noqa: PERF203  the other parts' problems are wanted, too
                problems[lead] = str(e)
        whole = State.merged(found)
        whole.problems.update(problems)
        return whole

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        return [note for part in self._parts.values() for note in part.restore(saved)]


_PARTS = ("model", "optim", "grad", "dataloader", "deepspeed", "environment", "peft", "rng")
"""Names of parts that are no values: an extra value must not take the place of one."""


def _brought_by(
    engine: Any,
    suffix: str,
    slots: Callable[[], Iterable[tuple[str, Slot]]],
    optimizers: Mapping[str, Any],
    parts: Mapping[str, Stateful],
) -> dict[str, Stateful]:
    """Parts that a DeepSpeed engine brings besides the model: what `deepspeed.initialize` returns may be given, too."""
    found: dict[str, Stateful] = {}
    lead, optimizer = "optim" + suffix, optimizer_of(engine)
    if (given := optimizers.get(lead)) is not None and given not in (owner_of(engine), engine.basic_optimizer):
        raise Unsupported(f"{lead}: not the optimizer of the DeepSpeed engine, which it brings itself: leave it out")
    if optimizer is not None:
        found[lead] = OptimizerAdapter(optimizer, slots, lead, parameters=partial(masters, engine))
    if (name := "lr_scheduler" + suffix) not in parts and engine.lr_scheduler is not None:
        found[name] = ValueAdapter(engine.lr_scheduler, name)
    return found


def _check_names(extra: Mapping[str, Any], taken: tuple[str, ...]) -> None:
    """Unsupported for a name of an extra value that is another part's, or cannot stand in a file's name."""
    for name in extra:
        if name in taken:
            raise Unsupported(f"{name}: is the name of another part of the state; give the extra value another")
        if not is_name(name):
            raise Unsupported(f"{name!r} cannot be a name: {_NAMES}")


def _check_kinds(models: Mapping[str, Any], optimizers: Mapping[str, Any]) -> None:
    """Unsupported, with the name, for a model or an optimizer that is none."""
    for lead, value in models.items():
        if not isinstance(value, nn.Module):
            raise Unsupported(f"{lead}: a {type(value).__qualname__}; an nn.Module (or a dict of them) is expected")
    for lead, value in optimizers.items():
        if not (hasattr(value, "param_groups") and hasattr(value, "state")):
            raise Unsupported(f"{lead}: a {type(value).__qualname__}; an Optimizer (or a dict of them) is expected")


_NAMES = "at most 100 letters, digits, _ and - are one, and ack-<number> is not"


def _named(value: Any, lead: str) -> dict[str, Any]:
    """Several values of one kind as lead.name -> value; a single one as lead -> value."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return {lead: value}
    for name in value:
        if not (isinstance(name, str) and is_name(name)):
            raise Unsupported(f"{lead}: {name!r} cannot be a name: {_NAMES}")
    return {f"{lead}.{name}": v for name, v in value.items()}


class ValueAdapter:
    """Anything with state_dict() and load_state_dict(). Tensors in it are saved as tensors, on the CPU when loaded."""

    def __init__(self, value: HasStateDict, name: str) -> None:
        if not (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))):
            raise Unsupported(f"{name}: a {type(value).__qualname__} has no state_dict() and load_state_dict()")
        self._value, self._name = value, name
        self._made: dict[str, torch.Tensor] = {}

    def capture(self) -> State:
        """See Stateful.capture."""
        return tensors.capture_tree(self._name, self._value.state_dict())

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets. A value with `check_state_dict` is asked before anything moves."""
        check = getattr(self._value, "check_state_dict", None)
        if check and self._name in saved.objects:
            check(saved.objects[self._name])
        self._made = tensors.tree_targets(self._name, saved)
        found = {fqn: plain(t, fqn, trusted=False) for fqn, t in self._made.items()}
        return State(found, objects={self._name: True})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        if self._name in saved.objects:
            self._value.load_state_dict(insert(saved.objects[self._name], self._made))
        self._made = {}
        return []


class EnvironmentAdapter:
    """What the run was made with: recorded, and compared on resume. Never a reason to refuse."""

    NAME = "environment"
    EXPECTED_TO_CHANGE = ("world_size", "parallelism", "python", "torch", "distckpt")

    def __init__(
        self, models: Mapping[str, nn.Module], config: Mapping[str, Any] | None, code: str | None, tokenizer: Any
    ) -> None:
        self._models, self._config, self._code, self._tokenizer = models, config, code, tokenizer

    def capture(self) -> State:
        """See Stateful.capture."""
        return State(objects={self.NAME: JoinedObject(self._now(), joins="precision", on_reshard="first")})

    def _now(self) -> dict[str, Any]:
        dtypes = {p.dtype for m in self._models.values() for p in m.parameters()}
        precision = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return {
            "distckpt": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "world_size": comm.current().world_size,
            "parallelism": {lead: parallelism(m) for lead, m in self._models.items()},
            "precision": precision,
            "config": dict(self._config) if self._config is not None else None,
            "code_version": self._code,
            "tokenizer": _tokenizer(self._tokenizer),
        }

    def targets(self, saved: Saved) -> State:  # noqa: ARG002
        """See Stateful.targets."""
        return State(objects={self.NAME: False})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore. What must not change unnoticed is warned of; what may is noted."""
        then, now, notes = saved.objects.get(self.NAME), self._now(), []
        for name, value in now.items() if isinstance(then, dict) else ():
            if (before := then.get(name)) != value and before is not None:  # type: ignore[union-attr]
                notes.append(f"{name}: was {before}, is {value}")
                if name not in self.EXPECTED_TO_CHANGE:
                    warnings.warn(f"resumed with another {notes[-1]}", StateWarning, stacklevel=2)
        return notes


def _tokenizer(tokenizer: Any) -> dict[str, str] | None:
    """Name and digest of a tokenizer: of its vocabulary where it tells, else of the name alone."""
    if tokenizer is None:
        return None
    name = (
        tokenizer if isinstance(tokenizer, str) else str(getattr(tokenizer, "name_or_path", type(tokenizer).__name__))
    )
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else name
    text = json.dumps(vocabulary, sort_keys=True, default=str)
    return {"name": name, "digest": hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}
