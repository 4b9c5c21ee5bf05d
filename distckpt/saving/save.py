"""One save, from live state to commit.

The path, top to bottom: capture and agree (one small collective) -> divide -> write the data file, then the ack ->
commit when all have acked.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.comm import together
from distckpt.errors import RanksMissing, StoreError
from distckpt.format.checksum import digest
from distckpt.format.layout import StepDir, ack_file, data_file, object_file
from distckpt.format.manifest import FileInfo, Manifest, ObjectInfo, TensorInfo
from distckpt.saving.agree import agree
from distckpt.saving.commit import (
    Attempt,
    abandon,
    commit_when_acked,
    remove_acks,
    write_ack,
    write_refusal,
)
from distckpt.saving.divide import divide
from distckpt.saving.image import ImageStream, build, live, own_chunks
from distckpt.store.base import write_all

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.comm import Comm
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


@dataclass(frozen=True, slots=True)
class Committed:
    """What a save made. The manifest is known on rank 0."""

    directory: StepDir
    nbytes: int
    notes: list[str]
    manifest: Manifest | None


def save(comm: Comm, store: Store, capture: Callable[[], State], arena: memoryview, request: Request) -> Committed:
    """Save a state on every rank, durably, and commit it. Collective.

    Raises on every rank whatever fails on any, with rank and cause; the previous checkpoint is untouched then.
    """
    state, agreement = agree(
        comm,
        capture,
        step=request.step,
        generation=request.generation,
        check_replicas=request.check_replicas,
    )
    directory = StepDir(request.step, agreement.generation)
    attempt = Attempt(directory, agreement.attempt, comm.world_size)
    job = _Job(comm, store, attempt, request, agreement, divide(agreement.tensors))
    whole: Manifest | None = None

    def commit() -> None:
        nonlocal whole
        if comm.rank == 0:
            whole = commit_when_acked(store, attempt, timeout=comm.timeout)
            remove_acks(store, attempt)

    try:
        sizes = together(comm, f"writing {directory}", lambda: _write(job, state, arena).to_bytes(8, "little"))
        together(comm, f"committing {directory}", commit)
    except RanksMissing:
        raise  # the lost rank may have finished: a later resume rolls the attempt forward, or gc removes it
    except Exception:
        _abandon(job)
        raise
    return Committed(directory, sum(int.from_bytes(s, "little") for s in sizes), agreement.notes, whole)


@dataclass(frozen=True, slots=True)
class _Job:
    """What the steps of one save share."""

    comm: Comm
    store: Store
    attempt: Attempt
    request: Request
    agreement: Agreement
    partitions: dict[str, Partition]


def _write(job: _Job, state: State, arena: memoryview) -> int:
    """Write this rank's data file and, last, its ack. Returns the file's bytes."""
    rank, attempt = job.comm.rank, job.attempt
    try:
        chunks = own_chunks(state, job.partitions, rank)
        image = build(chunks, _rank_objects(job.agreement))
        stream = ImageStream(image, live(image, chunks), arena)
        name = data_file(rank, attempt.id)
        job.store.write(attempt.key(name), stream, size=image.size)
        file = FileInfo(name, image.size, len(image.header), stream.digest)
        draft = _draft(job, _write_objects(job)) if rank == 0 else None
        write_ack(job.store, attempt, rank, file, draft)
    except Exception as e:
        with contextlib.suppress(StoreError):  # the ranks learn of it through `together`; this tells later launches
            write_refusal(job.store, attempt, rank, e)
        raise
    return image.size


def _rank_objects(agreement: Agreement) -> bytes:
    """Content of `__objects__`: this rank's own objects by name."""
    return json.dumps({n: json.loads(v) for n, v in agreement.rank_objects.items()}, separators=(",", ":")).encode()


def _write_objects(job: _Job) -> dict[str, ObjectInfo]:
    """Write the rank-independent objects, one readable file each."""
    written = {}
    for name, data in job.agreement.objects.items():
        file = object_file(name, job.attempt.id)
        write_all(job.store, job.attempt.key(file), data)
        written[name] = ObjectInfo(file, len(data), digest(data))
    return written


def _draft(job: _Job, objects: dict[str, ObjectInfo]) -> Manifest:
    agreement, request = job.agreement, job.request
    return Manifest(
        step=request.step,
        generation=job.attempt.directory.generation,
        launch=request.launch,
        attempt=job.attempt.id,
        date=request.date,
        world_size=job.comm.world_size,
        tensors={fqn: TensorInfo(t.shape, t.dtype, job.partitions[fqn]) for fqn, t in agreement.tensors.items()},
        files=(),
        objects=objects,
        rank_objects=agreement.policies,
        aliases=agreement.aliases,
        metrics=request.metrics,
        writer=request.writer,
    )


def _abandon(job: _Job) -> None:
    """Remove what this rank wrote for an attempt that failed.

    The ack goes first, so that nobody finds the attempt complete while it is taken away.
    """
    rank, attempt = job.comm.rank, job.attempt
    names = [ack_file(rank, attempt.id), data_file(rank, attempt.id)]
    if rank == 0:
        names += [object_file(name, attempt.id) for name in job.agreement.objects]
    abandon(job.store, attempt, names)
