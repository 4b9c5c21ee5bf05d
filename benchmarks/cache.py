"""The page cache: files put out of it before a cold read, and proof that they are out."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from pathlib import Path


class StillCached(Exception):
    """A file that was to be read cold is in memory."""


def resident(path: Path) -> int:
    """Bytes of a file that are in the page cache, as mincore tells."""
    size = path.stat().st_size
    if not size:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


def evict(folder: Path) -> None:
    """Put every file below a folder out of the page cache. StillCached where one stays."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for pause in (0.0, 0.01, 0.1, 1.0):  # pages that another process is just adding to its lists stay for a moment
        time.sleep(pause)
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        files = [path for path in files if resident(path)]
        if not files:
            return
    held = sum(map(resident, files))
    raise StillCached(f"{held} bytes of {len(files)} files below {folder} stay in memory: {files[0].name} and others")


def can_evict(folder: Path) -> bool:
    """Whether files of this folder's file system can be put out of memory. Not on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="cache-probe-", dir=folder) as probe:
        Path(probe, "file").write_bytes(b"\1" * (1 << 20))
        try:
            evict(Path(probe))
        except StillCached:
            return False
    return True
