"""Distributed checkpoints for PyTorch: saved on N ranks of one backend, resumed on M ranks of any other.

`import distckpt` imports neither torch nor numpy: they come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "After": "distckpt.run.after",
    "Checkpointer": "distckpt.run.checkpointer",
    "ElasticSampler": "distckpt.run.sampler",
    "Export": "distckpt.run.after",
    "Keep": "distckpt.run.keep",
    "Local": "distckpt.run.places",
    "LoadReport": "distckpt.loading.report",
    "Probe": "distckpt.run.probe",
    "Progress": "distckpt.run.trainstate",
    "TrainState": "distckpt.run.trainstate",
    "TrialLoad": "distckpt.run.after",
    "full_state_dict": "distckpt.run.full",
    "load": "distckpt.run.direct",
    "save": "distckpt.run.direct",
}
__all__ = [
    "After",
    "Checkpointer",
    "ElasticSampler",
    "Export",
    "Keep",
    "LoadReport",
    "Local",
    "Probe",
    "Progress",
    "TrainState",
    "TrialLoad",
    "full_state_dict",
    "load",
    "save",
]

if TYPE_CHECKING:
    from distckpt.loading.report import LoadReport
    from distckpt.run.after import After, Export, TrialLoad
    from distckpt.run.checkpointer import Checkpointer
    from distckpt.run.direct import load, save
    from distckpt.run.full import full_state_dict
    from distckpt.run.keep import Keep
    from distckpt.run.places import Local
    from distckpt.run.probe import Probe
    from distckpt.run.sampler import ElasticSampler
    from distckpt.run.trainstate import Progress, TrainState


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
