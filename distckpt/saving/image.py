"""From live tensors to the bytes of a data file, checksummed on the way, in one pass and bounded memory.

Large plain CPU memory is handed to the store where it lies; everything else (small, strided, on a device) is packed
into the arena first. Either way a piece is summed right before the store takes it, while it is cache-hot.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import TYPE_CHECKING

from distckpt.errors import Unsupported
from distckpt.format import datafile
from distckpt.format.checksum import BlockSums
from distckpt.format.layout import chunk_name
from distckpt.state import as_bytes, cut, is_plain_memory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from distckpt.format.partition import Partition
    from distckpt.state import GlobalTensor, State

LARGE = 256 << 10
"""Plain memory of at least this many bytes is written where it lies."""
PIECE = 4 << 20
"""Most bytes handed to the store at once: small enough to be summed and copied while in the cache."""
MODEL_LEAD = "model."


class Arena:
    """Host memory in which pieces of an image are packed; reused from save to save."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self.view = memoryview(self._memory)

    def close(self) -> None:
        """Give the memory back; what a failed save's traceback still refers to goes with the traceback."""
        with contextlib.suppress(BufferError):
            self.view.release()
            self._memory.close()


def own_chunks(state: State, partitions: Mapping[str, Partition], rank: int) -> dict[str, tuple[str, torch.Tensor]]:
    """Chunks that `rank` writes: name -> (fqn, view of live memory). Unsupported if it does not hold one of them."""
    found = {}
    for fqn, partition in partitions.items():
        for region in partition.of_file(rank):
            held: GlobalTensor | None = state.tensors.get(fqn)
            view = None
            for shard in held.shards if held else ():
                if (view := cut(shard, region)) is not None:
                    break
            if view is None:
                raise Unsupported(f"{fqn}: rank {rank} should hold {region}, and does not; other ranks say it does")
            found[chunk_name(fqn, region, partition.shape)] = (fqn, view)
    return found


def build(chunks: Mapping[str, tuple[str, torch.Tensor]], objects: bytes) -> datafile.Image:
    """Image of the data file with these chunks: the model's before the others within an item size."""
    return datafile.build(
        (
            datafile.Chunk(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), not fqn.startswith(MODEL_LEAD))
            for name, (fqn, t) in chunks.items()
        ),
        objects,
    )


def live(image: datafile.Image, chunks: Mapping[str, tuple[str, torch.Tensor]]) -> Iterator[memoryview]:
    """Content of an image's segments; a tensor that is not plain memory is copied, one at a time."""
    for segment in image.segments:
        tensor = chunks[segment.name][1]
        if not is_plain_memory(tensor):
            tensor = tensor.resolve_conj().resolve_neg().cpu().contiguous()
        yield as_bytes(tensor)


class ImageStream:
    """Bytes of an image in order, as pieces for Store.write. `digest` is the file's, once all have been taken.

    `content`: the bytes of its segments in order, in pieces of any length, each good until the next is asked for.
    """

    def __init__(self, image: datafile.Image, content: Iterable[memoryview], arena: memoryview) -> None:
        self._image, self._content, self._arena = image, content, arena
        self.digest = ""

    def __iter__(self) -> Iterator[memoryview]:
        sums = BlockSums()
        for piece in self._pieces():
            sums.feed(piece)
            yield piece
        table = datafile.encode_table(sums.finish())
        self.digest = datafile.file_digest(self._image.header, table)
        yield memoryview(table)

    def _pieces(self) -> Iterator[memoryview]:
        """Pack what is small into the arena; let what is large and plain pass as it is."""
        filled = 0
        for data in self._contents():
            if len(data) >= min(LARGE, len(self._arena)):
                if filled:
                    yield self._arena[:filled]
                    filled = 0
                yield from (data[i : i + PIECE] for i in range(0, len(data), PIECE))
                continue
            if filled + len(data) > len(self._arena):
                yield self._arena[:filled]
                filled = 0
            self._arena[filled : filled + len(data)] = data
            filled += len(data)
        if filled:
            yield self._arena[:filled]

    def _contents(self) -> Iterator[memoryview]:
        """Content of the file up to its table, in order."""
        yield memoryview(self._image.header)
        yield from self._content
        yield memoryview(self._image.objects)
