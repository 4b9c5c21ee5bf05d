"""Faults at a chosen point: the n-th thing that a rank asks of its store or its comm.

A Fuse numbers the points a rank passes while armed and acts at the n-th: it raises, as a broken disk would, or kills
the process, as an out-of-memory killer would. A first pass without an action gives the trace of points there are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
from pathlib import Path

from distckpt.errors import StoreError

RANDOM = re.compile(r"\b[0-9a-f]{12}\b|(?<=\.tmp-)[0-9a-f]{8}\b")
"""Ids of attempts, and what makes the name of a temp file its own."""


def fail(point):
    """Raise what a broken disk would."""
    error = StoreError(f"injected fault at {point!r}")
    error.errno = errno.EIO
    raise error


def kill(*pids):
    """End processes as the out-of-memory killer would."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def memory():
    """Folder for what need not last, as `dir` of tempfile: in memory where there is such a file system."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def writers(trainers):
    """Process ids of the writer processes of these trainers, which may be gone."""
    names = {str(pid).encode() for pid in trainers}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (entry / "cmdline").read_bytes().split(b"\0")
            if any(b"distckpt.run.writer" in part for part in told) and names & set(told):
                found.append(int(entry.name))
    return found


class Fuse:
    """Counts points while armed; acts at number (or name) `at`, once or from then on."""

    def __init__(self, action=fail):
        self._action, self._at, self._forever, self._armed = action, None, False, False
        self._lock = threading.Lock()
        self.trace = []
        self.blown = False

    def arm(self, at=None, *, forever=False):
        self._at, self._forever, self._armed = at, forever, True
        self.trace, self.blown = [], False

    def disarm(self):
        self._armed = False

    def touch(self, point, first=lambda: None):
        """Pass a point; act there if it is the one, having done `first`. Whether it acted, and the action returned."""
        with self._lock:
            if not self._armed:
                return False
            self.trace.append(RANDOM.sub("*", point))
            number = len(self.trace)
            hit = self._at in {number, self.trace[-1]} and not self.blown
            acts = hit or (self.blown and self._forever)
            self.blown = self.blown or hit
        if acts:
            first()
            self._action(self.trace[number - 1])
        return acts


class FaultyStore:
    """A store whose every call is a point: before it, after one that changes something, at each piece of a write."""

    address = None

    def __init__(self, store, fuse):
        self._store, self._fuse, self.pace = store, fuse, store.pace

    def __repr__(self):
        return f"FaultyStore({self._store!r})"

    def list(self, prefix):
        self._fuse.touch(f"list {prefix}")
        return self._store.list(prefix)

    def head(self, key):
        self._fuse.touch(f"head {key}")
        return self._store.head(key)

    def read(self, key, start, buffers):
        self._fuse.touch(f"read {key}")
        self._store.read(key, start, buffers)

    def write(self, key, pieces, *, size, stable=0):
        self._fuse.touch(f"write {key}")
        self._store.write(key, self._counted(key, pieces), size=size, stable=stable)
        self._fuse.touch(f"write {key} done")

    def _counted(self, key, pieces):
        for number, piece in enumerate(pieces, 1):
            yield piece
            self._fuse.touch(f"write {key} piece {number}")

    def create(self, key, data):
        self._fuse.touch(f"create {key}")
        self._store.create(key, data)
        self._fuse.touch(f"create {key} done")

    def delete(self, key):
        self._fuse.touch(f"delete {key}")
        self._store.delete(key)
        self._fuse.touch(f"delete {key} done")


class FaultyComm:
    """A comm whose every all-gather is a point, before and after."""

    def __init__(self, comm, fuse):
        self._comm, self._fuse = comm, fuse
        self.rank, self.world_size, self.timeout = comm.rank, comm.world_size, comm.timeout

    def all_gather(self, what, payload):
        self._fuse.touch(f"all_gather {what}")
        replies = self._comm.all_gather(what, payload)
        self._fuse.touch(f"all_gather {what} done")
        return replies

    def broadcast(self, what, buffer, source):
        self._fuse.touch(f"broadcast {what}")
        self._comm.broadcast(what, buffer, source)
        self._fuse.touch(f"broadcast {what} done")

    def swap(self, what, outgoing, incoming):
        self._fuse.touch(f"swap {what}")
        self._comm.swap(what, outgoing, incoming)

    def close(self):
        self._comm.close()
