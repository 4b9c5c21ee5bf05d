"""An opened checkpoint: its manifest, and the headers, tables and objects of its files, verified when first read."""

from __future__ import annotations

import bisect
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from distckpt.errors import Corrupt, FormatError, KeyMissing, KeyTruncated, NotACheckpoint
from distckpt.format import datafile, manifest, objects
from distckpt.format.checksum import BLOCK, algorithm_of, matches
from distckpt.format.layout import CHECKSUMS_CHUNK, COMMIT, OBJECTS_CHUNK, StepDir, fqn_of
from distckpt.signing import trusted
from distckpt.store.base import Copied, Pace, each, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import torch

    from distckpt.format.checksum import Algorithm
    from distckpt.format.datafile import Stored, Table
    from distckpt.format.manifest import FileInfo, Manifest, ObjectInfo
    from distckpt.loading.plan import Item
    from distckpt.store.base import Store


_PAGE = 4096
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file whose header and checksum table have been verified; or (table None) a file of another tool.

    `covered`: bytes that the table sums. `grain`: bytes that a read is rounded to: what can be verified alone.
    `sequential`: its reads are to come one at a time, in order.
    """

    key: str
    chunks: Mapping[str, Stored]
    table: Table | None
    covered: int
    sequential: bool = False

    @property
    def grain(self) -> int:
        """Bytes that a read is rounded to."""
        if self.table is not None:
            return BLOCK
        return 1 if self.sequential else _PAGE  # a stream must not be asked again for the end of a page

    def verify(self, first: int, pieces: list[list[memoryview]]) -> None:
        """Check blocks `first`, `first + 1`, ..., each given as its pieces in order. Corrupt, with the fqns."""
        if self.table is None:
            return
        for i, block in enumerate(pieces):
            if not self.table.holds(first + i, block):
                start, stop = (first + i) * BLOCK, min((first + i + 1) * BLOCK, self.covered)
                raise Corrupt(
                    f"{self.key}: bytes {start} to {stop} do not match their checksum; they hold "
                    f"{_shown(self.names(start, stop))}"
                )

    def names(self, start: int, stop: int) -> list[str]:
        """Fqns with bytes in [start, stop)."""
        return [fqn_of(n) for n, c in self.chunks.items() if c.start < stop and c.stop > start] or ["the header"]


class Readable(Protocol):
    """What a checkpoint needs of a store. See Store."""

    pace: Pace

    def head(self, key: str) -> int:
        """Bytes of a key."""
        ...

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers in order from byte `start` on."""
        ...


def or_other_copy(store: object, key: str, attempt: Callable[[], T]) -> T:
    """Do what reads and verifies a key; once more with another copy of it, if the first is damaged and there is one."""
    try:
        return attempt()
    except (Corrupt, FormatError):
        if not (isinstance(store, Copied) and store.distrust(key)):
            raise
        return attempt()


@dataclass(frozen=True, slots=True)
class Computed:
    """A tensor that no file holds: the (checkpoint, fqn) that it is made of, and who makes it."""

    reads: tuple[tuple[Checkpoint, str], ...]
    make: Callable[[], torch.Tensor]


class Checkpoint:
    """One committed checkpoint; `name` is what messages call it."""

    def __init__(self, store: Readable, directory: StepDir, content: Manifest) -> None:
        self.store, self.directory, self.manifest = store, directory, content
        self.pace = store.pace
        self.name = str(directory)
        self.foreign = False
        """Whether it is of another tool: such a one has no values of ranks, environment or generators."""
        self.unreadable: Mapping[str, str] = {}
        """Objects that are there and cannot be read safely, with the reason. Not in the manifest."""
        self.notes: Sequence[str] = ()
        """What whoever loads it must know: each load reports them."""
        self.sources: Sequence[Any] = ()
        """Files of another tool that it is made of."""
        self._bytes_read = 0
        self._files: dict[int, DataFile] = {}
        self._lock = threading.Lock()

    @property
    def base(self) -> Checkpoint:
        """Checkpoint whose files hold the data: this one, unless it is a view of another."""
        return self

    def saved_name(self, fqn: str) -> str:
        """Name of a tensor in `base`."""
        return fqn

    def computed(self, fqn: str) -> Computed | None:  # noqa: ARG002
        """How a tensor is made that is not read from `base`: of a view."""
        return None

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read of it."""
        return self._bytes_read

    def data_file(self, index: int) -> DataFile:
        """Data file of this index in the manifest's table. Corrupt unless header and table are as the commit says."""
        if index not in self._files:
            self._files[index] = self._opened(index)
        return self._files[index]

    def open_files(self, indices: Iterable[int]) -> None:
        """Open data files, several at once where each has to be asked for. Errors as of `data_file`."""
        if self.store.pace.gap:
            each(self.store.pace, self.data_file, [index for index in indices if index not in self._files])

    def verify(self, chunks: Iterable[tuple[int, str]]) -> None:
        """Check what holds these chunks (file, name) before anything moves, where reading does not. Here it does."""

    def unverified(self, items: Iterable[Item]) -> list[str]:  # noqa: ARG002
        """Fqns whose bytes no checksum has borne out. Here there are none."""
        return []

    def home(self, file: int) -> int:
        """File that a copy is to put the chunks of this one in."""
        return file

    def same(self, a: str, b: str) -> bool:  # noqa: ARG002
        """Whether two saved tensors are known to be equal. Here tied ones are one, and its aliases."""
        return False

    def _opened(self, index: int) -> DataFile:
        info = self.manifest.files[index]
        key = info.name if "/" in info.name else f"{self.directory}/{info.name}"
        return or_other_copy(self.store, key, lambda: opened(self, key, info))

    def head(self, key: str) -> int:
        """Store.head; what is gone is Corrupt."""
        try:
            return self.store.head(key)
        except KeyMissing as e:
            raise Corrupt(f"{self.directory} is committed, but {e}") from e

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Store.read, counted; what is gone or cut short is Corrupt."""
        try:
            self.store.read(key, start, buffers)
        except (KeyMissing, KeyTruncated) as e:
            raise Corrupt(f"{self.directory} is committed, but {e}") from e
        with self._lock:
            self._bytes_read += sum(map(len, buffers))

    def read_verified(self, file: DataFile, first: int, buffers: list[memoryview]) -> None:
        """Fill the buffers with the blocks of a data file from number `first` on. Corrupt, with the fqns."""

        def attempt() -> None:
            self.read(file.key, first * file.grain, buffers)
            file.verify(first, list(blocks(buffers)))

        or_other_copy(self.store, file.key, attempt)

    def object(self, name: str) -> Any:
        """Rank-independent object of this name, verified."""
        info = self.manifest.objects[name]
        key = f"{self.directory}/{info.name}"
        return or_other_copy(self.store, key, lambda: self._read_object(key, name, info))

    def _read_object(self, key: str, name: str, info: ObjectInfo) -> Any:
        (data,) = _parts(self, key, info.size, (0, info.size))
        if not matches(info.digest, data):
            raise Corrupt(f"{key}: object {name} does not match the commit's digest")
        return _decoded(key, data)

    def rank_objects(self, rank: int) -> dict[str, Any]:
        """Objects that this rank of the saved world kept for itself, verified."""
        file = self.data_file(rank)
        chunk = file.chunks[OBJECTS_CHUNK]
        first, last = chunk.start // BLOCK, -(-chunk.stop // BLOCK)
        data = bytearray(min(last * BLOCK, file.covered) - first * BLOCK)
        view = memoryview(data)
        self.read_verified(file, first, [view])
        found = _decoded(file.key, view[chunk.start - first * BLOCK : chunk.stop - first * BLOCK])
        if not isinstance(found, dict):
            raise Corrupt(f"{file.key}: {OBJECTS_CHUNK} is not a JSON object")
        return found


def blocks(buffers: list[memoryview]) -> Iterator[list[memoryview]]:
    """Cut consecutive buffers into blocks, each the list of its pieces."""
    block: list[memoryview] = []
    room = BLOCK
    for buffer in buffers:
        position = 0
        while position < len(buffer):
            piece = buffer[position : position + room]
            block.append(piece)
            position += len(piece)
            room -= len(piece)
            if not room:
                yield block
                block, room = [], BLOCK
    if block:
        yield block


def _decoded(key: str, data: memoryview) -> Any:
    try:
        return objects.decode(data)
    except FormatError as e:
        raise Corrupt(f"{key}: {e}") from e


def _measure(source: Readable, key: str, size: int) -> None:
    if (found := source.head(key)) != size:
        raise Corrupt(f"{key}: has {found} bytes, the commit says {size}")


def _covered(size: int, algorithm: Algorithm) -> int:
    """Bytes before the checksum table of a file of `size` bytes: the table's length follows from it."""
    table_size = partial(datafile.table_size, algorithm=algorithm)
    count = bisect.bisect_left(range(size // BLOCK + 2), size, key=lambda b: b * BLOCK + table_size(b * BLOCK))
    covered = size - table_size(count * BLOCK)
    if covered < 0 or covered + table_size(covered) != size:
        raise FormatError(f"no data file has {size} bytes")
    return covered


def _parts(source: Readable, key: str, size: int, *ends: tuple[int, int]) -> list[memoryview]:
    """Bytes of a key from each start to each stop. Corrupt unless it has `size` bytes.

    That is asked before memory is taken for them, but at the same time where asking takes long.
    """
    asked: list[Callable[[], Any]] = [partial(_measure, source, key, size)]
    asked += [partial(_part, source, key, start, stop) for start, stop in ends]
    return each(source.pace, lambda ask: ask(), asked)[1:]


def _part(source: Readable, key: str, start: int, stop: int) -> memoryview:
    data = memoryview(bytearray(stop - start))
    source.read(key, start, [data])
    return data


def opened(source: Readable, key: str, info: FileInfo) -> DataFile:
    """Data file of this key. Corrupt unless header and table are as `info` says."""
    algorithm = algorithm_of(info.digest)
    assert algorithm is not None
    covered = _covered(info.size, algorithm)
    header, table = _parts(source, key, info.size, (0, info.header), (covered, info.size))
    if not matches(info.digest, header, table):
        raise Corrupt(f"{key}: its header or checksum table does not match the commit's digest")
    try:
        chunks = datafile.decode_header(bytes(header), info.size)
        if chunks[CHECKSUMS_CHUNK].start != covered:
            raise FormatError(f"{CHECKSUMS_CHUNK} begins at byte {chunks[CHECKSUMS_CHUNK].start}, not {covered}")
        return DataFile(key, chunks, datafile.decode_table(bytes(table), covered, algorithm), covered)
    except FormatError as e:
        raise Corrupt(f"{key}: {e}") from e


def open_checkpoint(store: Store, directory: StepDir) -> Checkpoint:
    """Open a committed checkpoint.

    NotACheckpoint where there is no commit; Corrupt or FormatError where it is damaged; NewerFormat.
    """
    key = f"{directory}/{COMMIT}"
    return or_other_copy(store, key, lambda: _opened(store, directory, key))


def _opened(store: Store, directory: StepDir, key: str) -> Checkpoint:
    try:
        data = read_all(store, key, limit=manifest.MAX_BYTES)
    except KeyMissing as e:
        what = "holds no commit.json: a save that did not finish" if store.list(str(directory)) else "does not exist"
        raise NotACheckpoint(f"{store}: {directory} {what}") from e
    try:
        content = manifest.decode(data, trusted())
    except (Corrupt, FormatError) as e:  # Untrusted and NewerFormat are such
        raise type(e)(f"{key}: {e}") from e
    if (content.step, content.generation) != (directory.step, directory.generation):
        raise Corrupt(f"{key}: is the commit of {StepDir(content.step, content.generation)}")
    return Checkpoint(store, directory, content)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
