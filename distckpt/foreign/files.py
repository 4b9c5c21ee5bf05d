"""Files of other tools: plain reads with bounds, counted. Knows no formats.

Their names may be hidden, and they may be symlinks: a Hugging Face cache is a directory of them. A name that stands in
an index goes through `inside` first, so that no index leads out of its directory.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Protocol

from distckpt.errors import FormatError, KeyMissing, KeyTruncated, StoreError
from distckpt.format.text import shown
from distckpt.store.base import Pace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from typing_extensions import Buffer

_MOST_BUFFERS = 1024  # IOV_MAX of Linux


class Readable(Protocol):
    """Bytes by offset."""

    @property
    def name(self) -> str:
        """What messages call it; no other file is called so."""
        ...

    @property
    def size(self) -> int:
        """Its bytes."""
        ...

    @property
    def read_count(self) -> int:
        """Bytes that have been read of it."""
        ...

    @property
    def sequential(self) -> bool:
        """Whether reads should come in order, one at a time."""
        ...

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from byte `start` on. KeyMissing; KeyTruncated if the file ends first."""
        ...


class PlainFile:
    """A file as it lies on disk."""

    sequential = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.read_count = 0
        try:
            found = path.stat()
            self.size, self.changed = found.st_size, found.st_mtime_ns
        except FileNotFoundError as e:
            raise KeyMissing(f"{path}: no such file") from e
        except OSError as e:
            raise StoreError(f"cannot look at {path}: {e.strerror or e}") from e

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """See Readable.read."""
        try:
            descriptor = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise KeyMissing(f"{self.name}: no such file") from e
        except OSError as e:
            raise StoreError(f"cannot read {self.name}: {e.strerror or e}") from e
        try:
            for buffer in buffers:
                self._fill(descriptor, start, buffer)
                start += len(buffer)
        except OSError as e:
            if isinstance(e, StoreError):
                raise
            raise StoreError(f"cannot read {self.name}: {e.strerror or e}") from e
        finally:
            os.close(descriptor)

    def _fill(self, descriptor: int, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(descriptor, [buffer[done:]], start + done)
            if not got:
                raise KeyTruncated(f"{self.name}: ends at byte {start + done}; {len(buffer) - done} more were expected")
            done += got
            self.read_count += got


def read_bytes(file: Readable, start: int, count: int) -> bytes:
    """Bytes [start, start + count) of a file."""
    data = bytearray(count)
    file.read(start, [memoryview(data)])
    return bytes(data)


def inside(folder: Path, name: object, what: str) -> Path:
    """Path of a file that an index names. FormatError for a name that is no plain path below the folder."""
    if isinstance(name, str) and name and "\0" not in name:
        parts = name.split("/")
        if not name.startswith("/") and ".." not in parts and "" not in parts:
            return folder / name
    raise FormatError(f"{what}: names the file {shown(name)}, which is not a plain path below {folder}; not opened")


class View(io.RawIOBase):
    """Part of a file, [start, start + length), as a file of its own: what zipfile takes."""

    def __init__(self, file: Readable, start: int, length: int) -> None:
        super().__init__()
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        """Whether it can be sought in: it can."""
        return True

    def readable(self) -> bool:
        """Whether it can be read: it can."""
        return True

    def tell(self) -> int:
        """Position."""
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position. OSError before the beginning, as a file has it."""
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError("seek before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: Buffer) -> int:
        """Read from the position on."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        if count:
            self._file.read(self._start + self._at, [view[:count]])
        self._at += count
        return count


class Files:
    """Several files by name: what a Checkpoint reads from."""

    pace = Pace()

    def __init__(self, files: Sequence[Readable]) -> None:
        self._files = {file.name: file for file in files}

    @property
    def read_count(self) -> int:
        """Bytes read of all of them."""
        return sum(file.read_count for file in self._files.values())

    def head(self, key: str) -> int:
        """Bytes of a file."""
        return self._files[key].size

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Readable.read."""
        self._files[key].read(start, buffers)
