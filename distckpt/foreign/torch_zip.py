"""A torch.save file, written as a stream: a pickle, then storages whose content comes from tensors of a checkpoint.

A storage of any size (a flat
buffer of thousands of parameters) passes through one small buffer, and a file's size is known before it is written.
"""

from __future__ import annotations

import zlib
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.foreign.archive import Record, end, placed
from distckpt.foreign.emit import pickled, tensor_over
from distckpt.foreign.sink import Output
from distckpt.format.dtype import item_size
from distckpt.loading.stream import Stretch, stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from distckpt.format.box import Shape
    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store

    Parts = Callable[[], Iterable[Stretch | int]]
    """What makes up a storage, in order: stretches of tensors, and (a number) zero bytes."""

_ZEROS = bytes(1 << 16)


class TorchFile:
    """The storages of one file, entered as its tree is made. Tensors of it are what `tensor` returns."""

    def __init__(self) -> None:
        self._storages: list[tuple[int, Parts]] = []

    def tensor(self, dtype: str, shape: Shape, parts: Parts) -> Any:
        """Tensor to stand in the tree; `parts` make up its elements."""
        self._storages.append((prod(shape) * item_size(dtype), parts))
        return tensor_over(str(len(self._storages) - 1), dtype, shape)

    def output(self, name: str, tree: Any, checkpoint: Checkpoint, room: int) -> Output:
        """Output that writes the file. TypeError for a value in the tree that has no place in a pickle."""
        small = {"data.pkl": pickled(tree), "byteorder": b"little", "version": b"3\n"}
        records, stop = placed(
            (
                *(Record.of(n, data) for n, data in small.items()),
                *(Record.streamed(f"data/{i}", nbytes) for i, (nbytes, _) in enumerate(self._storages)),
            )
        )
        size = stop + len(end(records, stop))

        def write(store: Store) -> dict[str, Any]:
            store.write(name, self._pieces(checkpoint, records, stop, room), size=size)
            return {}

        return Output(name, size, write)

    def _pieces(self, checkpoint: Checkpoint, records: list[Record], stop: int, room: int) -> Iterator[memoryview]:
        """Bytes of the file, in order."""
        wanted = (part for _, parts in self._storages for part in parts() if isinstance(part, Stretch))
        source = _Stretches(stream(checkpoint, wanted, room))
        written = []
        storages = iter(self._storages)
        for record in records:
            yield memoryview(record.head())
            if record.content is not None:
                written.append(record)
                continue
            crc = 0
            for part in next(storages)[1]():
                for piece in _zeros(part) if isinstance(part, int) else source.next():
                    crc = zlib.crc32(piece, crc)
                    yield piece
            yield memoryview(record.after(crc))
            written.append(replace(record, crc=crc))
        yield memoryview(end(written, stop))


class _Stretches:
    """A stream, stretch by stretch."""

    def __init__(self, pieces: Iterator[tuple[int, memoryview]]) -> None:
        self._pieces = pieces
        self._at = next(pieces, None)
        self._index = 0

    def next(self) -> Iterator[memoryview]:
        """Yield the pieces of the next stretch: none, of an empty one."""
        while self._at and self._at[0] == self._index:
            yield self._at[1]
            self._at = next(self._pieces, None)
        self._index += 1


def _zeros(count: int) -> Iterator[memoryview]:
    while count:
        piece = memoryview(_ZEROS)[:count]
        yield piece
        count -= len(piece)
