"""Host memory that an image is staged in: shared with the writer process by descriptor, and without a name.

So it is gone once both have let go of it, however they ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import weakref
from typing import TYPE_CHECKING, Any

from distckpt.system import nameless_file

if TYPE_CHECKING:
    from collections.abc import Callable

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14
_AT_ONCE = 4 << 20


class Arena:
    """`nbytes` of memory, rounded up to whole pages. `descriptor` is what another process maps it by."""

    def __init__(self, nbytes: int, descriptor: int | None = None) -> None:
        self.nbytes = -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if descriptor is None:
            descriptor = nameless_file("distckpt-arena")
        self.descriptor = descriptor
        self._let_go = weakref.finalize(self, os.close, descriptor)  # one that is forgotten must not keep the memory
        if os.fstat(descriptor).st_size < self.nbytes:
            os.ftruncate(descriptor, self.nbytes)
        self._memory = mmap.mmap(descriptor, self.nbytes)
        self.view = memoryview(self._memory)
        self.laid: tuple[Any, int, list[Any]] = (None, 0, [])
        """Views into it for the image that was staged here last: see `stage`."""
        self.unpin: Callable[[], object] | None = None
        """Undoes what lets a device copy into it directly."""

    def populate(self) -> None:
        """Have the pages made now, so that the first copy does not wait for each."""
        with contextlib.suppress(OSError):  # an older kernel makes them when they are touched
            for start in range(0, self.nbytes, _AT_ONCE):
                self._memory.madvise(_POPULATE_WRITE, start, min(_AT_ONCE, self.nbytes - start))
                time.sleep(0)  # the interpreter lock is held meanwhile: training must not wait for all of it

    def close(self) -> None:
        """Give the memory back, but for what still refers to it."""
        self._let_go()
        self.laid = (None, 0, [])
        if self.unpin:
            self.unpin()
        with contextlib.suppress(BufferError):
            self.view.release()
            self._memory.close()
