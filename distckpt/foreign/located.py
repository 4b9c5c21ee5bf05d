"""Where a tensor of another tool lies, and what stands where a value could not be read. Values; they hold no data."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError
from distckpt.format.box import strides
from distckpt.format.datafile import Stored
from distckpt.format.dtype import item_size, stored_as
from distckpt.format.manifest import MAX_DIMS
from distckpt.format.text import shown

if TYPE_CHECKING:
    from distckpt.format.box import Shape


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes [start, start + nbytes) of a file that one CRC-32 covers: the storage of a tensor, or of several."""

    start: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor in a file: its first element at byte `start`, strides in elements (None: row-major)."""

    dtype: str
    shape: Shape
    strides: Shape | None
    start: int
    record: Record | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * item_size(self.dtype)

    def stored(self) -> Stored:
        """As the entry of a data file."""
        tag, shape = stored_as(self.dtype, self.shape)
        return Stored(tag, shape, self.start, self.start + self.nbytes, self.strides)


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Stands where a value stood that cannot be read safely, and says why."""

    why: str


def within(record: Record, dtype: str, first: Any, shape: Any, steps: Any) -> Located:
    """Tensor over a storage: elements from `first` on. FormatError unless all of it lies inside the storage."""
    numbers = (first, *shape, *steps) if type(shape) is tuple and type(steps) is tuple else (None,)
    if not all(type(n) is int and n >= 0 for n in numbers) or not len(shape) == len(steps) <= MAX_DIMS:
        raise FormatError(f"not the geometry of a tensor: offset, shape and strides {shown((first, shape, steps))}")
    size = item_size(dtype)
    reach = first + sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + 1 if prod(shape) else first
    if reach * size > record.nbytes or prod(shape) * size > max(record.nbytes, _MOST_EXPANDED):
        raise FormatError(
            f"a {dtype} tensor of shape {shape}, strides {steps}, offset {first} in a storage of {record.nbytes} bytes"
        )
    dense = strides(shape)
    plain = all(n < 2 or a == b for n, a, b in zip(shape, steps, dense, strict=True))
    return Located(dtype, shape, None if plain or not prod(shape) else steps, record.start + first * size, record)


_MOST_EXPANDED = 64 << 20  # bytes of a tensor that is larger than its storage: elements that share memory
