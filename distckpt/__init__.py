"""Distributed checkpoints for PyTorch: saved on N ranks of one backend, resumed on M ranks of any other.

`import distckpt` imports neither torch nor numpy: they come with the first name that needs them.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Checkpointer": "distckpt.run.checkpointer",
    "ElasticSampler": "distckpt.run.sampler",
    "LoadReport": "distckpt.load.report",
    "Progress": "distckpt.run.trainstate",
    "TrainState": "distckpt.run.trainstate",
    "full_state_dict": "distckpt.run.full",
}
__all__ = ["Checkpointer", "ElasticSampler", "LoadReport", "Progress", "TrainState", "full_state_dict", "load", "save"]

if TYPE_CHECKING:
    from distckpt.load.report import LoadReport
    from distckpt.run.checkpointer import Checkpointer
    from distckpt.run.direct import load, save
    from distckpt.run.full import full_state_dict
    from distckpt.run.sampler import ElasticSampler
    from distckpt.run.trainstate import Progress, TrainState


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distckpt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """This package: `distckpt.save` and `distckpt.load` are functions, whatever subpackages are imported.

    The import system binds the subpackages `distckpt.save` and `distckpt.load` to the same names: they are reached by
    import statements, and stay out of the way here.
    """

    @property
    def save(self) -> Any:
        """See distckpt.run.direct.save."""
        return importlib.import_module("distckpt.run.direct").save

    @save.setter
    def save(self, subpackage: ModuleType) -> None:
        pass

    @property
    def load(self) -> Any:
        """See distckpt.run.direct.load."""
        return importlib.import_module("distckpt.run.direct").load

    @load.setter
    def load(self, subpackage: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
