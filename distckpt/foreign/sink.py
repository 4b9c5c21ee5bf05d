"""What a sink is: a list of files to be written in any order, and what is written last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint
from distckpt.format.partition import Copies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store


@dataclass(frozen=True, slots=True)
class Output:
    """One file: its key, its bytes, and who writes it. What `write` returns (JSON) goes to `Sink.finish`."""

    name: str
    size: int
    write: Callable[[Store], Any]


@dataclass(slots=True)
class Sink:
    """The files of a checkpoint in some format.

    finish: given what each output returned, by name, the files (key, content) that make the whole a checkpoint, in
    order. kind: "file" where the destination is one file, "inside" where it is the directory `top` in the destination,
    else "directory". pointers: files (name, content) of the destination that are switched once all is in place.
    dtypes: of tensors that are written as another than they have. order: names by position, to read it back with.
    beside: files that the destination has already, of which the checkpoint is made as well.
    """

    outputs: list[Output]
    finish: Callable[[Mapping[str, Any]], list[tuple[str, bytes]]]
    notes: list[str] = field(default_factory=list)
    kind: str = "directory"
    top: str = ""
    pointers: list[tuple[str, bytes]] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)
    order: list[list[str]] | None = None
    beside: list[str] = field(default_factory=list)


def refuse_empty(checkpoint: Checkpoint) -> None:
    """NotACheckpoint where there is nothing to write."""
    if not checkpoint.manifest.tensors and not checkpoint.manifest.objects:
        why = "; ".join(f"{name}: {why}" for name, why in checkpoint.unreadable.items())
        raise NotACheckpoint(
            f"{checkpoint.name}: has neither tensors nor values" + (f" that can be read: {why}" if why else "")
        )


def lost(checkpoint: Checkpoint) -> list[str]:
    """Notes of what no other tool's format has a place for."""
    content = checkpoint.manifest
    notes = [f"{name}: each rank has its own, which has no place there; left out" for name in content.rank_objects]
    notes += [f"{name}: cannot be read safely; left out: {why}" for name, why in checkpoint.unreadable.items()]
    return notes + [
        f"{fqn}: differed between the ranks that saved it; rank {info.partition.first}'s is written"
        for fqn, info in content.tensors.items()
        if isinstance(info.partition, Copies)
    ]
