"""A checkpoint written out as a DCP directory: what dcp.save would have written of the same nested dict.

Streamed: chunk after chunk passes through one small buffer, whatever its size. `.metadata` is written last, when every
file is durable: without it there is no checkpoint.
"""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from distckpt.errors import RunConflict
from distckpt.foreign.emit import Call, Global, Instance, Pairs, TensorRecord, pickled
from distckpt.foreign.paths import entries_of
from distckpt.foreign.sink import Output, Sink, lost, refuse_empty
from distckpt.format.box import Box, parts
from distckpt.loading.stream import ROOM, Stretch, stream, whole
from distckpt.statedict import insert, references
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from distckpt.foreign.paths import TreePath
    from distckpt.format.box import Shape
    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint

METADATA = ".metadata"
_VERSION = "1.0.0"
_MODULE = "torch.distributed.checkpoint.metadata"
_FILES = "torch.distributed.checkpoint.filesystem"


class Folder(LocalStore):
    """A directory in which names may be written that are no keys: DCP's index, which is hidden, and one more."""

    def __init__(self, root: str | os.PathLike[str], *, also: str = METADATA) -> None:
        super().__init__(root)
        self._names = {METADATA, also}

    def _path(self, key: str, *, prefix: bool = False) -> Path:
        return self.root / key if key in self._names else super()._path(key, prefix=prefix)


@dataclass(frozen=True, slots=True)
class _Record:
    """A record of a file: a chunk of a tensor, or the content of a value."""

    fqn: str
    box: Box | None
    size: int
    head: bytes
    tensor: TensorRecord | None = None
    source: Stretch | None = None


@dataclass(slots=True)
class _Written:
    """The index as it grows: what every record is, and where it went."""

    entries: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, TreePath] = field(default_factory=dict)
    places: dict[tuple[str, Shape | None], tuple[str, int, int]] = field(default_factory=dict)


def write_dcp(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> list[str]:
    """Write a checkpoint as a DCP directory; returns notes of what DCP has no place for. Every byte read is verified.

    RunConflict where the directory holds a checkpoint already.
    """
    store = Folder(folder)
    if (store.root / METADATA).exists():
        raise RunConflict(f"{store.root}: holds a DCP checkpoint already; give a new directory")
    sink = dcp_sink(checkpoint)
    for name, data in sink.finish({output.name: output.write(store) for output in sink.outputs}):
        write_all(store, name, data)
    return sink.notes


def dcp_sink(checkpoint: Checkpoint, room: int = ROOM) -> Sink:
    """Plan the files of a DCP directory. NotACheckpoint where there is nothing to write."""
    content = checkpoint.manifest
    refuse_empty(checkpoint)
    written = _Written()
    tensors, values = entries_of(checkpoint)
    by_file = _tensor_records(checkpoint, tensors, written)
    by_file.setdefault(0, [])[:0] = _value_records(checkpoint, values, written)
    outputs = []
    for number, (_, records) in enumerate(sorted(by_file.items())):
        name, position = f"__{number}_0.distcp", 0
        for record in records:
            offset = record.box.offsets if record.box else None
            written.places[record.fqn, offset] = (name, position, record.size)
            position += record.size
        outputs.append(_output(checkpoint, name, position, records, room))
    for alias, fqn in content.aliases.items():
        _add_alias(written, alias, fqn)
    index = pickled(_metadata(written))
    return Sink(outputs, lambda _: [(METADATA, index)], lost(checkpoint))


def _output(checkpoint: Checkpoint, name: str, size: int, records: list[_Record], room: int) -> Output:
    return Output(name, size, lambda store: store.write(name, _content(checkpoint, records, room), size=size))


# -- what goes where ---------------------------------------------------------------------------------------------


def _key(path: TreePath) -> str:
    return ".".join(map(str, path))


def _tensor_records(checkpoint: Checkpoint, paths: dict[str, TreePath], written: _Written) -> dict[int, list[_Record]]:
    """Records of the tensors, by the file that their chunks come from, in its order."""
    found: dict[int, list[_Record]] = {}
    for fqn, path in paths.items():
        info = checkpoint.manifest.tensors[fqn]
        key = _key(path)
        written.paths[key] = path
        boxes = []
        for file, box, stretch in _chunks(fqn, info):
            record = TensorRecord(info.dtype, box.sizes)
            made = _Record(key, box, record.size, record.head, record, stretch if box.numel else None)
            found.setdefault(file, []).append(made)
            boxes.append(box)
        written.entries[key] = _tensor_entry(info, boxes)
    return found


def _chunks(fqn: str, info: TensorInfo) -> Iterator[tuple[int, Box, Stretch]]:
    """Boxes that make up a tensor, and what of which chunk fills each: a flat run is cut into several."""
    whole = Box.whole(info.shape)
    if not whole.numel:
        yield 0, whole, Stretch.whole(fqn, whole, info.dtype)
        return
    for file, region in info.partition.overlapping(whole):
        for part in parts(region, info.shape):
            yield file, part.box, Stretch.whole(fqn, part.box, info.dtype)


def _value_records(checkpoint: Checkpoint, values: dict[TreePath, Any], written: _Written) -> Iterator[_Record]:
    """Records of the values, each as torch.save writes it."""
    for path, value in values.items():
        key = _key(path)
        written.paths[key] = path
        written.entries[key] = Instance(Global(_MODULE, "BytesStorageMetadata"), {})
        buffer = io.BytesIO()
        torch.save(insert(value, _tensors_in(checkpoint, value)), buffer)
        yield _Record(key, None, buffer.tell(), buffer.getvalue())


def _tensors_in(checkpoint: Checkpoint, value: Any) -> dict[str, torch.Tensor]:
    """Tensors that a value has inside where DCP looks for none (a tuple): read into memory."""
    return {fqn: whole(checkpoint, fqn) for fqn in references(value)}


def _add_alias(written: _Written, alias: str, fqn: str) -> None:
    """Enter a tied parameter under its other name: the same records."""
    lead, _, rest = alias.partition(".")
    first, key = _key(tuple(fqn.split(".", 1))), _key((lead, rest))
    written.paths[key] = (lead, rest)
    written.entries[key] = written.entries[first]
    written.places |= {(key, offset): place for (name, offset), place in written.places.items() if name == first}


# -- content -----------------------------------------------------------------------------------------------------


def _content(checkpoint: Checkpoint, records: list[_Record], room: int) -> Iterator[memoryview]:
    """Bytes of a file, in order."""
    pieces = stream(checkpoint, (r.source for r in records if r.source), room)
    at, index = next(pieces, None), 0
    for record in records:
        yield memoryview(record.head)
        crc = 0
        while record.source and at and at[0] == index:
            crc = zlib.crc32(at[1], crc)
            yield at[1]
            at = next(pieces, None)
        index += record.source is not None
        if record.tensor:
            yield memoryview(record.tensor.tail(crc))


# -- the index -----------------------------------------------------------------------------------------------------


def _size(numbers: Shape) -> Call:
    return Call(Global("torch", "Size"), (tuple(numbers),))


def _tensor_entry(info: TensorInfo, boxes: list[Box]) -> Instance:
    layout = Call(Global("torch.serialization", "_get_layout"), ("torch.strided",))
    memory_format = Call(Global(_MODULE, "_MEM_FORMAT_ENCODING"), (0,))
    state = (Global("torch", info.dtype), layout, False, memory_format, False)
    chunks = [
        Instance(Global(_MODULE, "ChunkStorageMetadata"), {"offsets": _size(b.offsets), "sizes": _size(b.sizes)})
        for b in boxes
    ]
    members = {
        "properties": Instance(Global(_MODULE, "TensorProperties"), state),
        "size": _size(info.shape),
        "chunks": chunks,
    }
    return Instance(Global(_MODULE, "TensorStorageMetadata"), members)


def _metadata(written: _Written) -> Instance:
    places = Pairs(
        (_index(fqn, offset), Instance(Global(_FILES, "_StorageInfo"), dict(zip(_PLACE, place, strict=True))))
        for (fqn, offset), place in written.places.items()
    )
    members = {
        "state_dict_metadata": written.entries,
        "planner_data": written.paths,
        "storage_data": places,
        "storage_meta": None,
        "version": _VERSION,
    }
    return Instance(Global(_MODULE, "Metadata"), members)


_PLACE = ("relative_path", "offset", "length")


def _index(fqn: str, offset: Shape | None) -> Instance:
    members = {"fqn": fqn, "index": None, "offset": None if offset is None else _size(offset)}
    return Instance(Global(_MODULE, "MetadataIndex"), members)
