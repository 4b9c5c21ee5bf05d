"""Files on their way from one store to another: verified as they are read, at no more than so many bytes a second."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from distckpt.errors import Corrupt, KeyMissing
from distckpt.format.checksum import BLOCK, matches
from distckpt.format.manifest import MAX_BYTES, ObjectInfo
from distckpt.loading.open import blocks, opened
from distckpt.store.base import FOR_GOOD, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from distckpt.format.layout import StepDir
    from distckpt.format.manifest import FileInfo
    from distckpt.store.base import Store

_PIECE = 4 * BLOCK


class Outbound:
    """near, far: from where to where. bandwidth: bytes a second. between: called now and then. `sent`: bytes so far."""

    def __init__(self, near: Store, far: Store, bandwidth: int | None, between: Callable[[], None]) -> None:
        self._near, self._far, self._bandwidth, self._between = near, far, bandwidth, between
        self.sent = 0
        self._free_at = 0.0

    def send(
        self, directory: StepDir, files: Iterable[FileInfo], objects: Iterable[ObjectInfo], *, all_here: bool
    ) -> bool:
        """Copy these files of a step directory that the far store lacks. Whether it has all of them now.

        all_here: one that neither has is Corrupt; else it is for another node to send.
        """
        whole = True
        there = {entry.name: entry.size for entry in self._far.list(str(directory))}
        infos: list[FileInfo | ObjectInfo] = [*files, *objects]
        for info in infos:
            key = info.name if "/" in info.name else f"{directory}/{info.name}"
            found = self._far_size(key) if "/" in info.name else there.get(info.name)
            if found == info.size:
                continue  # it appeared whole, or not at all
            if not all_here and not self._is_near(key):
                whole = False
                continue
            pieces = self._object(key, info) if isinstance(info, ObjectInfo) else self._verified(key, info)
            self._far.write(key, self._paced(pieces), size=info.size, stable=FOR_GOOD)
            self.sent += info.size
        return whole

    def _far_size(self, key: str) -> int | None:
        with contextlib.suppress(KeyMissing):
            return self._far.head(key)
        return None

    def _is_near(self, key: str) -> bool:
        with contextlib.suppress(KeyMissing):
            self._near.head(key)
            return True
        return False

    def _verified(self, key: str, info: FileInfo) -> Iterator[memoryview]:
        """Yield a data file, each block of it verified. Corrupt."""
        file = opened(self._near, key, info)
        for start in range(0, file.covered, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, file.covered - start)))
            self._near.read(key, start, [piece])
            file.verify(start // BLOCK, list(blocks([piece])))
            yield piece
        table = memoryview(bytearray(info.size - file.covered))
        self._near.read(key, file.covered, [table])
        yield table

    def _object(self, key: str, info: ObjectInfo) -> Iterator[memoryview]:
        data = memoryview(read_all(self._near, key, limit=MAX_BYTES))
        if not matches(info.digest, data):
            raise Corrupt(f"{key}: does not match the digest in its commit")
        yield data

    def _paced(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """Hold pieces back so that no more bytes go in a second than may."""
        for piece in pieces:
            if self._bandwidth:
                now = time.monotonic()
                time.sleep(max(0.0, self._free_at - now))
                self._free_at = max(self._free_at, now) + len(piece) / self._bandwidth
            self._between()
            yield piece
