"""A job as one launch of its run: opened by a resume, alive by its heartbeat, fenced off by a later one. Collective."""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import TYPE_CHECKING

from distckpt.comm import together
from distckpt.errors import RunConflict
from distckpt.run.events import note
from distckpt.run.heartbeat import Heartbeat, refuse_living
from distckpt.run.history import History
from distckpt.run.launches import job_name, launch_numbers, open_launch, read_launches
from distckpt.run.publish import now
from distckpt.run.sweep import clear_up
from distckpt.store.base import each
from distckpt.store.local import LocalStore
from distckpt.store.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.format.layout import StepDir
    from distckpt.run.places import Places

_NUMBER = 8  # bytes of a number in a message


class Job:
    """history: of the near store. launch: its number, None before it is opened."""

    def __init__(self, comm: Comm, history: History, places: Places) -> None:
        self._comm, self._history, self._places = comm, history, places
        self._whole = History(places.whole) if places.whole is not places.near else history
        self._store = places.whole
        self._made = time.monotonic()
        self._heartbeat = Heartbeat(self._store)
        self._seen: list[int] | None = None
        """Launches there were before it was looked for what to resume from."""
        self.launch: int | None = None

    def settle(self) -> str:
        """Refuse a run that another job trains on; wait for saves that a lost job left behind. Returns notes."""

        def look() -> bytes:
            if self._comm.rank == 0:
                self._seen = launch_numbers(self._store)
                refuse_living(self._store, self._comm.timeout / 2)
            if not self._places.leads:
                return b""
            self._places.open()
            quiet = min(1.0, self._comm.timeout / 4)
            return "; ".join(self._history.settle(quiet=quiet, limit=self._comm.timeout / 2))[:100].encode()

        self._places.meet(self._comm)
        notes = together(self._comm, "looking for unfinished saves", look)[0].decode(errors="ignore")
        return "; ".join(filter(None, [notes, *self._places.settle(self._comm, self._history, self._whole)]))

    def open(self, resumed_from: StepDir | None) -> None:
        """Open a launch, given what was resumed from, as rank 0 knows it."""
        self._open(lambda: resumed_from)

    def open_without_resume(self) -> int:
        """Open one for a job that saves without having resumed: only where there is nothing to resume from."""

        def nothing() -> None:
            if newest := next((found for found in self._whole.committed() if not found.superseded), None):
                raise RunConflict(
                    f"{self._store} holds {newest.directory}: call resume() before save(), or use another directory"
                )

        self._places.meet(self._comm)
        return self._open(nothing)

    def _open(self, resumed_from: Callable[[], StepDir | None]) -> int:
        def begin() -> bytes:
            if self._comm.rank:
                return b""
            self._whole.refuse_checkpoint()
            self._places.open()
            resumed, ranks = resumed_from(), self._comm.world_size
            number = open_launch(self._store, resumed, ranks, now(), self._seen)
            who = {"job": job_name(), "host": socket.gethostname(), "pid": os.getpid()}
            step, since = resumed.step if resumed else None, round(time.monotonic() - self._made, 3)
            note(self._places.near, "launched", launch=number, step=step, world_size=ranks, seconds=since, **who)
            self._heartbeat.start(number)
            if not self._places.apart:
                self._open_here(number)
            if isinstance(self._places.whole, Tiers):
                clear_up(self._whole, number)
                if isinstance(self._places.whole.far, LocalStore):  # which writers send to meanwhile: this job's, too
                    clear_up(History(self._places.whole.far), number, alone=False)
            return number.to_bytes(_NUMBER, "little")

        self.launch = int.from_bytes(together(self._comm, "opening a launch", begin)[0], "little")
        if self._places.apart:
            together(self._comm, "opening a launch on every node", partial(self._open_here, self.launch))
        return self.launch

    def _open_here(self, number: int) -> None:
        """What is done in each near store, once the launch is open: an earlier one sends nothing more by now."""
        if self._places.leads:
            self._places.open()
            clear_up(self._history, number)

    def free_generation(self, step: int) -> int:
        """Generation of a step that this launch may save. RunConflict once a later one has begun. Not collective."""

        def look(what: str) -> int:
            if what == "generations":
                return self._history.next_generation(step)
            self.refuse_if_superseded()
            return 1

        # at once, for training waits for both
        return max(*each(self._places.near.pace, look, ("launches", "generations")), self._places.generation(step))

    def refuse_if_superseded(self) -> None:
        """RunConflict once a later launch has begun: what this one saves would never be resumed."""
        near = self._places.near
        if max(launch_numbers(near), default=0) > (self.launch or 0):
            launches = read_launches(near)
            newest = launches[-1] if launches else None
            if newest and newest.number > (self.launch or 0):  # else who opened it has not signed it as must be
                raise RunConflict(
                    f"{self._store}: launch {newest.number} ({newest.job} on {newest.host}, {newest.date}) has resumed "
                    f"this run since launch {self.launch} began, and nothing that this job saves would ever be "
                    "resumed. Stop this job, or the other and start this one again; to only read a run, use load(), "
                    "not resume()"
                )

    def close(self) -> None:
        """Say that the job has ended. Not collective."""
        self._heartbeat.stop()
