"""Copy a checkpoint from any format that is read into any that is written, streaming: an import, an export, a backup.

Every byte that has a checksum is verified on the way; the destination counts only when it is whole.
"""

from __future__ import annotations

import json
import secrets
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt import __version__
from distckpt.errors import NotACheckpoint, RunConflict, StateWarning
from distckpt.foreign.dcp_write import write_dcp
from distckpt.format import datafile, manifest, objects
from distckpt.format.box import Box
from distckpt.format.checksum import digest
from distckpt.format.layout import StepDir, chunk_name, data_file, object_file
from distckpt.format.manifest import FileInfo, Manifest, ObjectInfo, TensorInfo
from distckpt.format.partition import Copies, Pieces
from distckpt.load.stream import Stretch, stream
from distckpt.run.history import History
from distckpt.run.launches import read_launches
from distckpt.run.saving import now
from distckpt.run.source import open_source
from distckpt.save.commit import Attempt, commit, may_be_committed
from distckpt.save.image import MODEL_LEAD, Arena, ImageStream
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from distckpt.format.box import Region, Shape
    from distckpt.load.open import Checkpoint
    from distckpt.store.base import Store

FORMATS = ("distckpt", "dcp")
_ARENA = 8 << 20


@dataclass(slots=True)
class CopyReport:
    """What a copy did: bytes of the tensors, seconds, and in `notes` what has no place in the destination."""

    destination: str
    nbytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def copy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "distckpt",
    step: int | None = None,
    names: Mapping[str, str] | None = None,
    verify: bool = False,
) -> CopyReport:
    """Copy a checkpoint: of a run (its newest, or that of `step`), a step directory, or another tool's.

    to: "distckpt" (destination is a run's directory; `step` is what the checkpoint is called there, where the source is
    another tool's) or "dcp" (destination is the directory). names: as in Checkpointer.load. verify: check another
    tool's records against their CRC-32 first. What cannot be carried is warned of, and noted. Offline: one process.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r}: one of {', '.join(FORMATS)}")
    started = time.monotonic()
    checkpoint = open_source(source, step=step, names=names)
    if verify:
        checkpoint.verify(_chunks(checkpoint))
    if to == "dcp":
        notes = write_dcp(checkpoint, destination)
        where = str(destination)
    else:
        if step is not None and checkpoint.foreign:
            checkpoint.manifest = replace(checkpoint.manifest, step=step)
        directory, notes = write_run(checkpoint, LocalStore(destination))
        where = str(Path(destination) / str(directory))
    for note in notes:
        warnings.warn(note, StateWarning, stacklevel=2)
    nbytes = sum(_nbytes(info) for info in checkpoint.manifest.tensors.values())
    return CopyReport(where, nbytes, time.monotonic() - started, notes)


def _nbytes(info: TensorInfo) -> int:
    return datafile.Chunk("", info.dtype, info.shape).nbytes


def _chunks(checkpoint: Checkpoint) -> Iterator[tuple[int, str]]:
    for fqn, info in checkpoint.manifest.tensors.items():
        for file, region in info.partition.overlapping(Box.whole(info.shape)):
            yield file, chunk_name(fqn, region, info.shape)


def write_run(checkpoint: Checkpoint, store: Store) -> tuple[StepDir, list[str]]:
    """Write a checkpoint as the step of a run, file by file; commit.json is created last.

    Returns its directory and notes. RunConflict where that step is there, or a launch of the run would fence it off.
    """
    content = checkpoint.manifest
    if not content.tensors and not content.objects:
        raise NotACheckpoint(f"{checkpoint.name}: has neither tensors nor values")
    history = History(store)
    if read_launches(store) or any(found.directory.step == content.step for found in history.committed()):
        raise RunConflict(
            f"{store}: holds step {content.step} already, or is a run that jobs have resumed, where a copy would not "
            "count: copy into a new directory"
        )
    notes = [f"{name}: cannot be read safely; left out: {why}" for name, why in checkpoint.unreadable.items()]
    directory = StepDir(content.step, history.next_generation(content.step))
    written = _Copy(checkpoint, store, Attempt(directory, secrets.token_hex(6), content.world_size))
    try:
        commit(store, written.attempt, written.write())
    except BaseException:
        written.abandon()
        raise
    return directory, notes


class _Copy:
    """One step directory as it is written."""

    def __init__(self, checkpoint: Checkpoint, store: Store, attempt: Attempt) -> None:
        self.attempt = attempt
        self._checkpoint, self._store = checkpoint, store
        self._keys: list[str] = []
        content = checkpoint.manifest
        self._tensors = {fqn: _at_home(checkpoint, info) for fqn, info in content.tensors.items()}
        last = max((info.partition.last_file for info in self._tensors.values()), default=0)
        self._count = max(content.world_size, last + 1)
        self._chunks: list[dict[str, tuple[str, Stretch]]] = [{} for _ in range(self._count)]
        for fqn, info in content.tensors.items():
            self._enter(fqn, info, self._tensors[fqn])

    def _enter(self, fqn: str, source: TensorInfo, here: TensorInfo) -> None:
        """Enter the chunks of a tensor: which file each goes to, and what of the source fills it."""
        copies = isinstance(source.partition, Copies)
        files = range(self._count) if copies else sorted({f for f, _ in source.partition.overlapping(_all(source))})
        for file in files:
            for region in source.partition.of_file(file):
                name = chunk_name(fqn, region, source.shape)
                target = file if here is source else self._checkpoint.home(file)
                self._chunks[target][name] = (fqn, Stretch.whole(file, name, region, source.dtype))

    def write(self) -> Manifest:
        """Write all files; returns what is to be committed."""
        arena = Arena(_ARENA)
        try:
            files = tuple(self._write_file(i, arena) for i in range(self._count))
        finally:
            arena.close()
        shared = {}
        for name in self._checkpoint.manifest.objects:
            data = objects.encode(self._checkpoint.object(name), name)
            file = object_file(name, self.attempt.id)
            write_all(self._store, self._key(file), data)
            shared[name] = ObjectInfo(file, len(data), digest(data))
        content = self._checkpoint.manifest
        whole = replace(
            content,
            generation=self.attempt.directory.generation,
            launch=0,
            attempt=self.attempt.id,
            date=content.date or now(),
            tensors=self._tensors,
            files=files,
            objects=shared,
            writer={**content.writer, "distckpt": __version__},
        )
        manifest.check(whole)
        return whole

    def _write_file(self, index: int, arena: Arena) -> FileInfo:
        chunks = self._chunks[index]
        image = datafile.build(
            (
                datafile.Chunk(name, s.dtype, _sizes(s.region), not fqn.startswith(MODEL_LEAD))
                for name, (fqn, s) in chunks.items()
            ),
            self._rank_objects(index),
        )
        wanted = [chunks[segment.name][1] for segment in image.segments]
        content = ImageStream(image, (data for _, data in stream(self._checkpoint, wanted)), arena.view)
        name = data_file(index, self.attempt.id)
        self._store.write(self._key(name), content, size=image.size)
        return FileInfo(name, image.size, len(image.header), content.digest)

    def _rank_objects(self, rank: int) -> bytes:
        own = self._checkpoint.rank_objects(rank) if rank < self._checkpoint.manifest.world_size else {}
        return json.dumps({n: objects.tag(v, n) for n, v in own.items()}, separators=(",", ":")).encode()

    def _key(self, name: str) -> str:
        self._keys.append(self.attempt.key(name))
        return self._keys[-1]

    def abandon(self) -> None:
        """Remove what was written, unless it may be committed all the same."""
        if not may_be_committed(self._store, self.attempt):
            for key in self._keys:
                self._store.delete(key)


def _all(info: TensorInfo) -> Box:
    return Box.whole(info.shape)


def _sizes(region: Region) -> Shape:
    return region.sizes if isinstance(region, Box) else (region.numel,)


def _at_home(checkpoint: Checkpoint, info: TensorInfo) -> TensorInfo:
    """Partition over the files that are written: what several virtual files hold goes into one."""
    if not isinstance(info.partition, Pieces):
        return info
    pieces = tuple((checkpoint.home(file), region) for file, region in info.partition.pieces)
    return info if pieces == info.partition.pieces else replace(info, partition=Pieces(info.shape, pieces))
