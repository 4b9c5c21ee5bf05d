"""The pieces of one file on their way down: in large batches, several in flight, past the page cache where it can be.

O_DIRECT saves a copy of everything and keeps the cache for others, where it really goes past the cache. Many file
systems accept it and do not, so that is probed once for each device: a block is written, and looked for in the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from distckpt import system
from distckpt.store.base import FOR_GOOD

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from typing_extensions import Self

BATCH = 4 << 20
"""Bytes written at once: enough for any device, and still in a core's cache from the sums."""
LARGE = 2 * BATCH
"""Files smaller than this are written plainly."""
IN_FLIGHT = 3
ALIGNMENT = 4096
_MOST_BUFFERS = 1024  # IOV_MAX of Linux
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

_past_cache: dict[int, bool] = {}
"""Device -> whether O_DIRECT goes past the page cache there."""


def write_pieces(descriptor: int, pieces: Iterable[memoryview], size: int, *, stable: int) -> int:
    """Write pieces from byte 0 of a new file, open for reading too, meant to have `size` bytes. Returns their bytes.

    stable: how many more pieces may be asked for while one must stay as it is, as in Store.write.
    """
    if size >= LARGE and goes_direct(descriptor):
        with _unless_unsupported():  # a full disk is found here; in memory, every page would be zeroed first
            system.reserve(descriptor, size)
        return _write_direct(descriptor, pieces, stable=stable)
    if size >= LARGE and stable >= IN_FLIGHT:
        with _InFlight(descriptor) as flight:
            for batch in _batches(pieces, min(_MOST_BUFFERS, (stable + 1) // (IN_FLIGHT + 1))):
                flight.add(batch)
        return flight.position
    position = 0
    for piece in pieces:
        write_at(descriptor, [piece], position)
        position += len(piece)
    return position


@contextlib.contextmanager
def _unless_unsupported() -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in _UNSUPPORTED:
            raise


def write_at(descriptor: int, buffers: Sequence[memoryview], position: int) -> None:
    """Write buffers one after another from a position on, however often the system stops short."""
    rest = [b for b in buffers if len(b)]
    while rest:
        done = os.pwritev(descriptor, rest[:_MOST_BUFFERS], position)
        position += done
        rest = after(rest, done)


def after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of the buffers after their first `done` bytes."""
    rest = []
    for buffer in buffers:
        if done < len(buffer):
            rest.append(buffer[done:])
        done = max(0, done - len(buffer))
    return rest


class _InFlight:
    """Writes of consecutive batches, at most IN_FLIGHT at once. None is running when its block ends."""

    def __init__(self, descriptor: int) -> None:
        self.position = 0
        self._descriptor = descriptor
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "distckpt-write")
        self._running: deque[tuple[int, Future[None]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._claim(len(self._running))

    def add(self, batch: list[memoryview], number: int = FOR_GOOD) -> None:
        """Begin to write a batch, once there is room. The one IN_FLIGHT + 1 before it has been written then."""
        self._claim(len(self._running) - IN_FLIGHT + 1)
        self._running.append((number, self._pool.submit(write_at, self._descriptor, batch, self.position)))
        self.position += sum(map(len, batch))

    def finish(self, number: int) -> None:
        """Wait for the batches that were added with numbers up to this one."""
        self._claim(max((i for i, (n, _) in enumerate(self._running, 1) if n <= number), default=0))

    def _claim(self, count: int) -> None:
        for _ in range(count):
            self._running.popleft()[1].result()


def _batches(pieces: Iterable[memoryview], most: int) -> Iterator[list[memoryview]]:
    """Put pieces together, at most so many: those of IN_FLIGHT batches, and of the one being made, must be good."""
    batch: list[memoryview] = []
    filled = 0
    for piece in pieces:
        batch.append(piece)
        filled += len(piece)
        if filled >= BATCH or len(batch) == most:
            yield batch
            batch, filled = [], 0
    yield batch


# -- past the page cache ---------------------------------------------------------------------------------------------


def _write_direct(descriptor: int, pieces: Iterable[memoryview], *, stable: int) -> int:
    """Write through O_DIRECT: whole blocks from aligned memory. The last is filled up, and cut off afterwards."""
    slabs = deque(memoryview(mmap.mmap(-1, BATCH)) for _ in range(IN_FLIGHT + 1))
    with _InFlight(descriptor) as flight:
        filled = total = 0
        for number, piece in enumerate(pieces):
            total += len(piece)
            taken = 0
            if stable >= IN_FLIGHT and not filled and _is_aligned(piece):
                flight.add([piece], number)
                taken = len(piece)
            while taken < len(piece):
                part = piece[taken : taken + BATCH - filled]
                slabs[0][filled : filled + len(part)] = part
                filled += len(part)
                taken += len(part)
                if filled == BATCH:
                    flight.add([slabs[0]])
                    slabs.rotate(-1)
                    filled = 0
            flight.finish(number - stable)
        if filled:
            flight.add([slabs[0][: -(-filled // ALIGNMENT) * ALIGNMENT]])
    os.ftruncate(descriptor, total)
    return total


def _is_aligned(piece: memoryview) -> bool:
    """Whether O_DIRECT takes the piece where it lies."""
    return (
        not piece.readonly
        and len(piece) >= ALIGNMENT
        and len(piece) % ALIGNMENT == 0
        and ctypes.addressof(ctypes.c_char.from_buffer(piece)) % ALIGNMENT == 0
    )


def goes_direct(descriptor: int) -> bool:
    """Set O_DIRECT where it goes past the page cache, and say whether it is set."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    device = os.fstat(descriptor).st_dev
    if not _past_cache.get(device, True) or not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        if device not in _past_cache:
            _past_cache[device] = not _lands_in_cache(descriptor)
    except OSError as e:
        if e.errno not in _UNSUPPORTED:
            raise
        _past_cache[device] = False
    if not _past_cache[device]:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    return _past_cache[device]


def _lands_in_cache(descriptor: int) -> bool:
    """Whether a block just written through this descriptor is in the page cache."""
    with contextlib.closing(mmap.mmap(-1, ALIGNMENT)) as block:
        os.pwrite(descriptor, block, 0)
    try:
        with contextlib.closing(mmap.mmap(descriptor, ALIGNMENT)) as mapped:
            return system.is_cached(mapped)
    except OSError:
        return True  # cannot be told (FUSE with direct_io maps no files, a sandbox has no mincore): written plainly
