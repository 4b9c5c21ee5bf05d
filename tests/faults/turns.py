"""Jobs that take turns at whatever they ask of their store: who is next, who stands still and who dies is drawn.

So any interleaving of several jobs on one run can be made, and made again from its seed. Each job is a thread, of which
one runs at a time; waiting costs no time, for the clock is theirs as well.
"""

from __future__ import annotations

import contextlib
import threading

from distckpt.run import history
from distckpt.saving import commit
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore

PATIENCE = 60.0
"""Seconds after which a job that does not come to its next turn hangs."""


class Killed(BaseException):
    """The process ends here: no `except` of the code may go on."""


class Job:
    """fn(), which runs only while it has the turn. at: what it asks next; frozen: turns for which it stands still."""

    def __init__(self, name, fn):
        self.name, self._fn = name, fn
        self.at, self.frozen, self.killed, self.ended, self.error = "begins", 0, False, False, None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)
        self.thread.start()

    def _main(self):
        self._go.acquire()
        with contextlib.suppress(Killed):
            try:
                self._fn(self)
            except Exception as e:
                self.error = e
        self.ended = True
        self._back.release()

    def pause(self, point):
        """Called by the job before it does something: others have their turn."""
        if threading.current_thread() is not self.thread:
            return
        if not self.killed:
            self.at = point
            self._back.release()
            self._go.acquire()
        if self.killed:
            raise Killed(point)

    def turn(self):
        """Let it do one thing."""
        self._go.release()
        assert self._back.acquire(timeout=PATIENCE), f"{self.name} hangs after {self.at!r}"

    def kill(self):
        self.killed = True
        self.turn()
        assert self.ended, f"{self.name} goes on after its death"


class Clock:
    """What `time` is to jobs: a sleep is a turn, and takes no time."""

    def __init__(self):
        self._now = 0.0
        self.pauses = {}

    def monotonic(self):
        return self._now

    def sleep(self, seconds):
        self._now += seconds
        if pause := self.pauses.get(threading.current_thread()):
            pause("sleep")


@contextlib.contextmanager
def clocked():
    """The clock by which jobs wait for each other."""
    clock, modules = Clock(), (history, commit)
    usual = [m.time for m in modules]
    for m in modules:
        m.time = clock
    try:
        yield clock
    finally:
        for m, time in zip(modules, usual, strict=True):
            m.time = time


class _Turned:
    """A store of which every verb is a turn. seen(job, verb, key, data): what it does, told before it is done."""

    job = seen = None

    def _turn(self, verb, key, data=None):
        self.job.pause(f"{verb} {key}")
        self.seen(self.job, verb, key, data)

    def list(self, prefix):
        self._turn("list", prefix)
        return super().list(prefix)

    def head(self, key):
        self._turn("head", key)
        return super().head(key)

    def read(self, key, start, buffers):
        self._turn("read", key)
        super().read(key, start, buffers)

    def content(self, key, limit):
        self._turn("read", key)
        return super().content(key, limit)

    def write(self, key, pieces, *, size, stable=0):
        data = b"".join(bytes(piece) for piece in pieces)
        self._turn("write", key, data)
        super().write(key, [memoryview(data)], size=size)

    def create(self, key, data):
        self._turn("create", key)
        super().create(key, data)
        self.seen(self.job, "created", key, data)

    def delete(self, key):
        self._turn("delete", key)
        super().delete(key)


class TurnedMemory(_Turned, MemoryStore):
    """In memory, which several of them share."""

    def __init__(self, job, seen, data):
        super().__init__()
        self.job, self.seen, self._data = job, seen, data


class TurnedLocal(_Turned, LocalStore):
    """A directory."""

    def __init__(self, job, seen, root):
        super().__init__(root)
        self.job, self.seen = job, seen
