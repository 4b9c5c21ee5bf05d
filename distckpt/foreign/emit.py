"""Pickles and zips as torch writes them, made byte by byte: nothing of torch is needed to name its classes.

A tensor's record is `head + elements + tail`: head and the length of all are known before the first element is, the
tail needs the CRC-32 of the elements. So a record of any size is written from a stream.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.foreign.archive import Record, end, placed
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
                out += b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))
                out += data
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
            case dict() | Pairs() if not isinstance(value, Counter):
                self.emit(_called("collections", "OrderedDict")) if isinstance(value, OrderedDict) else out.extend(b"}")
                out += b"("
                pairs = value.items() if isinstance(value, dict) else value
                self._all((part for pair in pairs for part in pair), b"u")
            case list():
                out += b"]("
                self._all(value, b"e")
            case tuple():
                out += b"("
                self._all(value, b"t")
            case _:
                self.emit(_made(value))

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


def _made(value: Any) -> Call:
    """What makes a value that has no opcode of its own in protocol 2."""
    match value:
        case Counter():
            return _called("collections", "Counter", dict(value))
        case bytes():
            return _called("_codecs", "encode", value.decode("latin1"), "latin1")
        case complex():
            return _called("__builtin__", "complex", value.real, value.imag)
        case set() | frozenset():
            return _called("__builtin__", type(value).__name__, sorted(value, key=repr))
    raise TypeError(f"{type(value).__name__} has no place in an index")


def _called(module: str, name: str, *args: Any) -> Call:
    return Call(Global(module, name), args)


# -- records of tensors --------------------------------------------------------------------------------------------

_KINDS = {dtype: name for name, dtype in STORAGES.items()}


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


class TensorRecord:
    """What torch.save writes of one contiguous tensor, as `head`, the elements, and `tail(crc)`.

    `large`: whether sizes take 8 bytes, as they must from 4 GiB on.
    """

    def __init__(self, dtype: str, shape: Shape, *, large: bool | None = None) -> None:
        self.nbytes = prod(shape) * item_size(dtype)
        small = [
            Record.of("data.pkl", pickled(tensor_over("0", dtype, shape))),
            Record.of("byteorder", b"little"),
            Record.of("version", b"3\n"),
        ]
        self._records, self._end = placed([*small, Record.streamed("data/0", self.nbytes, wide=large)])
        self.head = b"".join(record.head() for record in self._records)
        self.size = self._end + len(end(self._records, self._end))

    def tail(self, crc: int) -> bytes:
        """What follows the elements, whose CRC-32 is `crc`."""
        *small, data = self._records
        return data.after(crc) + end([*small, replace(data, crc=crc)], self._end)
