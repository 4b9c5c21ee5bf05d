"""The data file: what one rank writes. A valid safetensors file whose every byte is known before any is written.

    [u64 header length][header JSON, padded to a multiple of 4096][chunks, packed][__objects__][__checksums__]

Chunks lie larger item sizes first, and the model's before the optimizer's within an item size: so each is aligned
to its item size without holes, and a reader of the model alone touches few stretches.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.errors import FormatError
from distckpt.format.checksum import BLOCK, CRC32C, Algorithm
from distckpt.format.dtype import TAG_SIZE, item_size, stored_as
from distckpt.format.layout import CHECKSUMS_CHUNK, OBJECTS_CHUNK
from distckpt.format.text import read_json, shown
from distckpt.garbage import uncollected

if TYPE_CHECKING:
    from collections.abc import Iterable

DATA_ALIGNMENT = 4096
MAX_HEADER = 100_000_000
"""Longest header, in bytes, that safetensors readers accept."""

_LENGTH = struct.Struct("<Q")
_TABLE_HEAD = struct.Struct("<12sI")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to be written: its name in the file, torch dtype name and shape; whether it goes after the others."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    last: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes that one named chunk fills: [start, start + nbytes) of the data, which follows the header.

    dtype: torch's name of it. The header names another where safetensors lacks it: complex64 is U8 there.
    """

    name: str
    dtype: str
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Packed:
    """Where chunks lie in a data file: segments in file order, their entries of the header (JSON), bytes in all."""

    segments: tuple[Segment, ...]
    entries: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Image:
    """The whole file: header, packed chunks, objects, and where the checksum table goes."""

    header: bytes
    packed: Packed
    objects: bytes
    algorithm: Algorithm = CRC32C

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Segments in file order."""
        return self.packed.segments

    @property
    def objects_start(self) -> int:
        """First byte of the objects."""
        return len(self.header) + self.packed.nbytes

    @property
    def table_start(self) -> int:
        """First byte of the checksum table: the sums cover [0, table_start)."""
        return self.objects_start + len(self.objects)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.table_start + table_size(self.table_start, self.algorithm)


@dataclass(frozen=True, slots=True)
class Table:
    """Checksum table: the sum of each block, one after another."""

    algorithm: Algorithm
    sums: bytes

    def holds(self, number: int, block: Iterable[memoryview]) -> bool:
        """Whether these pieces are the block of this number."""
        start = number * self.algorithm.size
        return self.algorithm.sum_of(block) == self.sums[start : start + self.algorithm.size]


def table_size(covered: int, algorithm: Algorithm) -> int:
    """Bytes of a table over `covered` bytes."""
    return _TABLE_HEAD.size + algorithm.size * -(-covered // BLOCK)


def pack(chunks: Iterable[Chunk]) -> Packed:
    """Lay chunks out one after another. FormatError for names that a file cannot have."""
    entries: dict[str, Any] = {"__metadata__": {"writer": "distckpt", "format": "pt"}}
    placed = []
    position = 0
    for chunk in sorted(chunks, key=lambda c: (-item_size(c.dtype), c.last, c.name)):
        tag, shape = stored_as(chunk.dtype, chunk.shape)
        if chunk.name.startswith("__"):
            raise FormatError(f"chunk name {chunk.name!r} is reserved: `chunk_name` escapes it")
        if chunk.name in entries:
            raise FormatError(f"two chunks of one data file are named {chunk.name!r}")
        entries[chunk.name] = _entry(tag, shape, position, position + chunk.nbytes)
        placed.append(Segment(chunk.name, chunk.dtype, position, nbytes := chunk.nbytes))
        position += nbytes
    return Packed(tuple(placed), json.dumps(entries, separators=(",", ":"))[:-1], position)


def build(packed: Packed, objects: bytes, algorithm: Algorithm = CRC32C) -> Image:
    """Lay out a data file. `objects` is JSON; it is padded with spaces to a multiple of 4 bytes."""
    objects += b" " * (-len(objects) % 4)
    table_at = packed.nbytes + len(objects)
    last = {OBJECTS_CHUNK: _entry("U8", (len(objects),), packed.nbytes, table_at)}
    return Image(_encode_header(packed.entries, last, table_at, algorithm), packed, objects, algorithm)


def _encode_header(entries: str, last: dict[str, Any], table_at: int, algorithm: Algorithm) -> bytes:
    """Header with the table's entry. The table's length depends on the header's: so it is tried until it holds."""
    length = DATA_ALIGNMENT
    while True:
        size = table_size(length + table_at, algorithm)
        last[CHECKSUMS_CHUNK] = _entry("U8", (size,), table_at, table_at + size)
        text = f"{entries},{json.dumps(last, separators=(',', ':'))[1:]}".encode()
        padded = -(-(_LENGTH.size + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
        if padded - _LENGTH.size > MAX_HEADER:
            raise FormatError(f"data file header of {padded} bytes; safetensors readers take {MAX_HEADER}")
        if padded <= length:
            return _LENGTH.pack(length - _LENGTH.size) + text.ljust(length - _LENGTH.size)
        length = padded


def _entry(tag: str, shape: tuple[int, ...], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": tag, "shape": list(shape), "data_offsets": [start, stop]}


def encode_table(table: Table) -> bytes:
    """Content of `__checksums__`: algorithm, block size, the sums."""
    return _TABLE_HEAD.pack(table.algorithm.name.encode(), BLOCK) + table.sums


def decode_table(data: bytes, covered: int, algorithm: Algorithm) -> Table:
    """Sums of a file whose first `covered` bytes they are of. FormatError unless they are of this algorithm."""
    if len(data) != table_size(covered, algorithm):
        raise FormatError(f"checksum table of {len(data)} bytes; {table_size(covered, algorithm)} expected")
    name, block = _TABLE_HEAD.unpack_from(data)
    if (name.rstrip(b"\0"), block) != (algorithm.name.encode(), BLOCK):
        raise FormatError(
            f"checksum table of {name!r} and blocks of {block} bytes; {algorithm.name} and {BLOCK} expected"
        )
    return Table(algorithm, data[_TABLE_HEAD.size :])


class Stored(NamedTuple):
    """One entry of a header that was read: safetensors tag, stored shape, bytes [start, stop) of the file.

    `strides` (in elements): of files of other tools, where the chunk's elements do not lie in row-major order.
    """

    tag: str
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...] | None = None


@uncollected()
def decode_header(header: bytes, size: int) -> dict[str, Stored]:
    """Entries of a data file of `size` bytes, in file order, from its header (8-byte length included).

    FormatError unless they follow the format: no holes, inside the file, sizes right, `__objects__` and
    `__checksums__` last.
    """
    if len(header) < _LENGTH.size:
        raise FormatError(f"header of {len(header)} bytes has no length")
    (length,) = _LENGTH.unpack_from(header)
    if length + _LENGTH.size != len(header) or length > MAX_HEADER:
        raise FormatError(f"header length says {length}, the header has {len(header) - _LENGTH.size} bytes")
    raw = read_json(memoryview(header)[_LENGTH.size :])
    if not isinstance(raw, dict):
        raise FormatError("header is not a JSON object")
    raw.pop("__metadata__", None)
    entries: dict[str, Stored] = {}
    position = len(header)
    for name, item in raw.items():
        entries[name] = entry = _stored(name, item, len(header))
        if entry.start != position:
            raise FormatError(f"chunk {name!r} begins at byte {entry.start}; {position} expected")
        position = entry.stop
    if position != size or list(entries)[-2:] != [OBJECTS_CHUNK, CHECKSUMS_CHUNK]:
        raise FormatError(
            f"chunks end at byte {position} of {size}; the last two must be {OBJECTS_CHUNK} and {CHECKSUMS_CHUNK}"
        )
    return entries


def _stored(name: str, item: Any, data_start: int) -> Stored:
    try:  # and not a pattern of types, which takes ten times as long
        tag, shape, (start, stop) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        numbers = {int, *map(type, (*shape, start, stop))} == {int}
        if numbers and min((0, *shape)) == 0 <= start <= stop and prod(shape) * TAG_SIZE[tag] == stop - start:
            return Stored(tag, shape, data_start + start, data_start + stop)
    except (TypeError, KeyError, ValueError):
        pass
    raise FormatError(f"header entry of chunk {name!r} is malformed: {shown(item)}")
