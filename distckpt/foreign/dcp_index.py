"""The index of a DCP directory: `.metadata`, or one `__R.metadata` of each rank, as plain values.

Names that every later step trusts are made here: numbers are numbers, paths stay in the directory, and what several
ranks saved under one key is either the same tensor, or each rank's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, NotACheckpoint
from distckpt.foreign.files import PlainFile, inside, read_bytes
from distckpt.foreign.pickles import INDEX, Dtype, Stub, unpickle
from distckpt.format.box import Box
from distckpt.format.dtype import ITEM_SIZE
from distckpt.format.manifest import MAX_BYTES, MAX_DIMS
from distckpt.format.text import shown

if TYPE_CHECKING:
    from pathlib import Path

    from distckpt.format.box import Shape

METADATA = ".metadata"
_OF_RANK = re.compile(r"__([0-9]+)\.metadata")


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file that hold one record, and how they were transformed when written (`stream.zstd/1`)."""

    path: str
    start: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor: dtype, global shape, and its chunks, each with the place of its record."""

    dtype: str
    shape: Shape
    chunks: tuple[tuple[Box, Place], ...]


@dataclass(slots=True)
class Index:
    """What `.metadata` says: by key its path in the nested dict, and a tensor or the place of a value."""

    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    values: dict[str, Place] = field(default_factory=dict)
    nbytes: int = 0
    """Bytes read to know it."""


def read_indexes(folder: Path) -> list[Index]:
    """Return the index, or those of the ranks in their order where each rank wrote its own.

    NotACheckpoint where there is none, FormatError for one that cannot be believed.
    """
    if (folder / METADATA).is_file():
        return [_read(folder / METADATA)]
    ranks = {int(m[1]): p for p in folder.iterdir() if (m := _OF_RANK.fullmatch(p.name))}
    if not ranks:
        raise NotACheckpoint(f"{folder}: has .distcp files but no {METADATA}: a dcp.save that did not finish")
    if missing := sorted(set(range(max(ranks) + 1)) - ranks.keys()):
        raise NotACheckpoint(f"{folder}: ranks {missing[:10]} have no __R{METADATA}, ranks up to {max(ranks)} do")
    return [_read(ranks[rank]) for rank in sorted(ranks)]


def _read(path: Path) -> Index:
    file = PlainFile(path)
    if file.size > MAX_BYTES:
        raise FormatError(f"{path}: {file.size} bytes; at most {MAX_BYTES} are read")
    found = unpickle(read_bytes(file, 0, file.size), str(path), INDEX)
    index = _Reader(path).index(found)
    index.nbytes = file.size
    return index


class _Reader:
    """From the unpickled stand-ins to an Index, everything checked."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[tuple[str, Shape | None], Place] = {}
        self._files: dict[Any, str] = {}

    def index(self, found: Any) -> Index:
        """Index in an unpickled `.metadata`."""
        entries, places = self._member(found, "state_dict_metadata"), self._member(found, "storage_data")
        paths = found.get("planner_data") or {}
        for key, info in places.items():
            fqn, offset = self._name(key), self._member(key, "offset", None)
            self._places[fqn, self._numbers(offset, fqn) if offset is not None else None] = self._place(info, fqn)
        index = Index()
        for fqn, entry in entries.items():
            if type(fqn) is not str or not isinstance(entry, Stub):
                raise self._wrong(f"entry {shown(fqn)}")
            index.paths[fqn] = self._tree_path(paths.get(fqn) if isinstance(paths, dict) else None, fqn)
            if type(entry).__name__ == "BytesStorageMetadata":
                index.values[fqn] = self._at(fqn, None)
            else:
                index.tensors[fqn] = self._tensor(fqn, entry)
        return index

    def _tensor(self, fqn: str, entry: Stub) -> TensorEntry:
        properties = self._member(entry, "properties", None)
        state = getattr(properties, "state", None)
        dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype") if properties else None
        if not isinstance(dtype, Dtype) or dtype not in ITEM_SIZE:
            raise self._wrong(f"dtype {shown(dtype)} of {fqn}")
        shape = self._numbers(self._member(entry, "size", None), fqn)
        boxes: dict[Box, None] = {}
        for chunk in self._member(entry, "chunks", list):
            offsets, sizes = (self._numbers(self._member(chunk, n, None), fqn) for n in ("offsets", "sizes"))
            if not len(offsets) == len(sizes) == len(shape):
                raise self._wrong(f"a chunk of {fqn}: offsets {offsets}, sizes {sizes} of a tensor of shape {shape}")
            boxes[Box(offsets, sizes)] = None
        return TensorEntry(str(dtype), shape, tuple((box, self._at(fqn, box.offsets)) for box in boxes))

    def _at(self, fqn: str, offset: Shape | None) -> Place:
        place = self._places.get((fqn, offset))
        if place is None:
            where = f"its chunk at {list(offset)}" if offset is not None else "its value"
            raise FormatError(f"{self._path}: {fqn}: the index does not say where {where} is stored")
        return place

    def _place(self, info: Any, fqn: str) -> Place:
        path = self._file(self._member(info, "relative_path", None), fqn)
        start, length = self._member(info, "offset", None), self._member(info, "length", None)
        transforms = info.get("transform_descriptors") or ()
        if not all(type(n) is int and n >= 0 for n in (start, length)) or not all(type(t) is str for t in transforms):
            raise self._wrong(f"the place of {fqn}: {shown((start, length, transforms))}")
        return Place(path, start, length, tuple(transforms))

    def _file(self, name: Any, fqn: str) -> str:
        found = self._files.get(name) if type(name) is str else None
        if found is None:
            found = self._files[name] = str(inside(self._path.parent, name, f"{self._path}: {fqn}"))
        return found

    def _tree_path(self, path: Any, fqn: str) -> tuple[str | int, ...]:
        if path is None:
            return (fqn,)
        if not isinstance(path, tuple) or not path or not all(type(p) in {str, int} for p in path):
            raise self._wrong(f"the path of {fqn}: {shown(path)}")
        return path

    def _name(self, key: Any) -> str:
        fqn = self._member(key, "fqn", None)
        if type(fqn) is not str:
            raise self._wrong(f"key {shown(fqn)}")
        return fqn

    def _numbers(self, value: Any, fqn: str) -> Shape:
        if (
            not isinstance(value, (tuple, list))
            or len(value) > MAX_DIMS
            or not all(type(n) is int and n >= 0 for n in value)
        ):
            raise self._wrong(f"sizes or offsets {shown(value)} of {fqn}")
        return tuple(value)

    def _member(self, found: Any, name: str, kind: type | None = dict) -> Any:
        value = found.get(name) if isinstance(found, Stub) else self._wrong
        if value is self._wrong or (kind is not None and not isinstance(value, kind)):
            raise self._wrong(f"{name} of {shown(found)}")
        return value

    def _wrong(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what} is not as torch.distributed.checkpoint writes it")
