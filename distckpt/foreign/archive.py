"""Zip archives as torch.save makes them: nothing compressed, contents aligned, written as a stream.

A record that is streamed says its size beforehand, and its CRC-32 after its content.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_ALIGNMENT = 64
_DATE = 0x21  # 1 January 1980: the same content is the same bytes on every day
_STREAMED = 8  # sizes and sum stand after the content
_MOST = 0xFFFFFFFF
_MANY = 0xFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """An entry of an archive: `content` if it is known, else `size` bytes to come. `wide`: sizes take 8 bytes."""

    name: bytes
    size: int
    content: bytes | None = None
    start: int = 0
    crc: int = 0
    wide: bool = False

    @staticmethod
    def of(name: str, content: bytes) -> Record:
        """Entry whose content is known."""
        return Record(f"archive/{name}".encode(), len(content), content, crc=zlib.crc32(content))

    @staticmethod
    def streamed(name: str, size: int, *, wide: bool | None = None) -> Record:
        """Entry whose content is to come. Sizes must be wide from 4 GiB on."""
        return Record(f"archive/{name}".encode(), size, wide=size > _MOST - (1 << 20) if wide is None else wide)

    @property
    def length(self) -> int:
        """Bytes from its head to what follows its content."""
        return len(self.head()) + (self.size + len(self.after(0)) if self.content is None else 0)

    def head(self) -> bytes:
        """Local header, with the content where it is known; streamed content comes aligned after it."""
        if self.content is not None:
            return self._local((self.crc, self.size, self.size), b"") + self.content
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) if self.wide else b""
        padding = -(self.start + 30 + len(self.name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        return self._local((0, _MOST, _MOST) if self.wide else (0, 0, 0), extra)

    def _local(self, known: tuple[int, int, int], extra: bytes) -> bytes:
        flags, version = _STREAMED * (self.content is None), 45 if self.wide else 20
        fixed = (version, flags, 0, 0, _DATE, *known, len(self.name), len(extra))
        return struct.pack("<4s5H3I2H", b"PK\3\4", *fixed) + self.name + extra

    def after(self, crc: int) -> bytes:
        """What follows streamed content with this CRC-32."""
        sizes = struct.pack("<QQ" if self.wide else "<II", self.size, self.size)
        return struct.pack("<4sI", b"PK\7\x08", crc) + sizes

    def entry(self) -> bytes:
        """Its entry in the directory at the end."""
        far = self.start >= _MOST
        wide = struct.pack("<QQ", self.size, self.size) if self.wide else b""
        wide += struct.pack("<Q", self.start) if far else b""
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        size, version = (_MOST if self.wide else self.size), 45 if wide else 20
        flags = _STREAMED * (self.content is None)
        fixed = (version, version, flags, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        start = _MOST if far else self.start
        return struct.pack("<4s6H3I2H3H2I", b"PK\1\2", *fixed, 0, 0, 0, 0, start) + self.name + extra


def placed(records: Iterable[Record]) -> tuple[list[Record], int]:
    """(records one after another, where the last one ends)."""
    found, position = [], 0
    for record in records:
        found.append(replace(record, start=position))
        position += found[-1].length
    return found, position


def end(records: list[Record], start: int) -> bytes:
    """Directory of an archive whose records end at byte `start`."""
    directory = b"".join(record.entry() for record in records)
    count, length = len(records), len(directory)
    wide = b""
    if any(r.wide for r in records) or start >= _MOST or count >= _MANY or length >= _MOST:
        wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
        wide += struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
    few, short, near = min(count, _MANY), min(length, _MOST), _MOST if wide else start
    return directory + wide + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, short, near, 0)
