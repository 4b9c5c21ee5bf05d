"""A save that training does not wait for: staged here, and committed by the writer process. Collective."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from distckpt.comm import together
from distckpt.errors import OutOfStep, RanksMissing, failure_text
from distckpt.format import manifest
from distckpt.run.events import note
from distckpt.run.save import SaveReport
from distckpt.saving.commit import is_committed
from distckpt.saving.part import abandon_part, write_part
from distckpt.saving.ring import content
from distckpt.saving.stage import stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.format.layout import StepDir
    from distckpt.run.background import Background
    from distckpt.run.publish import Then
    from distckpt.saving.save import Planned
    from distckpt.store.base import Store


class PendingSave:
    """A save that is staged; the writer process commits it while training goes on.

    What makes it fail is raised on every rank: by `wait`, `result`, the next save, and Checkpointer.close.
    directory: its name in the run. notes: see SaveReport.
    """

    def __init__(self, comm: Comm, store: Store, background: Background, planned: Planned, then: Then) -> None:
        self._started = time.monotonic()
        self._noted, self._apart = then.noted and comm.rank == 0, then.apart
        self._comm, self._store, self._background, self._part = comm, store, background, planned.part
        self.directory: StepDir = planned.part.attempt.directory
        self.notes = planned.notes
        self._job = background.begin(store, planned.part, then)
        self._report: SaveReport | None = None
        self.told = False
        """Whether its failure has been raised, on every rank."""
        self._copies: Callable[[], None] | None = None
        self._stage(planned)
        self._blocked = time.monotonic() - self._started

    def __repr__(self) -> str:
        return f"PendingSave({self.directory}, {'committed' if self.committed else 'not committed'})"

    @property
    def address(self) -> dict[str, Any] | None:
        """Where the run lies: see Store.address."""
        return self._store.address

    @property
    def step(self) -> int:
        """Step that was saved."""
        return self.directory.step

    @property
    def staged(self) -> bool:
        """Whether this rank's state has been copied, by the device too: then anything may change. Not collective."""
        return self._job.nbytes > 0 and not self._background.copying(self._job)

    @property
    def committed(self) -> bool:
        """Whether the checkpoint is there, as far as this rank can see. Not collective."""
        self._background.poll()
        if not self._job.ended or self._job.error:
            return False
        return self._apart or is_committed(self._store, self.directory)

    @property
    def seconds(self) -> float:
        """Seconds from the call to this rank's end of the work (on rank 0: the commit); 0.0 before, or if it failed."""
        self._background.poll()
        return self._blocked + self._job.seconds if self._job.ended and not self._job.error else 0.0

    @property
    def failed(self) -> bool:
        """Whether it has failed on this rank, and that has been raised nowhere. Not collective."""
        self._background.poll()
        return self._job.error is not None and not self.told

    def wait(self, timeout: float | None = None) -> None:
        """Return once the checkpoint is committed and durable. Collective.

        Raises on every rank what fails on any, with rank and cause; RanksMissing after `timeout` seconds.
        """
        self.result(timeout)

    def result(self, timeout: float | None = None) -> SaveReport:
        """Wait, and say what was saved. Collective; raises as `wait` does."""
        if self._report:
            return self._report

        def finish() -> bytes:
            self._background.wait(self._job, timeout)
            if self._job.error:
                raise self._job.error
            return self._job.nbytes.to_bytes(8, "little")

        try:
            sizes = together(self._comm, f"finishing {self.directory}", finish)
        except (RanksMissing, OutOfStep):
            raise  # the others may have finished, or be at it: a later call, or a resume, finds out
        except Exception as e:
            self.told = True
            abandon_part(self._store, self._part)
            if self._noted:
                note(self._store, "failed", step=self.step, error=failure_text(e))
            raise
        nbytes = sum(int.from_bytes(s, "little") for s in sizes)
        seconds = time.monotonic() - self._started
        self._report = SaveReport(self.step, str(self.directory), nbytes, seconds, self.notes + self._job.notes)
        return self._report

    def _stage(self, planned: Planned) -> None:
        """Copy the state into an arena. Where that fails, the others are told later, when all can hear it."""
        try:
            image, chunks = planned.image()
            if self._background.limit is not None and image.size > self._background.limit:
                with content(image, chunks, self._background.limit) as data:
                    write_part(self._store, self._part, data, len(image.header), image.size)
                self._background.written(self._job, image.size)
                return
            told = json.dumps(
                {
                    "objects": {name: data.decode() for name, data in self._part.objects.items()},
                    "draft": manifest.to_json(self._part.draft) if self._part.draft else None,
                }
            ).encode()
            end = image.table_start + len(told)
            arena = self._background.arena(self._job, end)
            self._copies = stage(image, chunks, planned.lasting(), arena)
            arena.view[image.table_start : end] = told
        except BaseException as e:  # kept in the job, and raised on every rank at the next call
            self._background.give_up(self._job, e)
            if not isinstance(e, Exception):
                raise  # the user's Ctrl-C
            return
        self._background.staged(
            self._job,
            header=len(image.header),
            covered=image.table_start,
            size=image.size,
            told=(image.table_start, end),
            after=self._copies,
        )
