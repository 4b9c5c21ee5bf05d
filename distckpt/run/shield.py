"""Children that the training process forks (DataLoader's workers) survive the signal that it is told to stop by.

A scheduler or launcher sends the signal to all processes of a job at once; a worker that died of it would end the
training loop before that looks at its flag. So a forked child ignores a signal that its parent was told of at the same
time. One that comes at any other time, as from `Process.terminate()`, ends it as ever.

The parent's main thread may be in the middle of a collective or a kernel, and runs no handler before that returns: a
thread notes the signal, woken by the descriptor that Python writes to at once.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

_WAIT = 1.0
"""Seconds a child waits to see whether its parent was told, too."""
_SAME = 3.0
"""Seconds between parent and child within which it was one request."""

_EXITING = -1.0

_shared = mmap.mmap(-1, 8)
"""When this process was told, on the monotonic clock; seen by its children."""
_owner = 0
_wakes = -1
"""Descriptor that Python writes to when a signal comes; -1: none."""
_signals: set[int] = set()


def install(signals: Iterable[int]) -> None:
    """Shield children that are forked from now on. Called from the main thread."""
    global _shared, _owner, _wakes
    if _owner != os.getpid():  # ranks that were themselves forked are told each for itself
        _shared, _owner, _wakes = mmap.mmap(-1, 8), os.getpid(), _listening()
    if not _signals:
        os.register_at_fork(after_in_child=_in_child)
        _follow_torch()
        atexit.register(_forget)
    _signals.update(signals)


def _listening() -> int:
    """Have a thread note signals. -1 where somebody else (asyncio) is woken by them: then only handlers can."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)
        return -1
    threading.Thread(target=_listen, args=(reads,), name="distckpt-signals", daemon=True).start()
    return writes


def _listen(reads: int) -> None:
    while numbers := os.read(reads, 64):
        if not _signals.isdisjoint(numbers):
            told()


def told() -> None:
    """Note that this process was told to stop, now."""
    _shared[:8] = struct.pack("<d", time.monotonic())


def _forget() -> None:
    """Whatever comes from now on ends the children: multiprocessing terminates them at exit, and waits for that."""
    _shared[:8] = struct.pack("<d", _EXITING)


def _in_child() -> None:
    """The child's handlers; and its own children's, for which the same holds."""
    if (woken := signal.set_wakeup_fd(-1)) != _wakes:
        signal.set_wakeup_fd(woken)
    for number in _signals:
        handler = signal.getsignal(number)
        if handler not in (signal.SIG_IGN, signal.SIG_DFL, None) and getattr(handler, "__module__", "") != __name__:
            signal.signal(number, handle)


def _follow_torch() -> None:
    """A DataLoader's worker gives SIGTERM to a handler of torch's, after the fork: take it back."""
    from torch.utils.data._utils import signal_handling

    theirs = signal_handling._set_worker_signal_handlers  # type: ignore[attr-defined]

    def both() -> None:
        theirs()
        for number in _signals:
            if signal.getsignal(number) is handle:  # as far as Python knows, which torch's C++ does not tell
                signal.signal(number, handle)

    signal_handling._set_worker_signal_handlers = both  # type: ignore[attr-defined]


def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """Ignore a signal that the parent was told of, too; else end as the signal would have it."""
    deadline = time.monotonic() + _WAIT
    while True:
        (parent,) = struct.unpack("<d", _shared[:8])
        if parent == _EXITING:
            os._exit(0)  # quietly: torch tells of a worker that is killed
        if time.monotonic() - parent < _SAME:
            return
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
