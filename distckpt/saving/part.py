"""One rank's part of a save, once its bytes are at hand: written, summed on the way, acked. Knows no tensors.

So it is done by whoever has the bytes: the training process, from live memory, or the writer process, from an arena.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distckpt.errors import StoreError
from distckpt.format import datafile
from distckpt.format.checksum import CRC32C, Algorithm
from distckpt.format.layout import ack_file, data_file, object_file
from distckpt.format.manifest import FileInfo, Manifest, ObjectInfo
from distckpt.saving.commit import Attempt, abandon, write_ack, write_refusal
from distckpt.store.base import write_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from distckpt.format.datafile import Image
    from distckpt.store.base import Store

PIECE = 4 << 20
"""Most bytes handed to the store at once: small enough to be written while in the cache that summing left them in."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank writes for an attempt besides its data file: on rank 0 the shared objects, encoded, and the draft."""

    attempt: Attempt
    rank: int
    objects: Mapping[str, bytes] = field(default_factory=dict)
    draft: Manifest | None = None

    @property
    def name(self) -> str:
        """Name of the data file."""
        return data_file(self.rank, self.attempt.id)


class Summed:
    """Pieces of a data file up to its checksum table, and then the table. `digest`: the file's, once all are taken.

    Each piece is summed right before it is handed out, and so written while it is cache-hot. stable: of the pieces, as
    in Store.write; those that are cut from one last as long.
    """

    def __init__(
        self, header: memoryview, pieces: Iterable[memoryview], stable: int = 0, algorithm: Algorithm = CRC32C
    ) -> None:
        self._header, self._pieces, self.stable, self.algorithm = header, pieces, stable, algorithm
        self.digest = ""

    def __iter__(self) -> Iterator[memoryview]:
        sums = self.algorithm.blocks()
        for piece in self._pieces:
            for start in range(0, len(piece), PIECE):
                sums.feed(cut := piece[start : start + PIECE])
                yield cut
        table = datafile.encode_table(datafile.Table(self.algorithm, sums.finish()))
        self.digest = self.algorithm.digest(self._header, table)
        yield memoryview(table)


def whole(image: Image, content: Iterable[memoryview], stable: int = 0) -> Summed:
    """Bytes of an image whose segments have this content, in order."""

    def pieces() -> Iterator[memoryview]:
        yield memoryview(image.header)
        yield from content
        yield memoryview(image.objects)

    return Summed(memoryview(image.header), pieces(), stable, image.algorithm)


def write_part(store: Store, part: Part, content: Summed, header: int, size: int) -> Manifest | None:
    """Write a rank's data file and, last, its ack. A failure is acked, too, so that nobody waits for this rank.

    content: of the file. header, size: bytes of the file's header, and of all of it.
    Returns the draft as it stands in the ack.
    """
    try:
        store.write(part.attempt.key(part.name), content, size=size, stable=content.stable)
        file = FileInfo(part.name, size, header, content.digest)
        draft = part.draft and _with_objects(store, part, part.draft, content.algorithm)
        write_ack(store, part.attempt, part.rank, file, draft)
    except Exception as e:
        with contextlib.suppress(StoreError):  # what failed is raised; this is for those who wait
            write_refusal(store, part.attempt, part.rank, e)
        raise
    return draft


def _with_objects(store: Store, part: Part, draft: Manifest, algorithm: Algorithm) -> Manifest:
    """Write the rank-independent objects, one readable file each, and name them in the manifest's draft."""
    for name, data in part.objects.items():
        write_all(store, part.attempt.key(object_file(name, part.attempt.id)), data)
    names = {n: object_file(n, part.attempt.id) for n in part.objects}
    infos = {n: ObjectInfo(names[n], len(data), algorithm.digest(data)) for n, data in part.objects.items()}
    return replace(draft, objects=infos)


def abandon_part(store: Store, part: Part) -> None:
    """Remove what a rank wrote for an attempt that failed.

    The ack goes first, so that nobody finds the attempt complete while it is taken away.
    """
    names = [ack_file(part.rank, part.attempt.id), part.name]
    abandon(store, part.attempt, [*names, *(object_file(n, part.attempt.id) for n in part.objects)])
