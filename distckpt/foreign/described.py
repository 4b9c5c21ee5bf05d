"""A tree of located tensors and plain values as a Checkpoint: what load() reads like one of ours.

What such a source lacks: checksums that cover a part (`verify` reads whole records and checks the zip's CRC-32), and
values of each rank. Values that could not be read safely are `unreadable`: an error only for who wants them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, KeyMissing, KeyTruncated, Unsupported
from distckpt.foreign.files import Files
from distckpt.foreign.leads import arranged, gathered
from distckpt.foreign.located import Located, Undecodable
from distckpt.format.box import Box
from distckpt.format.layout import StepDir, chunk_name, fqn_of
from distckpt.format.manifest import Manifest, ObjectInfo, TensorInfo
from distckpt.format.partition import Pieces
from distckpt.loading.open import Checkpoint, DataFile
from distckpt.statedict import canonical, rebuilt

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

    from distckpt.foreign.files import Readable
    from distckpt.format.box import Region, Shape
    from distckpt.format.datafile import Stored
    from distckpt.loading.plan import Item

OWN_FORMS = ("rng", "environment", "dataloader")
"""Objects whose form is this library's own: what another tool saved under such a name is something else."""

_PIECE = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A region of a tensor in a file. `at` tells chunks apart: equal ones are the same bytes."""

    file: int
    box: Region
    at: Hashable
    locate: Callable[[], Located]


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A leaf of a tree: one global tensor, and where its chunks are."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def identity(self) -> Hashable:
        """Equal for tensors that are the same bytes."""
        return self.dtype, self.shape, tuple((c.file, c.box, c.at) for c in self.chunks)


def kind_of(value: Any) -> str | None:
    """What statedict asks: whether a value counts as a tensor."""
    return "torch" if isinstance(value, Tensor) else None


@dataclass(slots=True)
class Directory:
    """What a format found: a nested tree, its files by index, and whether its records carry a CRC-32."""

    path: str
    tree: dict[Any, Any]
    files: Sequence[Readable]
    has_sums: bool = True
    homes: Sequence[int] = ()
    """Which of several files each belongs to, where some are no files of their own."""
    step: int = 0
    index_bytes: int = 0
    """Bytes of the files that were read to know all this."""
    notes: Sequence[str] = ()
    """What whoever loads it must know."""


def describe(
    found: Directory,
    names: Mapping[str, str] | None = None,
    like: Mapping[Any, Any] | None = None,
    rest: str | None = None,
) -> Described:
    """Checkpoint over a directory. FormatError, with the fqn, for chunks that do not make up their tensor.

    `names`: entry of the tree -> lead (`model`, `optim`, ...), where they are not the usual ones. `like`: the state
    dict that is to be loaded, whose entries are called what they are called there. `rest`: lead for what is of no part
    of the training state.
    """
    tree = gathered(found.tree, rest) if rest else found.tree
    named = canonical(arranged(tree, names or {}, kind_of, like), kind_of)
    aliases = _ties(named.tensors)
    tensors: dict[str, TensorInfo] = {}
    chunks: list[dict[str, Chunk]] = [{} for _ in found.files]
    for fqn, tensor in named.tensors.items():
        if fqn in aliases:
            continue
        pieces = Pieces(tensor.shape, tuple((c.file, c.box) for c in tensor.chunks))
        try:
            pieces.check()
        except FormatError as e:
            raise FormatError(f"{found.path}: {fqn}: its chunks do not make up the tensor: {e}") from e
        tensors[fqn] = TensorInfo(tensor.shape, tensor.dtype, pieces)
        for chunk in tensor.chunks:
            chunks[chunk.file][chunk_name(fqn, chunk.box, tensor.shape)] = chunk
    unreadable, objects = dict[str, str](), dict[str, Any]()
    for name, value in named.objects.items():
        own = like is None and name in OWN_FORMS
        why = "another tool's, of a form of its own" if own else _first_undecodable(value)
        if why:
            unreadable[name] = why
        else:
            objects[name] = value
    content = Manifest(
        step=found.step,
        generation=1,
        launch=0,
        attempt="",
        date="",
        world_size=max(1, len(set(found.homes) or found.files)),
        tensors=tensors,
        files=(),
        objects={name: ObjectInfo("", 0, "") for name in objects},
        aliases=aliases,
    )
    return Described(found, content, chunks, objects, unreadable)


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Other names of tied parameters. Optimizer states that share bytes stay states of their own."""
    first: dict[Hashable, str] = {}
    found = {}
    for fqn, tensor in tensors.items():
        if fqn.startswith("model.") and prod(tensor.shape) > 0:
            owner = first.setdefault(tensor.identity, fqn)
            if owner != fqn:
                found[fqn] = owner
    return found


def _first_undecodable(value: Any) -> str:
    """Why a tree cannot be read, "" where it can."""
    if isinstance(value, Undecodable):
        return value.why
    reasons: list[str] = []

    def visit(member: Any, _key: Any) -> Any:
        if why := _first_undecodable(member):
            reasons.append(why)
        return member

    rebuilt(value, visit)
    return reasons[0] if reasons else ""


class _Entries(Mapping[str, "Stored"]):
    """Entries of one file, each located when it is first asked for."""

    def __init__(self, chunks: Mapping[str, Chunk]) -> None:
        self._chunks = chunks
        self._located: dict[str, Located] = {}

    def located(self, name: str) -> Located:
        """Where a chunk lies. KeyError where there is none of this name."""
        if name not in self._located:
            self._located[name] = self._chunks[name].locate()
        return self._located[name]

    def __getitem__(self, name: str) -> Stored:
        return self.located(name).stored()

    def __iter__(self) -> Iterator[str]:
        return iter(self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)


class Described(Checkpoint):
    """Files of another tool as a checkpoint."""

    def __init__(
        self,
        found: Directory,
        content: Manifest,
        chunks: Sequence[Mapping[str, Chunk]],
        objects: Mapping[str, Any],
        unreadable: Mapping[str, str],
    ) -> None:
        self._all_files = Files(found.files)
        super().__init__(self._all_files, StepDir(0), content)
        self.name = found.path
        self.unreadable = unreadable
        self.notes = found.notes
        self.foreign = True
        self._has_sums, self._homes, self._index_bytes = found.has_sums, found.homes, found.index_bytes
        self._entries = [_Entries(c) for c in chunks]
        self.sources: Sequence[Readable] = found.files
        self._objects = objects
        self._verified: set[tuple[int, str]] = set()

    @property
    def bytes_read(self) -> int:
        """See Checkpoint.bytes_read."""
        return self._index_bytes + self._all_files.read_count

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Checkpoint.read."""
        try:
            self._all_files.read(key, start, buffers)
        except (KeyMissing, KeyTruncated) as e:
            raise Corrupt(f"{self.name}: {e}") from e

    def _opened(self, index: int) -> DataFile:
        """Open a file: its chunks are located when they are asked for."""
        source = self.sources[index]
        return DataFile(source.name, self._entries[index], None, source.size, source.sequential)

    def object(self, name: str) -> Any:
        """See Checkpoint.object."""
        return self._objects[name]

    def rank_objects(self, rank: int) -> dict[str, Any]:  # noqa: ARG002
        """See Checkpoint.rank_objects: there are none."""
        return {}

    def verify(self, chunks: Iterable[tuple[int, str]]) -> None:
        """Read the records that hold these chunks whole, once, and compare each one's CRC-32. Corrupt."""
        if not self._has_sums:
            raise Unsupported(
                f"{self.name}: safetensors files carry no checksums, nor does torch.save's old form, so there is "
                "nothing to verify them against: load without verify=True"
            )
        checked = set()
        for file, name in chunks:
            record = self._entries[file].located(name).record
            self._verified.add((file, name))
            if record is None or (file, record) in checked:
                continue
            checked.add((file, record))
            source = self.sources[file]
            stop = record.start + record.nbytes
            if _crc(source, record.start, record.nbytes) != record.crc:
                raise Corrupt(
                    f"{source.name}: {fqn_of(name)}: bytes {record.start} to {stop} do not match the CRC-32 of their "
                    "record"
                )

    def unverified(self, items: Iterable[Item]) -> list[str]:
        """See Checkpoint.unverified."""
        return sorted({item.fqn for item in items if (item.file, item.name) not in self._verified})

    def home(self, file: int) -> int:
        """See Checkpoint.home."""
        return self._homes[file] if self._homes else file

    def same(self, a: str, b: str) -> bool:
        """See Checkpoint.same: told by the CRC-32 of equal chunks, else by their bytes."""
        one, other = self.manifest.tensors[a], self.manifest.tensors[b]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        mine, theirs = ({box: file for file, box in t.partition.overlapping(Box.whole(t.shape))} for t in (one, other))
        return mine.keys() == theirs.keys() and all(
            self._sum(mine[box], chunk_name(a, box, one.shape)) == self._sum(theirs[box], chunk_name(b, box, one.shape))
            for box in mine
        )

    def _sum(self, file: int, name: str) -> Hashable:
        """What tells the content of a chunk: its strides and a CRC-32."""
        located = self._entries[file].located(name)
        record = located.record
        if record and (record.start, record.nbytes) == (located.start, located.nbytes):
            return located.strides, record.crc
        if located.strides is not None:
            return file, located.start, located.strides
        return None, _crc(self.sources[file], located.start, located.nbytes)


def _crc(file: Readable, start: int, count: int) -> int:
    """CRC-32 of part of a file, read in pieces."""
    crc = 0
    buffer = memoryview(bytearray(min(_PIECE, count)))
    while count:
        piece = buffer[: min(len(buffer), count)]
        file.read(start, [piece])
        crc = zlib.crc32(piece, crc)
        start += len(piece)
        count -= len(piece)
    return crc


def whole(file: int, located: Located) -> Tensor:
    """Tensor that is one chunk of a file, located already."""
    at = (located.start, located.strides)
    return Tensor(located.dtype, located.shape, (Chunk(file, Box.whole(located.shape), at, lambda: located),))


def leaves(tree: Any, file: int) -> Any:
    """Tree with each Located tensor as a Tensor of this file."""
    if isinstance(tree, Located):
        return whole(file, tree)
    return rebuilt(tree, lambda member, _key: leaves(member, file))
