"""One save, from live state to commit.

The path, top to bottom: capture and agree (one small collective) -> plan -> write the data file, then the ack -> commit
when all have acked. Waited for, the training process writes from live memory; else the image is staged, and the writer
process does what follows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.comm import together
from distckpt.errors import RanksMissing
from distckpt.format.layout import StepDir
from distckpt.format.manifest import Manifest, TensorInfo
from distckpt.saving.agree import agree
from distckpt.saving.commit import Attempt, commit_when_acked, remove_acks
from distckpt.saving.divide import divide
from distckpt.saving.image import build, live, own_chunks
from distckpt.saving.part import Part, abandon_part, whole, write_part

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from distckpt.comm import Comm
    from distckpt.format.datafile import Image
    from distckpt.format.partition import Partition
    from distckpt.saving.agree import Agreement
    from distckpt.state import State
    from distckpt.store.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a save is told besides the state."""

    step: int
    launch: int
    date: str
    metrics: Mapping[str, Any]
    writer: Mapping[str, str]
    generation: Callable[[], int]
    """Which generation of the step this is; asked on rank 0 only."""
    check_replicas: bool = False
    flag: Callable[[], int] = lambda: 0
    """What this rank tells all others along with its description."""


@dataclass(frozen=True, slots=True)
class Committed:
    """What a save made. The manifest is known on rank 0."""

    directory: StepDir
    nbytes: int
    notes: list[str]
    manifest: Manifest | None


@dataclass(frozen=True, slots=True)
class Planned:
    """What this rank is to write, agreed with the others; nothing is written yet."""

    part: Part
    notes: list[str]
    flags: list[int]
    _state: State
    _partitions: Mapping[str, Partition]
    _rank_objects: bytes

    def image(self) -> tuple[Image, Mapping[str, tuple[str, torch.Tensor]]]:
        """Image of this rank's data file, and its chunks: name -> (fqn, view of live memory). Unsupported."""
        chunks = own_chunks(self._state, self._partitions, self.part.rank)
        return build(chunks, self._rank_objects), chunks


def plan(comm: Comm, capture: Callable[[], State], request: Request) -> Planned:
    """Capture the state on every rank and agree on who writes what. Collective; raises on every rank or on none."""
    state, agreement = agree(
        comm,
        capture,
        step=request.step,
        generation=request.generation,
        flag=request.flag,
        check_replicas=request.check_replicas,
    )
    partitions = divide(agreement.tensors)
    attempt = Attempt(StepDir(request.step, agreement.generation), agreement.attempt, comm.world_size)
    part = Part(attempt, comm.rank)
    if comm.rank == 0:
        part = Part(attempt, 0, agreement.objects, _draft(attempt, request, agreement, partitions))
    return Planned(part, agreement.notes, agreement.flags, state, partitions, _dump(agreement.rank_objects))


def save(comm: Comm, store: Store, capture: Callable[[], State], request: Request) -> Committed:
    """Save a state on every rank, durably, and commit it. Collective.

    Raises on every rank whatever fails on any, with rank and cause; the previous checkpoint is untouched then.
    """
    planned = plan(comm, capture, request)
    part = planned.part
    directory = part.attempt.directory
    made: Manifest | None = None

    def write() -> bytes:
        image, chunks = planned.image()
        write_part(store, part, whole(image, live(image, chunks)), len(image.header), image.size)
        return image.size.to_bytes(8, "little")

    def commit() -> None:
        nonlocal made
        if comm.rank == 0:
            made = commit_when_acked(store, part.attempt, timeout=comm.timeout)
            remove_acks(store, part.attempt)

    try:
        sizes = together(comm, f"writing {directory}", write)
        together(comm, f"committing {directory}", commit)
    except RanksMissing:
        raise  # the lost rank may have finished: a later resume rolls the attempt forward, or gc removes it
    except Exception:
        abandon_part(store, part)
        raise
    return Committed(directory, sum(int.from_bytes(s, "little") for s in sizes), planned.notes, made)


def _draft(attempt: Attempt, request: Request, agreement: Agreement, partitions: Mapping[str, Partition]) -> Manifest:
    """Return the manifest, in which files and objects are still missing."""
    return Manifest(
        step=request.step,
        generation=attempt.directory.generation,
        launch=request.launch,
        attempt=attempt.id,
        date=request.date,
        world_size=attempt.world_size,
        tensors={fqn: TensorInfo(t.shape, t.dtype, partitions[fqn]) for fqn, t in agreement.tensors.items()},
        files=(),
        objects={},
        rank_objects=agreement.policies,
        aliases=agreement.aliases,
        metrics=request.metrics,
        writer=request.writer,
    )


def _dump(rank_objects: Mapping[str, bytes]) -> bytes:
    """Content of `__objects__`: this rank's own objects by name."""
    return json.dumps({n: json.loads(v) for n, v in rank_objects.items()}, separators=(",", ":")).encode()
