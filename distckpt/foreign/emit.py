"""Pickles and zips as torch writes them, made byte by byte: nothing of torch is needed to name its classes.

A tensor's record is `head + elements + tail`: head and the length of all are known before the first element is, the
tail needs the CRC-32 of the elements. So a record of any size is written from a stream.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.foreign.pickles import STORAGES
from distckpt.format.box import strides
from distckpt.format.dtype import item_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distckpt.format.box import Shape

# -- pickles -----------------------------------------------------------------------------------------------------


class Global(NamedTuple):
    """A class or function, by name."""

    module: str
    name: str


class Call(NamedTuple):
    """What a function returns."""

    function: Global
    args: tuple[Any, ...]


class Instance(NamedTuple):
    """An object of a class, with its state."""

    kind: Global
    state: Any


class Persistent(NamedTuple):
    """What stands outside of the pickle: a storage."""

    pid: tuple[Any, ...]


class Pairs(tuple[tuple[Any, Any], ...]):
    """A dict whose keys need not be hashable here."""

    __slots__ = ()


def pickled(value: Any) -> bytes:
    """Pickle, protocol 2, of plain values and what stands above. Texts and globals are written once."""
    emitter = _Emitter()
    emitter.emit(value)
    return bytes(b"\x80\x02" + emitter.out + b".")


class _Emitter:
    def __init__(self) -> None:
        self.out = bytearray()
        self._known: dict[str | Global, int] = {}

    def emit(self, value: Any) -> None:
        """Append what makes one value."""
        out = self.out
        match value:
            case None:
                out += b"N"
            case bool():
                out += b"\x88" if value else b"\x89"
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                out += b"\x8a" + bytes([len(data)]) + data
            case float():
                out += b"G" + struct.pack(">d", value)
            case str():
                data = value.encode("utf-8", "surrogatepass")
                self._once(value, b"X" + struct.pack("<I", len(data)) + data)
            case Global(module, name):
                self._once(value, f"c{module}\n{name}\n".encode())
            case Call(function, args):
                self._all((function, args), b"R")
            case Instance(kind, state):
                self.emit(kind)
                out += b")\x81"
                self._all((state,), b"b")
            case Persistent(pid):
                self._all((pid,), b"Q")
            case dict() | Pairs():
                out += b"}("
                pairs = value.items() if isinstance(value, dict) else value
                self._all((part for pair in pairs for part in pair), b"u")
            case list():
                out += b"]("
                self._all(value, b"e")
            case tuple():
                out += b"("
                self._all(value, b"t")
            case _:
                raise TypeError(f"{type(value).__name__} has no place in an index")

    def _all(self, values: Iterable[Any], after: bytes) -> None:
        for value in values:
            self.emit(value)
        self.out += after

    def _once(self, value: str | Global, data: bytes) -> None:
        number = self._known.get(value)
        if number is not None:
            self.out += b"j" + struct.pack("<I", number)
        else:
            number = self._known[value] = len(self._known)
            self.out += data + b"r" + struct.pack("<I", number)


# -- records of tensors --------------------------------------------------------------------------------------------

_KINDS = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_DATE = 0x21  # 1 January 1980: the same tensor is the same bytes on every day
_STREAMED = 8  # sizes and sum stand after the content
_LARGEST = 0xFFFFFFFF


def tensor_over(key: str, dtype: str, shape: Shape) -> Any:
    """Contiguous CPU tensor over the storage of this key, to be pickled."""
    numel = prod(shape)
    of_kind = dtype in _KINDS
    kind = Global("torch", _KINDS[dtype]) if of_kind else Global("torch.storage", "UntypedStorage")
    count = numel if of_kind else numel * item_size(dtype)
    storage = Persistent(("storage", kind, key, "cpu", count))
    hooks = Call(Global("collections", "OrderedDict"), ())
    args: tuple[Any, ...] = (storage, 0, shape, strides(shape), False, hooks)
    if of_kind:
        return Call(Global("torch._utils", "_rebuild_tensor_v2"), args)
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), (*args, Global("torch", dtype)))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    start: int
    size: int
    crc: int
    streamed: bool = False


class TensorRecord:
    """What torch.save writes of one contiguous tensor, as `head`, the elements, and `tail(crc)`.

    `large`: whether sizes take 8 bytes, as they must from 4 GiB on.
    """

    def __init__(self, dtype: str, shape: Shape, *, large: bool | None = None) -> None:
        self.nbytes = prod(shape) * item_size(dtype)
        self._large = self.nbytes > _LARGEST - (1 << 20) if large is None else large
        self._entries: list[_Entry] = []
        head = bytearray()
        for name, content in (
            ("data.pkl", pickled(tensor_over("0", dtype, shape))),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            entry = _Entry(f"archive/{name}".encode(), len(head), len(content), zlib.crc32(content))
            self._entries.append(entry)
            head += self._local(entry, b"") + content
        data = _Entry(b"archive/data/0", len(head), self.nbytes, 0, streamed=True)
        self._data = data
        wide = struct.pack("<HHQQ", 1, 16, 0, 0) if self._large else b""
        unpadded = len(head) + 30 + len(data.name) + len(wide) + 4
        padding = -unpadded % _ALIGNMENT
        head += self._local(data, wide + struct.pack("<HH", 0x4246, padding) + b"Z" * padding)
        self.head = bytes(head)
        self.size = len(self.head) + self.nbytes + len(self.tail(0))

    def _local(self, entry: _Entry, extra: bytes) -> bytes:
        known = (0, 0, 0) if entry.streamed else (entry.crc, entry.size, entry.size)
        if entry.streamed and self._large:
            known = (0, _LARGEST, _LARGEST)
        flags = _STREAMED if entry.streamed else 0
        version = 45 if entry.streamed and self._large else 20
        fixed = struct.pack("<4s5H3I2H", b"PK\3\4", version, flags, 0, 0, _DATE, *known, len(entry.name), len(extra))
        return fixed + entry.name + extra

    def tail(self, crc: int) -> bytes:
        """What follows the elements, whose CRC-32 is `crc`."""
        sizes = struct.pack("<QQ" if self._large else "<II", self.nbytes, self.nbytes)
        descriptor = struct.pack("<4sI", b"PK\7\x08", crc) + sizes
        start = len(self.head) + self.nbytes + len(descriptor)
        data = _Entry(self._data.name, self._data.start, self.nbytes, crc, streamed=True)
        directory = b"".join(self._central(entry) for entry in [*self._entries, data])
        count, length = len(self._entries) + 1, len(directory)
        wide = b""
        if self._large:
            wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
            wide += struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
            start = _LARGEST
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, start, 0)
        return descriptor + directory + wide + end

    def _central(self, entry: _Entry) -> bytes:
        large = entry.streamed and self._large
        extra = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if large else b""
        size, version = (_LARGEST, 45) if large else (entry.size, 20)
        flags = _STREAMED if entry.streamed else 0
        fixed = (version, version, flags, 0, 0, _DATE, entry.crc, size, size, len(entry.name), len(extra))
        rest = (0, 0, 0, 0, entry.start)
        return struct.pack("<4s6H3I2H3H2I", b"PK\1\2", *fixed, *rest) + entry.name + extra
