"""Host memory that an image is staged in: shared with the writer process by descriptor, and without a name.

So it is gone once both have let go of it, however they ended.
"""

from __future__ import annotations

import contextlib
import mmap
import os

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14


class Arena:
    """`nbytes` of memory, rounded up to whole pages. `descriptor` is what another process maps it by."""

    def __init__(self, nbytes: int, descriptor: int | None = None) -> None:
        self.nbytes = -(-max(1, nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if descriptor is None:
            descriptor = os.memfd_create("distckpt-arena", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, self.nbytes)
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, self.nbytes)
        self.view = memoryview(self._memory)

    def populate(self) -> None:
        """Have the pages made now, so that the first copy does not wait for each."""
        with contextlib.suppress(OSError):  # an older kernel makes them when they are touched
            self._memory.madvise(_POPULATE_WRITE)

    def close(self) -> None:
        """Give the memory back, but for what still refers to it."""
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):
            self.view.release()
            self._memory.close()
