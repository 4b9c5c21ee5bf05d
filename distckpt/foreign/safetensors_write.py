"""Safetensors: the model's weights, as one file or as Hugging Face shards them. Nothing else has a place in it."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint, Unsupported
from distckpt.foreign.sink import Output, Sink, lost
from distckpt.format.box import Box
from distckpt.format.datafile import DATA_ALIGNMENT
from distckpt.format.dtype import DTYPE_OF_TAG, item_size, stored_as
from distckpt.loading.stream import Stretch, stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from distckpt.format.box import Shape
    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store

LEAD = "model."


@dataclass(frozen=True, slots=True)
class _Entry:
    fqn: str
    name: str
    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * item_size(self.dtype)


def safetensors_sink(checkpoint: Checkpoint, name: str | None, shard_bytes: int, room: int) -> Sink:
    """Plan one file called `name`; or (None) the files of a directory, at most `shard_bytes` each, with their index."""
    names = {
        fqn: fqn.removeprefix(LEAD)
        for fqn in checkpoint.manifest.tensors
        if fqn.startswith(LEAD) and not fqn.startswith(f"{LEAD}extra_state.")
    }
    entries = _entries(checkpoint, names)
    left = {n.partition(".")[0] for n in (*checkpoint.manifest.tensors, *checkpoint.manifest.objects)} - {"model"}
    notes = lost(checkpoint) + [f"{part}: has no place in safetensors; left out" for part in sorted(left)]
    if name is not None:
        return Sink([_file(checkpoint, name, entries, room)], lambda _: [], notes, "file")
    shards = list(_shards(entries, shard_bytes))
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        return Sink([_file(checkpoint, "model.safetensors", entries, room)], lambda _: [], notes)
    outputs = [_file(checkpoint, n, shard, room) for n, shard in zip(files, shards, strict=True)]
    where = {e.name: n for n, shard in zip(files, shards, strict=True) for e in shard}
    index = {"metadata": {"total_size": sum(e.nbytes for e in entries)}, "weight_map": dict(sorted(where.items()))}
    written = json.dumps(index, indent=2).encode()
    return Sink(outputs, lambda _: [("model.safetensors.index.json", written)], notes)


def safetensors_file(checkpoint: Checkpoint, name: str, names: Mapping[str, str], room: int) -> Output:
    """Plan one file called `name`, of these tensors (fqn -> what it is called in the file)."""
    return _file(checkpoint, name, _entries(checkpoint, names), room)


def _entries(checkpoint: Checkpoint, names: Mapping[str, str]) -> list[_Entry]:
    infos = checkpoint.manifest.tensors
    entries = [_Entry(fqn, name, infos[fqn].dtype, infos[fqn].shape) for fqn, name in names.items()]
    if not entries:
        raise NotACheckpoint(f"{checkpoint.name}: has no tensors of a model to write as safetensors")
    for entry in entries:
        if DTYPE_OF_TAG.get(stored_as(entry.dtype, ())[0]) != entry.dtype:
            raise Unsupported(f"{entry.fqn}: dtype {entry.dtype} has no place in a safetensors file")
    return entries


def _shards(entries: list[_Entry], most: int) -> Iterator[list[_Entry]]:
    shard: list[_Entry] = []
    for entry in entries:
        if shard and sum(e.nbytes for e in shard) + entry.nbytes > most:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _file(checkpoint: Checkpoint, name: str, entries: list[_Entry], room: int) -> Output:
    ordered = sorted(entries, key=lambda e: (-item_size(e.dtype), e.fqn))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in ordered:
        stop = position + entry.nbytes
        tag, shape = stored_as(entry.dtype, entry.shape)
        header[entry.name] = {"dtype": tag, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8)
    head = struct.pack("<Q", len(text)) + text

    def pieces() -> Iterator[memoryview]:
        yield memoryview(head)
        wanted = (Stretch.whole(e.fqn, Box.whole(e.shape), e.dtype) for e in ordered)
        yield from (data for _, data in stream(checkpoint, wanted, room))

    def write(store: Store) -> Mapping[str, Any]:
        store.write(name, pieces(), size=len(head) + position)
        return {}

    return Output(name, len(head) + position, write)
