"""What torch.save wrote before 1.6, or is told to: pickles one after another, then each storage with its length.

Where the storages lie is known only once the pickle has been read to its end, so it is read twice.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError
from distckpt.foreign.files import View, read_bytes
from distckpt.foreign.located import Record
from distckpt.foreign.pickles import PLAIN, unpickle_stream
from distckpt.foreign.plain_values import plain
from distckpt.foreign.torchfile import LEGACY, parse, refuse_other

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.foreign.files import Readable

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_READ_AHEAD = 1 << 16
_LENGTH = 8


def parse_any(file: Readable, more: Mapping[tuple[str, str], Any] = PLAIN) -> Any:
    """Value that torch.save wrote as a file of its own, in either form. Errors as `parse` has them."""
    head = read_bytes(file, 0, min(file.size, 64))
    if head.startswith(LEGACY):
        return _parse(file, more)
    refuse_other(file, head)
    return parse(file, 0, file.size, file.name, more)


def _parse(file: Readable, more: Mapping[tuple[str, str], Any]) -> Any:
    where = file.name
    stream: Any = io.BufferedReader(View(file, 0, file.size), _READ_AHEAD)
    try:
        head = [unpickle_stream(stream, where, {}) for _ in range(3)]
        if head[:2] != [_MAGIC, _PROTOCOL] or head[2].get("little_endian") is not True:
            raise FormatError(f"{where}: not the old form of torch.save, or of another byte order")
        start = stream.tell()
        sizes: dict[str, int] = {}

        def unknown(key: str, nbytes: int) -> Record:
            sizes[key] = nbytes
            return Record(0, nbytes, 0)

        unpickle_stream(stream, where, more, unknown)
        order = unpickle_stream(stream, where, {})
        records = _records(file, order, sizes, stream.tell())
        stream.seek(start)
        return plain(unpickle_stream(stream, where, more, lambda key, _: records[key]), where)
    except DistckptError:
        raise
    except Exception as e:
        raise Corrupt(f"{where}: not what torch.save writes, or cut short ({type(e).__name__}: {e})") from e


def _records(file: Readable, order: list[str], sizes: dict[str, int], at: int) -> dict[str, Record]:
    """Storages, which follow one another, each behind the number of its elements."""
    found = {}
    for key in order:
        at += _LENGTH
        found[key] = Record(at, sizes[key], 0)
        at += sizes[key]
    if at > file.size or found.keys() != sizes.keys():
        raise Corrupt(f"{file.name}: has {file.size} bytes, its storages end at {at}: the file was cut short")
    return found
