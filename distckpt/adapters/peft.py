"""What PEFT knows of a model's adapters besides their tensors: kept with them, and compared on resume.

An adapter's scaling is in its configuration alone: one that changed would go unnoticed, and nothing could merge it.
"""

from __future__ import annotations

import enum
import warnings
from typing import TYPE_CHECKING, Any

from distckpt.adapters.slots import named_modules
from distckpt.errors import StateWarning
from distckpt.state import JoinedObject, Saved, State

if TYPE_CHECKING:
    from torch import nn

NAME = "peft"
"""Object: name of an adapter -> its `config`, as adapter_config.json has it, and the modules whose weights are stored
as (in, out): `transposed`."""
ROOT = "base_model.model."
"""What stands before the names of a model that PEFT has wrapped."""

_FELT = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
"""What changes the model and no shape."""


def holder_of(model: nn.Module) -> nn.Module | None:
    """Outermost module that has configurations of PEFT: of a PeftModel itself, or of what wraps it."""
    return next((m for m in model.modules() if _configs(m)), None)


def _configs(module: nn.Module) -> dict[str, Any]:
    found = getattr(module, "peft_config", None)
    return found if isinstance(found, dict) and all(hasattr(c, "to_dict") for c in found.values()) else {}


class PeftAdapter:
    """The configurations of a model's adapters."""

    def __init__(self, model: nn.Module, holder: nn.Module, name: str) -> None:
        self._model, self._holder, self._name = model, holder, name

    def capture(self) -> State:
        """See Stateful.capture."""
        return State(objects={self._name: JoinedObject(self._now(), joins="transposed", on_reshard="first")})

    def _now(self) -> dict[str, Any]:
        turned = sorted(
            name.partition(ROOT)[2] or name
            for name, module in named_modules(self._model)
            if getattr(module, "fan_in_fan_out", False) and hasattr(module, "lora_A")
        )
        return {
            name: {"config": config_of(config, self._holder), "transposed": turned}
            for name, config in _configs(self._holder).items()
        }

    def targets(self, saved: Saved) -> State:  # noqa: ARG002
        """See Stateful.targets."""
        return State(objects={self._name: False})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore. What changes what the model computes is warned of."""
        then, now, notes = saved.objects.get(self._name), self._now(), []
        for name in now if isinstance(then, dict) else ():
            before = then.get(name, {}).get("config", {})  # type: ignore[union-attr]
            for key in _FELT:
                if key in before and before[key] != now[name]["config"].get(key):
                    notes.append(f"{self._name}: {name}: {key} was {before[key]}, is {now[name]['config'].get(key)}")
                    warnings.warn(f"resumed with another adapter: {notes[-1]}", StateWarning, stacklevel=2)
        return notes


def config_of(config: Any, holder: nn.Module) -> dict[str, Any]:
    """Configuration as PEFT saves it: for inference, and (of no known task) with the model's class."""
    said = {name: _plain(value) for name, value in config.to_dict().items()}
    base = holder.get_base_model() if hasattr(holder, "get_base_model") else holder  # type: ignore[operator]
    if said.get("base_model_name_or_path") is None:
        said["base_model_name_or_path"] = base.__dict__.get("name_or_path") or None
    if said.get("task_type") is None:
        kind = type(base)
        said["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return said | {"inference_mode": True}


def _plain(value: Any) -> Any:
    """Value as JSON has it; a set in an order that all ranks agree on."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): _plain(member) for key, member in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
