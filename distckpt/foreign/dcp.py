"""A directory of torch.distributed.checkpoint, described: no process group, none of torch's unpickling.

Records of tensors are located when they are first asked for, so that opening costs the index and the small values. The
nested dict is put together again from the paths that the planner left.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, KeyMissing
from distckpt.foreign import zstd
from distckpt.foreign.dcp_index import METADATA, Index, Place, TensorEntry, read_indexes
from distckpt.foreign.described import Chunk, Directory, Tensor, leaves
from distckpt.foreign.files import PlainFile
from distckpt.foreign.located import Located, Undecodable
from distckpt.foreign.torchfile import parse
from distckpt.format.dtype import item_size
from distckpt.format.objects import MAX_DEPTH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from distckpt.foreign.files import Readable
    from distckpt.format.box import Box


def is_dcp(folder: Path) -> bool:
    """Whether a directory has the index of a DCP checkpoint, or data that waits for one."""
    names = [p.name for p in folder.iterdir()]
    return METADATA in names or any(n.endswith((METADATA, ".distcp")) for n in names)


def read_dcp(folder: Path) -> Directory:
    """Describe a DCP directory. NotACheckpoint, FormatError, Corrupt, each with the key and the file."""
    indexes = read_indexes(folder)
    files = _Opened()
    index, own = merged(indexes, files)
    leaf: dict[str, Any] = {fqn: files.tensor(fqn, entry) for fqn, entry in index.tensors.items()}
    leaf |= {fqn: files.value(fqn, place) for fqn, place in index.values.items()} | own
    tree = nested(((index.paths[fqn], value) for fqn, value in leaf.items()), str(folder))
    return Directory(str(folder), tree, files.sources, homes=files.homes, index_bytes=sum(i.nbytes for i in indexes))


class _Opened:
    """Files of a directory, each opened once; a compressed record is a file of its own."""

    def __init__(self) -> None:
        self.sources: list[Readable] = []
        self.homes: list[int] = []
        self._index: dict[Any, int] = {}

    def _file(self, place: Place, fqn: str) -> int:
        """Index of the file that holds a record. Corrupt where it is gone or ends too early."""
        if place.path not in self._index:
            try:
                found = PlainFile(Path(place.path))
            except KeyMissing as e:
                raise Corrupt(f"{fqn}: {e}, though the index names it") from e
            self._add(place.path, found, len(set(self.homes)))
        index = self._index[place.path]
        if place.start + place.length > self.sources[index].size:
            raise Corrupt(
                f"{place.path}: has {self.sources[index].size} bytes; {fqn} is at {place.start} to "
                f"{place.start + place.length}: the file was cut short"
            )
        return index

    def _add(self, key: Any, file: Readable, home: int) -> None:
        self.homes.append(home)
        self._index[key] = len(self.sources)
        self.sources.append(file)

    def record(self, fqn: str, place: Place) -> tuple[int, int, int]:
        """(file, start, length) of a record, decompressed where it has to be."""
        raw = self._file(place, fqn)
        if not place.transforms:
            return raw, place.start, place.length
        if place not in self._index:
            what = f"{place.path}[{fqn} at {place.start}]"
            zstd.check(place.transforms, what)
            self._add(place, zstd.Inflated(self.sources[raw], place.start, place.length, what), self.homes[raw])
        index = self._index[place]
        return index, 0, self.sources[index].size

    def tensor(self, fqn: str, entry: TensorEntry) -> Tensor:
        """Tensor of the tree."""
        chunks = []
        for box, place in entry.chunks:
            file, start, length = self.record(fqn, place)
            if box.numel * item_size(entry.dtype) > length:
                raise Corrupt(
                    f"{place.path}: {fqn}: a record of {length} bytes cannot hold {entry.dtype} of shape "
                    f"{list(box.sizes)}"
                )
            chunks.append(Chunk(file, box, (start, length), self._locate(fqn, entry.dtype, box, (file, start, length))))
        return Tensor(entry.dtype, entry.shape, tuple(chunks))

    def _locate(self, fqn: str, dtype: str, box: Box, record: tuple[int, int, int]) -> Callable[[], Located]:
        file, start, length = record
        source = self.sources[file]

        def locate() -> Located:
            where = f"{source.name}: {fqn}"
            try:
                found = parse(source, start, length, where)
            except FormatError as e:
                raise Corrupt(str(e)) from e
            if not isinstance(found, Located) or (found.dtype, found.shape) != (dtype, box.sizes):
                has = f"{found.dtype} of shape {list(found.shape)}" if isinstance(found, Located) else "no tensor"
                raise Corrupt(f"{where}: the record holds {has}, the index says {dtype} of shape {list(box.sizes)}")
            return found

        return locate

    def value(self, fqn: str, place: Place) -> Any:
        """Value of the tree, with the tensors in it; Undecodable where it cannot be read safely."""
        try:
            file, start, length = self.record(fqn, place)
            return leaves(parse(self.sources[file], start, length, f"{place.path}: {fqn}"), file)
        except DistckptError as e:
            return Undecodable(str(e))


def merged(indexes: list[Index], files: _Opened) -> tuple[Index, dict[str, Undecodable]]:
    """One index of those of the ranks; and the keys under which each rank has a value of its own."""
    if len(indexes) == 1:
        return indexes[0], {}
    whole, own = Index(), dict[str, Undecodable]()
    for index in indexes:
        whole.paths |= index.paths
    for fqn in whole.paths:
        places = [index.values[fqn] for index in indexes if fqn in index.values]
        entries = [index.tensors[fqn] for index in indexes if fqn in index.tensors]
        if places and not entries and _agree([files.value(fqn, place) for place in places]):
            whole.values[fqn] = places[0]
        elif entries and not places and (entry := _joined(fqn, entries, files)):
            whole.tensors[fqn] = entry
        else:
            count = len(places) + len(entries)
            own[fqn] = Undecodable(f"{fqn}: {count} ranks saved it, each with a value of its own under this one key")
    return whole, own


def _agree(values: list[Any]) -> bool:
    return all(not isinstance(v, Undecodable) and v == values[0] for v in values)


def _joined(fqn: str, entries: list[TensorEntry], files: _Opened) -> TensorEntry | None:
    """Tensor of which several ranks saved chunks; None where they contradict each other."""
    first = entries[0]
    if any((e.dtype, e.shape) != (first.dtype, first.shape) for e in entries):
        return None
    places: dict[Box, Place] = {}
    sums: dict[Box, int] = {}
    for box, place in (chunk for entry in entries for chunk in entry.chunks):
        if box in places:  # a replica: told by its CRC-32 from a value that each rank has of its own
            for known in (places[box], place):
                single = TensorEntry(first.dtype, first.shape, ((box, known),))
                record = files.tensor(fqn, single).chunks[0].locate().record
                if record is None or sums.setdefault(box, record.crc) != record.crc:
                    return None
        places.setdefault(box, place)
    return TensorEntry(first.dtype, first.shape, tuple(places.items()))


# -- the nested dict -------------------------------------------------------------------------------------------------


class _Node(dict[str | int, Any]):
    """A dict or list that is being put together: told from the values, which may be dicts themselves."""


def nested(leaves: Iterable[tuple[tuple[str | int, ...], Any]], where: str) -> dict[Any, Any]:
    """Nested dicts and lists with these values at these paths; an int is the index in a list."""
    root = _Node()
    for path, value in leaves:
        at = root
        for key in path[:-1]:
            at = at.setdefault(key, _Node())
            if type(at) is not _Node:
                raise FormatError(f"{where}: {path} leads through a value")
        if path[-1] in at:
            raise FormatError(f"{where}: two entries have the path {path}")
        at[path[-1]] = value
    return {key: _finished(value, where, 0) for key, value in root.items()}


def _finished(value: Any, where: str, depth: int) -> Any:
    if type(value) is not _Node:
        return value
    if depth > MAX_DEPTH:
        raise FormatError(f"{where}: nested more than {MAX_DEPTH} deep")
    members = {key: _finished(member, where, depth + 1) for key, member in value.items()}
    if all(type(key) is int for key in members):
        if sorted(members) != list(range(len(members))):
            raise FormatError(f"{where}: the members of a list are {sorted(members)[:10]}")
        return [members[i] for i in range(len(members))]
    return _whole_optimizer({str(key): member for key, member in members.items()})


def _whole_optimizer(value: dict[str, Any]) -> dict[str, Any]:
    """Put back what DCP loses of an optimizer's dict: an empty `state`, and parameters that are numbers."""
    groups = value.get("param_groups")
    if not isinstance(groups, list) or not value.keys() <= {"state", "param_groups"}:
        return value
    state = value.get("state", {})
    named = [p for g in groups if isinstance(g, dict) and isinstance(g.get("params"), list) for p in g["params"]]
    if isinstance(state, dict) and named and all(type(p) is int for p in named):
        state = {int(key) if key.isdecimal() else key: member for key, member in state.items()}
    return {"state": state, "param_groups": groups}
