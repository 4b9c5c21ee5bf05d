"""What a copy can be written as: each format with its own options, and how its files are planned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from distckpt.errors import RunConflict, StoreError
from distckpt.foreign.companions import with_companions
from distckpt.foreign.dcp_write import dcp_sink
from distckpt.foreign.deepspeed_write import DeepSpeed
from distckpt.foreign.peft import peft_sink
from distckpt.foreign.safetensors_write import safetensors_sink
from distckpt.foreign.torch_write import torch_sink
from distckpt.format.layout import StepDir, attempt_of
from distckpt.run.history import History
from distckpt.run.launches import read_launches
from distckpt.saving.commit import is_committed
from distckpt.store.open import open_store, parted
from distckpt.tools.run_sink import run_sink

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.foreign.sink import Sink
    from distckpt.format.manifest import FileInfo
    from distckpt.store.base import Store
    from distckpt.tools.view import View

__all__ = [
    "DCP",
    "FORMATS",
    "DeepSpeed",
    "Distckpt",
    "Format",
    "Peft",
    "Safetensors",
    "Torch",
    "is_taken",
    "refuse_taken",
]


class Format(Protocol):
    """A format with its options."""

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:
        """Plan the files. attempt: a name for this copy. room: bytes that buffers take."""
        ...


@dataclass(frozen=True, slots=True)
class Distckpt:
    """A run: the checkpoint becomes a step of it.

    has: files of earlier steps there, to be named where the source names equal ones.
    """

    has: tuple[FileInfo, ...] = ()

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:
        """See Format."""
        run, name = parted(destination)
        if StepDir.parse(name):
            raise RunConflict(f"{destination}: is the name of a step; the run that it becomes a step of is {run}")
        return run_sink(view, _step_dir(open_store(destination), view.manifest.step, attempt), attempt, room, self.has)


@dataclass(frozen=True, slots=True)
class DCP:
    """A directory of torch.distributed.checkpoint."""

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
        """See Format."""
        return dcp_sink(view, room)


@dataclass(frozen=True, slots=True)
class Safetensors:
    """A file, if the destination is called `*.safetensors`; else a directory as Hugging Face has it.

    shard_bytes: most bytes of a file of such a directory. config: a directory whose config, tokenizer and other small
    files are copied along.
    """

    shard_bytes: int = 5_000_000_000
    config: str | None = None

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
        """See Format."""
        name = parted(destination)[1]
        alone = name if Path(name).suffix == ".safetensors" else None
        sink = safetensors_sink(view, alone, self.shard_bytes, room)
        return sink if self.config is None else with_companions(sink, view, Path(self.config))


@dataclass(frozen=True, slots=True)
class Torch:
    """A file that torch.load reads."""

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
        """See Format."""
        return torch_sink(view, parted(destination)[1], room)


@dataclass(frozen=True, slots=True)
class Peft:
    """A directory of an adapter, as PEFT has it. The source: what `Source(lora=Lora(...))` opens."""

    def sink(self, view: View, destination: str | Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
        """See Format."""
        return peft_sink(view, room)


FORMATS: dict[str, Callable[[], Format]] = {
    "distckpt": Distckpt,
    "dcp": DCP,
    "deepspeed": DeepSpeed,
    "hf": Safetensors,
    "peft": Peft,
    "safetensors": Safetensors,
    "torch": Torch,
}
"""Formats by name. That of DeepSpeed needs options."""


def _step_dir(store: Store, step: int, attempt: str) -> StepDir:
    """Directory of a step in which a try before this one has left files; else one that nothing has taken.

    RunConflict where the store is the directory of one checkpoint.
    """
    history = History(store)
    history.refuse_checkpoint()
    same = (d for d in history.directories() if d.step == step)
    begun = (d for d in same if any(attempt_of(entry.name) == attempt for entry in store.list(str(d))))
    return next(begun, None) or StepDir(step, history.next_generation(step))


def refuse_taken(sink: Sink, destination: str | Path) -> None:
    """RunConflict where the destination holds something already. StoreError where nothing can be moved to it."""
    holder = parted(destination)[0]
    run, name = parted(holder)
    if (within := StepDir.parse(name)) and is_committed(open_store(run), within):
        raise RunConflict(f"{destination}: lies in a checkpoint, which never changes, and is removed with all in it")
    if os.path.ismount(destination):
        raise StoreError(f"{destination}: is a mount point, which no directory can be moved to: give a path below it")
    if sink.kind == "inside" and os.path.exists(destination) and not os.path.isdir(destination):  # noqa: PTH110, PTH112
        raise StoreError(f"{destination}: is a file; a directory is expected")
    if step := StepDir.parse(sink.top) if sink.kind == "inside" else None:
        if is_taken(sink, destination):
            raise RunConflict(
                f"{destination}: holds step {step.step} already, or is a run that jobs have resumed, where a copy "
                "would not count: copy into a new directory"
            )
    elif is_taken(sink, destination):
        target, tag = (f"{destination}/{sink.top}", "tag or ") if sink.kind == "inside" else (destination, "")
        raise RunConflict(f"{target}: exists already; give another {tag}destination, or remove it first")


def is_taken(sink: Sink, destination: str | Path) -> bool:
    """Whether the destination holds something already."""
    path = Path(destination)
    if sink.kind != "inside":
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))
    step = StepDir.parse(sink.top)
    if step is None:
        return (path / sink.top).exists()
    store = open_store(destination)
    return bool(read_launches(store)) or any(f.directory.step == step.step for f in History(store).committed())
