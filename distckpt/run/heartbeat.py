"""A job that lives says so: a counter beside its launch's record, so that a second job on the same run notices.

A courtesy: what a job commits that was wrongly taken for dead is fenced off by its launch (`run/launches.py`). A beat
is stale once its counter has not changed during three intervals of the watcher's own clock; no two clocks are compared.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from distckpt.errors import FormatError, KeyMissing, RunConflict, StoreError
from distckpt.format.layout import beat_file
from distckpt.format.text import read_json
from distckpt.run.launches import job_name, read_launches
from distckpt.store.base import read_all, write_all

if TYPE_CHECKING:
    from distckpt.run.launches import Launch
    from distckpt.store.base import Dated, Store

    class Beats(Store, Dated, Protocol):
        """A store that knows when a beat was written."""


INTERVAL = 5.0
"""Seconds between beats."""
_STALE = 3
"""Intervals without a beat after which a job counts as dead."""
_MOST = 1 << 16


class Heartbeat:
    """The beat of this job. Used on rank 0 only."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._number = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, number: int) -> None:
        """Beat for launch `number` from now on."""
        self.stop()
        self._number = number
        self._beat(0)
        self._stop = threading.Event()
        arguments = (weakref.ref(self), self._stop)
        self._thread = threading.Thread(target=_run, args=arguments, name="distckpt-heartbeat", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._stop.set)  # whoever forgets to close has let go of the run all the same

    def _beat(self, count: int, *, ended: bool = False) -> None:
        said = {"count": count, "host": socket.gethostname(), "pid": os.getpid(), "interval": INTERVAL, "ended": ended}
        try:
            write_all(self._store, beat_file(self._number), json.dumps(said).encode())
        except StoreError:
            return  # a missed beat: the next may succeed; saves tell of a store that stays broken

    def stop(self) -> None:
        """Say that the job has ended."""
        if self._thread:
            self._stop.set()
            self._thread.join(2 * INTERVAL)
            stuck, self._thread = self._thread.is_alive(), None
            if not stuck:  # else the store does not answer, and the beat will be seen to have stopped
                self._beat(-1, ended=True)


def _run(heartbeat: weakref.ref[Heartbeat], stop: threading.Event) -> None:
    count = 0
    while not stop.wait(INTERVAL):
        count += 1
        if not (beats := heartbeat()):
            return
        beats._beat(count)
        del beats


def refuse_living(store: Store, patience: float) -> None:
    """RunConflict if another job that lives trains on this run. Waits `patience` seconds at most to find out."""
    launches = read_launches(store)
    if launches and launches[-1].job != job_name() and (beat := living(store, patience)):
        newest = launches[-1]
        raise RunConflict(
            f"{store}: {newest.job} on {newest.host} (process {beat['pid']}, since {newest.date}) is training on "
            "this run: its heart beats. Stop it first, or use another directory; to only read, use load()"
        )


def living(store: Store, patience: float) -> dict[str, Any] | None:
    """Beat of the run's newest launch, if it lives. Waits `patience` seconds at most to find out."""
    launches = read_launches(store)
    first = _read(store, launches[-1]) if launches else None
    if first is None or first["ended"] or _is_dead_here(first):
        return None
    deadline = time.monotonic() + min(patience, _STALE * first["interval"])
    while time.monotonic() < deadline:
        time.sleep(min(0.2, first["interval"] / 4))
        beat = _read(store, launches[-1])
        if beat is None or beat["ended"]:
            return None
        if beat["count"] != first["count"]:
            return beat
    return None


def has_ended(store: Store) -> bool:
    """Whether the job of the newest launch has said that it ended, well or not."""
    launches = read_launches(store)
    beat = _read(store, launches[-1]) if launches else None
    return beat is not None and bool(beat["ended"])


def seen_alive(store: Beats) -> bool:
    """Whether a job seems to train on a run, found out without waiting: its beat is young by this machine's clock."""
    launches = read_launches(store)
    beat = _read(store, launches[-1]) if launches else None
    if beat is None or beat["ended"] or _is_dead_here(beat):
        return False
    young: float = _STALE * beat["interval"]
    return abs(time.time() - store.changed(beat_file(launches[-1].number))) < young  # a clock may be set back


def _read(store: Store, launch: Launch) -> dict[str, Any] | None:
    try:
        said: Any = read_json(read_all(store, beat_file(launch.number), limit=_MOST))
    except (KeyMissing, FormatError):
        return None
    match said:
        case {"count": int(), "host": str(), "pid": int(), "interval": float() | int(), "ended": bool()}:
            return dict(said)
    return None


def _is_dead_here(beat: dict[str, Any]) -> bool:
    """Whether it ran on this machine, and its process is no more."""
    if beat["host"] != socket.gethostname():
        return False
    try:
        os.kill(beat["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
