"""Children that the training process forks (DataLoader's workers) survive the signal that it is told to stop by.

A scheduler or launcher sends the signal to all processes of a job at once; a worker that died of it would end the
training loop before that looks at its flag. So a forked child ignores a signal that its parent was told of at the same
time. One that comes at any other time, as from `Process.terminate()`, ends it as ever.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

_WAIT = 0.5
"""Seconds a child waits to see whether its parent was told, too."""
_SAME = 3.0
"""Seconds between parent and child within which it was one request."""

_shared = mmap.mmap(-1, 8)
"""When this process was told, on the monotonic clock; seen by its children."""
_owner = os.getpid()
_signals: set[int] = set()


def install(signals: Iterable[int]) -> None:
    """Shield children that are forked from now on."""
    global _shared, _owner
    if _owner != os.getpid():  # ranks that were themselves forked are told each for itself
        _shared, _owner = mmap.mmap(-1, 8), os.getpid()
    if not _signals:
        os.register_at_fork(after_in_child=_in_child)
    _signals.update(signals)


def told() -> None:
    """Note that this process was told to stop, now."""
    _shared[:8] = struct.pack("<d", time.monotonic())


def _in_child() -> None:
    """The child's handlers; and its own children's, for which the same holds."""
    for number in _signals:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, signal.SIG_DFL, None) and getattr(handler, "__module__", "") != __name__:
            signal.signal(number, handle)


def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Ignore a signal that the parent was told of, too; else end as the signal would have it."""
    deadline = time.monotonic() + _WAIT
    while True:
        (parent,) = struct.unpack("<d", _shared[:8])
        if time.monotonic() - parent < _SAME:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
