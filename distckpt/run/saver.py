"""The saves of one job, one after another: waited for, or in flight; and what of them has failed. Collective."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from distckpt.errors import StateWarning
from distckpt.run.background import ARENAS, Background
from distckpt.run.pending import PendingSave
from distckpt.run.save import SaveReport, save_and_publish
from distckpt.saving.commit import Attempt
from distckpt.saving.frozen import Frozen
from distckpt.saving.image import local_bytes
from distckpt.saving.save import Request, plan
from distckpt.store.base import Roomy

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.loading.open import Checkpoint
    from distckpt.run.history import History
    from distckpt.run.places import Places
    from distckpt.run.publish import Then
    from distckpt.state import State
    from distckpt.store.base import Store

_FAILED, _BUSY = 1, 2
"""What a rank tells the others at the next save: that an earlier one has failed, that it has no room for this one."""


class Saver:
    """when_busy, arena_bytes, hold: as in Checkpointer. To a store in memory, every save is waited for."""

    def __init__(
        self,
        comm: Comm,
        places: Places | None = None,
        *,
        when_busy: Literal["wait", "skip"] = "wait",
        arena_bytes: int | None = None,
        hold: float = 0.0,
    ) -> None:
        if arena_bytes is not None and (type(arena_bytes) is not int or arena_bytes < 0):
            raise ValueError(f"arena_bytes={arena_bytes!r}: a number of bytes, or None for no limit")
        if when_busy not in {"wait", "skip"}:
            raise ValueError(f"when_busy={when_busy!r}: 'wait' or 'skip'")
        self._comm, self._places = comm, places
        self.when_busy: Literal["wait", "skip"] = when_busy
        self._frozen = Frozen(places.near if places else None)
        self._background = Background(comm.timeout, arena_bytes, hold)
        self._pending: list[PendingSave] = []
        self.blocked = 0.0
        """Seconds that the latest save kept training waiting."""
        self._seconds = 0.0
        self._committed = False

    def save(
        self, history: History, capture: Callable[[], State], request: Request, then: Then, *, wait: bool
    ) -> PendingSave | SaveReport | None:
        """Save what `capture` gives in a run, and have `then` follow. None: skipped, and said so."""
        apart = self._places is not None and self._places.apart
        sharing = self._places.sharing if self._places else ()
        request = replace(request, frozen=self._frozen, sharing=sharing, room=lambda: self._room(history.store))
        if history.store.address and (apart or not wait):
            if apart and then.after and self._comm.rank == 0 and not self._committed:
                why = "no node has all of a checkpoint: use a shared local directory, or run them on the root's"
                warnings.warn(f"after_commit commands do not run: {why}", StateWarning, stacklevel=4)
            self.replicate()
            pending = self._in_background(history.store, capture, request, replace(then, apart=apart))
            return pending.result() if pending and wait else pending
        self.finish()
        started = time.monotonic()
        request = replace(request, arena_bytes=self._background.limit)
        made = save_and_publish(self._comm, history, capture, request, then)
        seconds = time.monotonic() - started
        self.blocked = self._seconds = seconds
        self._committed = True
        self.replicate()
        return SaveReport(made.directory.step, str(made.directory), made.nbytes, seconds, made.notes)

    def _in_background(
        self, store: Store, capture: Callable[[], State], request: Request, then: Then
    ) -> PendingSave | None:
        background = self._background

        def captured() -> State:
            if self.when_busy == "wait":
                background.wait_for_room()
            return capture()

        def flag() -> int:
            failed = any(pending.failed for pending in self._pending)
            return _FAILED * failed | _BUSY * (self.when_busy == "skip" and background.busy)

        started = time.monotonic()
        planned = plan(self._comm, store, captured, replace(request, flag=flag))
        if any(flag & _FAILED for flag in planned.flags):
            self.finish()
        if busy := [rank for rank, flag in enumerate(planned.flags) if flag & _BUSY]:
            warnings.warn(
                f"step {request.step} is not saved: rank {busy[0]} is still writing {ARENAS} earlier saves "
                "(when_busy='skip')",
                StateWarning,
                stacklevel=5,
            )
            return None
        pending = PendingSave(self._comm, store, background, planned, then)
        self.blocked = time.monotonic() - started
        self._pending = [*self._pending[-ARENAS:], pending]
        return pending

    def _room(self, store: Store) -> int | None:
        """Bytes free where this rank saves, for rank 0 or the ranks of each node to tell.

        None while an earlier save is in flight, or has failed and is not cleared up: what will be free is not known.
        """
        tells = self._comm.rank == 0 or (self._places is not None and self._places.apart)
        settled = all(p.told or p.seconds for p in self._pending)
        return store.room() if tells and settled and isinstance(store, Roomy) else None

    @property
    def seconds(self) -> float:
        """Seconds that the latest finished save took on this rank, from its call to the commit. 0.0: none yet."""
        self._take_note()
        return self._seconds

    @property
    def has_committed(self) -> bool:
        """Whether a save of this job is known here to be committed."""
        self._take_note()
        return self._committed

    def _take_note(self) -> None:
        if found := [p.seconds for p in self._pending if p.seconds]:
            self._seconds, self._committed = found[-1], True

    def next_generation(self, store: Store, step: int, free: int) -> int:
        """Generation of a step that a save is to make, if in the store `free` is: others may have been begun."""
        at = store.address
        return max(free, *(p.directory.generation + 1 for p in self._pending if (p.address, p.step) == (at, step)), 1)

    def resumed(self, capture: Callable[[], State], found: Checkpoint | None) -> None:
        """Take note of what a launch begins with. found: loaded whole; None: nothing of the run, or a part."""
        self._frozen = Frozen(self._places.near if self._places else None)
        if found:
            content = found.manifest
            attempt = Attempt(found.directory, content.attempt, content.world_size)
            with suppress(Exception):  # on this rank alone; the next save meets it again, and all ranks learn of it
                self._frozen.loaded(capture(), content, attempt)

    def prepare(self, capture: Callable[[], State]) -> None:
        """Have the first save find what it needs: the writer process, and an arena of its size."""
        with suppress(Exception):  # on this rank alone; the save itself meets it again, and all ranks learn of it
            self._background.prepare(local_bytes(capture(), self._comm.world_size))

    def replicate(self) -> None:
        """Have the writer process send what a far store lacks, now and after each save, if this rank's is to."""
        message = self._places.replication() if self._places else None
        if message:
            self._background.replicate(message)

    def finish(self) -> None:
        """Wait for saves in flight. Raises what the first that failed raised; none is in flight then."""
        problem: Exception | None = None
        pending, self._pending = self._pending, []
        for save in (p for p in pending if not p.told):
            try:
                save.wait()
                self._seconds, self._committed = save.seconds, True
            except Exception as e:  # noqa: BLE001, PERF203  the later ones are finished, too, before it is raised
                problem = problem or e
        if problem:
            raise problem

    def close(self, *, failed: bool = False) -> None:
        """Finish, and end the writer process. failed: an exception is being raised already: do not meet other ranks.

        What is staged is written and committed then, too.
        """
        try:
            if not failed:
                self.finish()
        finally:
            self._background.close()
