"""Records that DCP's ZStandard extension compressed, read as files of their own: decompressed as far as is asked for.

A stream can only be read forward. So reads of such a file come one at a time and in order (`sequential`), and one that
goes back starts again; memory is a few buffers, whatever the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, KeyTruncated, Unsupported
from distckpt.foreign.files import View

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.foreign.files import Readable

DESCRIPTOR = "stream.zstd"
_PIECE = 1 << 20
_TAIL = 64 << 10
"""Bytes kept of the end of the stream: there a zip has its directory."""


def check(transforms: tuple[str, ...], what: str) -> None:
    """Unsupported unless the record was compressed with zstd alone, and a module is there that decompresses it."""
    if [t.partition("/")[0] for t in transforms] != [DESCRIPTOR] or not transforms[0].partition("/")[2].startswith("1"):
        raise Unsupported(f"{what}: written through {', '.join(transforms)}; only {DESCRIPTOR}/1 is read")
    _module(what)


def _module(what: str) -> Any:
    try:
        import zstandard
    except ImportError as e:
        raise Unsupported(f"{what}: compressed with zstd; install what reads it: pip install 'distckpt[dcp]'") from e
    return zstandard


class Inflated:
    """A compressed record as the file it was. It is read once when opened: for its length and its last bytes."""

    sequential = True

    def __init__(self, file: Readable, start: int, length: int, name: str) -> None:
        self.name = name
        self._raw, self._start, self._length = file, start, length
        self._zstandard = _module(name)
        self._stream, self._at = self._restarted(), 0
        self.size, self._tail = 0, b""
        while piece := self._next(_PIECE):
            self.size += len(piece)
            self._tail = (self._tail + piece)[-_TAIL:]

    @property
    def read_count(self) -> int:
        """Bytes read of the compressed file; those of its neighbours too, which share it."""
        return 0

    def read(self, start: int, buffers: Sequence[memoryview]) -> None:
        """See Readable.read."""
        for buffer in buffers:
            if start >= self.size - len(self._tail) and start + len(buffer) <= self.size:
                begin = start - (self.size - len(self._tail))
                buffer[:] = self._tail[begin : begin + len(buffer)]
            else:
                self._read(start, buffer)
            start += len(buffer)

    def _read(self, start: int, buffer: memoryview) -> None:
        if start < self._at:
            self._stream, self._at = self._restarted(), 0
        while self._at < start:
            if not self._next(min(_PIECE, start - self._at)):
                raise KeyTruncated(f"{self.name}: ends at byte {self._at}; byte {start} was asked for")
        done = 0
        while done < len(buffer):
            piece = self._next(min(_PIECE, len(buffer) - done))
            if not piece:
                raise KeyTruncated(f"{self.name}: ends at byte {self._at}; {len(buffer) - done} more were expected")
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def _next(self, count: int) -> bytes:
        try:
            piece: bytes = self._stream.read(count)
        except self._zstandard.ZstdError as e:
            raise Corrupt(f"{self.name}: cannot be decompressed: {e}") from e
        self._at += len(piece)
        return piece

    def _restarted(self) -> Any:
        view = View(self._raw, self._start, self._length)
        return self._zstandard.ZstdDecompressor().stream_reader(view, read_size=_PIECE, read_across_frames=True)
