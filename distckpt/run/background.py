"""The writer process as the training process sees it: arenas to stage in, jobs it works on, what became of them."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
import weakref
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from distckpt.errors import (
    Corrupt,
    DistckptError,
    FormatError,
    RanksMissing,
    StateWarning,
    StoreError,
    by_name,
    failure_text,
)
from distckpt.format.layout import ack_file
from distckpt.run.line import Line
from distckpt.run.writer import brief
from distckpt.saving.arena import Arena
from distckpt.saving.commit import committed_manifest, write_refusal
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distckpt.run.publish import Then
    from distckpt.saving.part import Part
    from distckpt.store.base import Store

ARENAS = 2
"""Images in flight at once: one being written, one being staged."""
_GRACE = 5.0
"""Seconds that are waited longer than the writer process itself waits, so that it can say for whom."""
_SPARE = 1 << 20
"""Bytes that an arena is larger than need be: values grow a little from save to save."""


@dataclass(slots=True)
class Job:
    """One part that the writer process was given. `error`: why it failed, once `ended`."""

    number: int
    store: Store
    part: Part
    arena: int | None = None
    nbytes: int = 0
    ended: bool = False
    error: DistckptError | None = None
    seconds: float = 0.0
    """That the writer process worked on it."""
    notes: list[str] = field(default_factory=list)
    copying: threading.Thread | None = None


class Background:
    """The writer process of this rank. Started when first needed, and again if it has died.

    timeout: seconds that any wait for it lasts at most. limit: most bytes of an arena. hold: see Checkpointer,
    in seconds.
    """

    def __init__(self, timeout: float, limit: int | None = None, hold: float = 0.0) -> None:
        self._timeout, self._hold = timeout, hold
        self._replication: dict[str, Any] | None = None
        self.limit = limit
        self._arenas: dict[int, Arena] = {}
        self._known: set[int] = set()
        self._jobs: list[Job] = []
        self._numbers = count()
        self._line: Line | None = None
        self._taking = threading.RLock()
        """Held by the thread that takes answers: a PendingSave may be asked from any."""
        self._preparing: threading.Thread | None = None
        self._forgotten: Callable[[], Any] = lambda: None

    # -- the process -------------------------------------------------------------------------------------------------

    def start(self) -> Line:
        """Start the process unless it runs. It is not waited for. StoreError."""
        if not self._line:
            self._line, self._known = Line(self._timeout, self._hold), set()
            self._forgotten = weakref.finalize(self, self._line.forgotten).detach
            if self._replication:
                self._line.send(self._replication)
        return self._line

    def replicate(self, message: dict[str, Any]) -> None:
        """Have the process look for what is to be replicated, now and after each save: see Places.replication."""
        self._replication = {"do": "replicate", **message}
        self._send(self._replication)

    def close(self) -> None:
        """Wait until the process has finished what was staged, and end it; give the arenas back."""
        if self._line and not self._line.ours:
            return  # of a child that was forked
        self._prepared()
        for job in self._jobs:
            if job.copying:
                job.copying.join(self._timeout)
        if self._line:
            self._line.finish()
            self.poll()
            self._lost()
        for arena in self._arenas.values():
            arena.close()
        self._arenas = {}

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        try:
            sent = self.start().send(message, descriptors)
        except StoreError as e:
            self._lost(str(e))
        else:
            if not sent:
                self._lost()

    def poll(self, timeout: float = 0.0) -> None:
        """Take what the process has answered, waiting at most so long for the first answer."""
        if timeout and (line := self._line):
            line.wait(timeout)
        with self._taking:
            while self._line and (said := self._line.answer()):
                if "warn" in said:
                    warnings.warn(said["warn"], StateWarning, stacklevel=4)
                    continue
                job = next((j for j in self._jobs if j.number == said["job"]), None)
                if job:
                    kind, text = said.get("error") or (None, "")
                    job.notes, job.seconds = said.get("notes", []), said.get("seconds", 0.0)
                    self._ended(job, by_name(kind)(text) if kind else None)
            if self._line and self._line.ended:
                self._lost()

    def _lost(self, why: str = "") -> None:
        """The process has ended, or could not be started: so have its jobs."""
        with self._taking:
            if line := self._line:
                self._forgotten()
                line.drop()
                why = f"the writer process ended before it had written it ({line.ended})"
            self._line = None
            for job in list(self._jobs):
                self._ended(job, self._left_behind(job, why))

    def _left_behind(self, job: Job, why: str) -> DistckptError | None:
        """Clear up after a process that has ended. Returns what is wrong; None if it had committed, and not said so."""
        store, part, attempt = job.store, job.part, job.part.attempt
        with contextlib.suppress(StoreError):
            for name in (part.name, ack_file(part.rank, attempt.id)):
                if isinstance(store, LocalStore):
                    store.discard_temporary(attempt.key(name))
        with contextlib.suppress(StoreError, Corrupt, FormatError):
            if committed_manifest(store, attempt):
                return None
        error = StoreError(f"{attempt.directory}: {why}")
        with contextlib.suppress(StoreError):  # so that rank 0 need not wait for this rank's ack
            write_refusal(store, attempt, part.rank, error)
        return error

    def _ended(self, job: Job, error: DistckptError | None) -> None:
        with self._taking:
            if not job.ended:
                job.ended, job.error, job.arena = True, error, None
                self._jobs.remove(job)

    # -- jobs --------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save would have to wait for an arena."""
        self.poll()
        return len(self._jobs) >= ARENAS

    def wait_for_room(self) -> None:
        """Wait until an arena is free. RanksMissing."""
        deadline = time.monotonic() + self._timeout + _GRACE
        while self.busy:
            self._wait_until(deadline, self._jobs[0])

    def begin(self, store: Store, part: Part, then: Then) -> Job:
        """Tell of an attempt that this rank has agreed to: if the training process dies now, the others learn it."""
        job = Job(next(self._numbers), store, part)
        attempt = part.attempt
        self._jobs.append(job)
        self._send(
            {
                "do": "begin",
                "job": job.number,
                "store": store.address,
                "directory": str(attempt.directory),
                "attempt": attempt.id,
                "world_size": attempt.world_size,
                "rank": part.rank,
                "then": then.to_json(),
            }
        )
        return job

    def prepare(self, nbytes: int) -> None:
        """Have the process and an arena of `nbytes` ready for the first save, without waiting for either. OSError."""
        self.start()
        if not self._arenas and (self.limit is None or nbytes <= self.limit):
            self._arenas[0] = arena = Arena(nbytes + _SPARE)
            self._preparing = threading.Thread(target=arena.populate, name="distckpt-arena", daemon=True)
            self._preparing.start()

    def _prepared(self) -> None:
        if self._preparing:
            self._preparing.join()
        self._preparing = None

    def arena(self, job: Job, nbytes: int) -> Arena:
        """Memory of at least `nbytes` for the job; used before, where there is some."""
        self._prepared()
        taken = {j.arena for j in self._jobs}
        number = min(n for n in range(ARENAS) if n not in taken)
        arena = self._arenas.get(number)
        if arena is None or arena.nbytes < nbytes:
            if arena:
                del self._arenas[number]
                arena.close()
            self._known.discard(number)
            self._arenas[number] = arena = Arena(nbytes + _SPARE)
        job.arena = number
        return arena

    def staged(
        self,
        job: Job,
        *,
        header: int,
        covered: int,
        size: int,
        told: tuple[int, int],
        after: Callable[[], None] | None = None,
    ) -> None:
        """Hand a job over: its image lies in its arena, or will once `after` returns, which is waited for elsewhere."""
        assert job.arena is not None
        if job.arena not in self._known and not job.ended:
            arena = self._arenas[job.arena]
            self._send({"do": "arena", "arena": job.arena, "nbytes": arena.nbytes}, [arena.descriptor])
            self._known.add(job.arena)
        job.nbytes = size
        if not job.ended:
            said = {"job": job.number, "arena": job.arena, "header": header, "covered": covered, "size": size}
            message = {"do": "staged", **said, "told": told}
            if after is None:
                self._send(message)
            else:
                then = (self._line, after, message)
                job.copying = threading.Thread(target=_send_after, args=then, name="distckpt-copies")
                job.copying.start()

    def copying(self, job: Job) -> bool:
        """Whether a device still copies the job's state."""
        return job.copying is not None and job.copying.is_alive()

    def written(self, job: Job, size: int) -> None:
        """Say that the training process has written a part itself: on rank 0 it is still to be committed."""
        job.nbytes = size
        if job.part.rank == 0 and not job.ended:
            self._send({"do": "commit", "job": job.number})
        elif not job.ended:
            self._send({"do": "forget", "job": job.number})
            self._ended(job, None)

    def give_up(self, job: Job, error: BaseException) -> None:
        """Say that a job cannot be staged."""
        if not job.ended:
            self._send({"do": "give-up", "job": job.number, "error": brief(error)})
        self._ended(job, error if isinstance(error, DistckptError) else StoreError(failure_text(error)))

    def wait(self, job: Job, timeout: float | None = None) -> None:
        """Wait until a job has ended. RanksMissing if that takes too long."""
        deadline = time.monotonic() + (self._timeout + _GRACE if timeout is None else timeout)
        while not job.ended:
            self._wait_until(deadline, job)

    def _wait_until(self, deadline: float, job: Job) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RanksMissing(f"{job.part.attempt.directory}: the writer process of this rank has not finished it")
        self.poll(min(left, 1.0))


def _send_after(line: Line | None, after: Callable[[], None], message: dict[str, Any]) -> None:
    try:
        after()
    except RuntimeError as e:  # the device failed
        text = f"copying from the device: {e}"
        message = {"do": "give-up", "job": message["job"], "error": brief(StoreError(text))}
    if line:
        line.send(message)  # if it has died, the job's failure is found at the next call
