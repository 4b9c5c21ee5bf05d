"""One save, from live state to commit.

The path, top to bottom: capture and agree (one small collective) -> plan -> write the data file, then the ack -> commit
when all have acked. Waited for, the training process writes from live memory; else the image is staged, and the writer
process does what follows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from distckpt.comm import together
from distckpt.errors import RanksMissing, StoreError
from distckpt.format.datafile import build
from distckpt.format.layout import StepDir
from distckpt.format.manifest import Manifest, TensorInfo
from distckpt.latest import Latest
from distckpt.saving.agree import agree
from distckpt.saving.commit import Attempt, commit_when_acked, remove_acks
from distckpt.saving.divide import divide
from distckpt.saving.frozen import Frozen
from distckpt.saving.image import Laid, held, lay_out
from distckpt.saving.part import Part, abandon_part, write_part
from distckpt.saving.ring import content
from distckpt.saving.room import lacking, needed
from distckpt.signing import algorithm

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch

    from distckpt.comm import Comm
    from distckpt.format.datafile import Image
    from distckpt.format.partition import Partition
    from distckpt.saving.agree import Agreement
    from distckpt.saving.frozen import Named
    from distckpt.state import State
    from distckpt.store.base import Store


_LAYOUTS: Latest[tuple[Mapping[str, Partition], Laid]] = Latest()


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
    room: Callable[[], int | None] = lambda: None
    """Bytes free where this rank saves, None where not known. Where all save to one place, rank 0's answer counts."""
    sharing: Sequence[int] = ()
    """Ranks that save where this one does; (): all."""
    arena_bytes: int | None = None
    """Most host memory that this rank may use for copies of the state; None: as much as is of use."""
    frozen: Frozen = field(default_factory=Frozen)
    """Knows whether an earlier checkpoint of the run has the frozen weights."""
    keep: Sequence[str] = ()
    """Why the checkpoint is to be kept whatever the rules; asked on rank 0, once the state is captured."""


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
    _laid: Laid
    _rank_objects: bytes
    _wrote: Callable[[], None]
    _lacking: StoreError | None

    def image(self) -> tuple[Image, list[torch.Tensor]]:
        """Image of this rank's data file, and views of live memory: its chunks, in file order. Unsupported.

        Asked for once, where it is to be written, and before anything of the state changes. StoreError where there is
        no room for what the ranks write that share this one's disk.
        """
        if self._lacking:
            raise self._lacking
        self._wrote()
        return build(self._laid.packed, self._rank_objects, algorithm()), held(self._state, self._laid, self.part.rank)

    def lasting(self) -> list[bool]:
        """Which chunks, in file order, stay as they are until an optimizer steps: parameters and their states."""
        return [self._state.tensors[fqn].trusted for fqn, _ in self._laid.places]


def plan(comm: Comm, store: Store, capture: Callable[[], State], request: Request) -> Planned:
    """Capture the state on every rank and agree on who writes what. Collective; raises on every rank or on none.

    StoreError where the store that all share has no room for it.
    """
    frozen = request.frozen
    state, agreement = agree(
        comm,
        capture,
        step=request.step,
        generation=request.generation,
        flag=lambda state: request.flag() | frozen.flag(state, comm.rank),
        room=request.room,
        check_replicas=request.check_replicas,
    )
    shared = frozen.shared(agreement.tensors, agreement.flags)
    partitions, laid = _dealt(agreement, comm.rank, shared)
    attempt = Attempt(StepDir(request.step, agreement.generation), agreement.attempt, comm.world_size)
    need = needed(agreement.tensors, partitions, request.sharing)
    short = lacking(store, attempt.directory, need, agreement.rooms[bool(request.sharing)])
    if short and not request.sharing:
        raise short
    part = Part(attempt, comm.rank)
    if comm.rank == 0:
        named = frozen.named(shared, agreement.flags, comm.world_size)
        part = Part(attempt, 0, agreement.objects, _draft(attempt, request, agreement, partitions, named))
    wrote = partial(frozen.wrote, attempt, state, agreement.tensors, agreement.flags, shared)
    objects = _dump(agreement.rank_objects)
    return Planned(part, agreement.notes, agreement.flags, state, laid, objects, wrote, short)


def save(comm: Comm, store: Store, capture: Callable[[], State], request: Request) -> Committed:
    """Save a state on every rank, durably, and commit it. Collective.

    Raises on every rank whatever fails on any, with rank and cause; the previous checkpoint is untouched then.
    """
    planned = plan(comm, store, capture, request)
    part = planned.part
    directory = part.attempt.directory
    draft: Manifest | None = None
    made: Manifest | None = None

    def write() -> bytes:
        nonlocal draft
        image, chunks = planned.image()
        with content(image, chunks, request.arena_bytes) as data:
            draft = write_part(store, part, data, len(image.header), image.size)
        return image.size.to_bytes(8, "little")

    def commit() -> None:
        nonlocal made
        if comm.rank == 0:
            made = commit_when_acked(store, part.attempt, draft, timeout=comm.timeout)
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


def _dealt(agreement: Agreement, rank: int, shared: Collection[str]) -> tuple[Mapping[str, Partition], Laid]:
    """Partitions of what is to be written, and this rank's file of it. Both are the same for the same description."""

    def deal() -> tuple[Mapping[str, Partition], Laid]:
        written = {fqn: t for fqn, t in agreement.tensors.items() if fqn not in shared} if shared else agreement.tensors
        partitions = divide(written)
        return partitions, lay_out(written, partitions, rank)

    return _LAYOUTS.get((agreement.key, rank, len(shared)), deal) if agreement.key else deal()


def _draft(
    attempt: Attempt,
    request: Request,
    agreement: Agreement,
    partitions: Mapping[str, Partition],
    named: Named,
) -> Manifest:
    """Return the manifest, in which the ranks' files, and objects, are still missing."""
    written = {
        fqn: TensorInfo(t.shape, t.dtype, partitions[fqn]) for fqn, t in agreement.tensors.items() if fqn in partitions
    }
    return Manifest(
        step=request.step,
        generation=attempt.directory.generation,
        launch=request.launch,
        attempt=attempt.id,
        date=request.date,
        world_size=attempt.world_size,
        tensors=written | named.tensors,
        files=named.files,
        objects={},
        rank_objects=agreement.policies,
        aliases=agreement.aliases,
        metrics=request.metrics,
        writer=request.writer,
        keep=", ".join(request.keep),
    )


def _dump(rank_objects: Mapping[str, bytes]) -> bytes:
    """Content of `__objects__`: this rank's own objects by name."""
    return json.dumps({n: json.loads(v) for n, v in rank_objects.items()}, separators=(",", ":")).encode()
