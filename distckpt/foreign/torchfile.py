"""What torch.save writes: a zip of a pickle and of raw storages. `.pt` files, and every record of a DCP directory.

Only the zip's directory, the pickle and 30 bytes for each storage are read; where the elements lie is told by absolute
offset. So a file of any size is opened in the memory of its index.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, KeyTruncated, Unsupported
from distckpt.foreign.files import View, read_bytes
from distckpt.foreign.located import Record
from distckpt.foreign.pickles import PLAIN, VALUES, unpickle
from distckpt.foreign.plain_values import plain
from distckpt.format.manifest import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.foreign.files import Readable

ZIP = b"PK\x03\x04"
LEGACY = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")
"""How files begin that torch.save wrote before 1.6, or with _use_new_zipfile_serialization=False."""

_READ_AHEAD = 1024
_LOCAL = struct.Struct("<26xHH")


def parse(file: Readable, start: int, length: int, where: str, more: Mapping[tuple[str, str], Any] = PLAIN) -> Any:
    """Value that torch.save wrote at [start, start + length) of a file; tensors are Located. more: see `unpickle`.

    Corrupt where it is no such zip, FormatError for a pickle that is malformed, Unsupported for another byte order.
    """
    try:
        archive = _Archive(file, start, length, where)
        data = archive.content("data.pkl")
        order = archive.content("byteorder") if archive.has("byteorder") else b"little"
    except Exception as e:  # of a damaged zip zipfile raises whatever it runs into
        if isinstance(e, DistckptError) and not isinstance(e, KeyTruncated):
            raise
        raise Corrupt(f"{where}: not the zip that torch.save writes ({type(e).__name__}: {e})") from e
    if order != b"little":
        raise Unsupported(f"{where}: saved in byte order {order!r}; only little-endian files are read")
    return plain(unpickle(data, where, VALUES, archive.storage, more), where)


def refuse_other(file: Readable, head: bytes) -> None:
    """FormatError for a file that is no zip, by how it begins."""
    if not head.startswith(ZIP):
        raise FormatError(
            f"{file.name}: neither a zip as torch.save writes it, nor safetensors; it begins with {head[:8]!r}"
        )


class _Archive:
    """The zip's directory, and its entries below their common root."""

    def __init__(self, file: Readable, start: int, length: int, where: str) -> None:
        self._file, self._start, self._length, self._where = file, start, length, where
        self._zip = zipfile.ZipFile(io.BufferedReader(View(file, start, length), _READ_AHEAD))
        roots = [n.removesuffix("data.pkl") for n in self._zip.namelist() if n.endswith("/data.pkl")]
        if len(roots) != 1 or self._has(roots[0] + "constants.pkl"):
            what = "a TorchScript archive" if len(roots) == 1 else f"a zip with {len(roots)} entries data.pkl"
            raise FormatError(f"{where}: {what}; what torch.save writes is expected")
        self._root = roots[0]
        self._records: dict[str, Record] = {}

    def _has(self, name: str) -> bool:
        return name in self._zip.NameToInfo

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name."""
        return self._has(self._root + name)

    def content(self, name: str) -> bytes:
        """Content of an entry, its CRC-32 checked."""
        info = self._zip.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > min(MAX_BYTES, self._length):
            raise FormatError(f"{self._where}: entry {name} is compressed, or of {info.file_size} bytes")
        return self._zip.read(info)

    def storage(self, key: str, _nbytes: int = 0) -> Record:
        """Where the bytes of a storage lie: the zip says how many there are."""
        if key not in self._records:
            if not self.has(f"data/{key}"):
                raise FormatError(f"{self._where}: has no data of storage {key!r}")
            info = self._zip.getinfo(f"{self._root}data/{key}")
            header = self._start + info.header_offset
            if info.compress_type != zipfile.ZIP_STORED or not self._fits(header, _LOCAL.size):
                raise FormatError(f"{self._where}: storage {key!r} is compressed, or outside its record")
            begin = header + _LOCAL.size + sum(_LOCAL.unpack(read_bytes(self._file, header, _LOCAL.size)))
            if not self._fits(begin, info.file_size):
                raise Corrupt(f"{self._where}: storage {key!r} of {info.file_size} bytes does not fit in its record")
            self._records[key] = Record(begin, info.file_size, info.CRC)
        return self._records[key]

    def _fits(self, start: int, size: int) -> bool:
        return self._start <= start and start + size <= self._start + self._length
