"""Calls of Linux that Python does not have, or has only where it was built on a recent system.

Python as conda and uv ship it is built for old ones: it lacks `os.memfd_create` and `os.pidfd_open` on any machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
from typing import Any

_CLOSE_ON_EXEC = 1
_PIDFD_OPEN = 434  # the same number on every architecture that torch is built for

_library: Any = ctypes.CDLL(None, use_errno=True)


def nameless_file(label: str) -> int:
    """Descriptor of a new, empty file in memory. It has no name; the label is for people."""
    return int(_called(_library.memfd_create, label.encode(), ctypes.c_uint(_CLOSE_ON_EXEC)))


def process_file(process: int) -> int:
    """Descriptor that becomes readable when a process ends. ProcessLookupError where it has ended already."""
    return int(_called(_library.syscall, ctypes.c_long(_PIDFD_OPEN), ctypes.c_int(process), ctypes.c_uint(0)))


def reserve(descriptor: int, nbytes: int) -> None:
    """Have the file system set room aside for a file. OSError where it has none, or cannot.

    Not os.posix_fallocate: where the file system cannot, that writes a byte into each block instead.
    """
    _called(_library.fallocate, descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def is_cached(mapped: Any) -> bool:
    """Whether the first page of a mapped file is in the page cache."""
    place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(mapped)))
    resident = ctypes.c_ubyte(0)
    _called(_library.mincore, place, ctypes.c_size_t(1), ctypes.byref(resident))
    return bool(resident.value & 1)


def readable(descriptors: list[int], seconds: float | None = 0.0) -> set[int]:
    """Which of the descriptors can be read, or are at their end, waiting so long for the first; None: for ever.

    Not select.select: it takes no descriptor above 1023.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)}


def _called(function: Any, *arguments: Any) -> int:
    while (result := function(*arguments)) == -1:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
    return int(result)
