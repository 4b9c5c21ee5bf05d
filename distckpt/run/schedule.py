"""What is due after a step: a save, the end of the job. Decided alike on every rank; cheap where nothing is due."""

from __future__ import annotations

import math
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from distckpt.comm import together
from distckpt.run.preemption import Reason, Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.run.pending import PendingSave
    from distckpt.run.save import SaveReport
    from distckpt.run.saver import Saver
    from distckpt.run.triggers import Triggers

MEETING = 1.0
"""Seconds between meetings of the ranks, about."""
_MOST_STEPS = 64
"""Steps between meetings at most: they may become slow at any time."""


class _Said(NamedTuple):
    """What a rank says at a meeting. Of the first, third and last only rank 0's counts."""

    time_is_up: bool
    reason: int
    steps: int
    seconds_left: float
    save_seconds: float
    committed: bool


_MESSAGE = struct.Struct("<?BHff?")


@dataclass(frozen=True, slots=True)
class Due:
    """What is due. seconds_left: until the job is killed. save_seconds: that a save takes.

    fits: whether a save still fits in; it is tried all the same where there is no checkpoint yet.
    """

    save: bool = False
    reason: Reason = Reason.NONE
    seconds_left: float = math.inf
    save_seconds: float = 0.0
    fits: bool = True


@dataclass(frozen=True, slots=True)
class StepReport:
    """What Checkpointer.step did.

    should_stop: leave the training loop, and the program with `exit_code` (REQUEUE or STOPPED of run/preemption.py;
    `reason` says why): what was to be saved is committed then. note: why nothing was.
    """

    saved: PendingSave | SaveReport | None = None
    reason: Reason = Reason.NONE
    note: str = ""

    @property
    def should_stop(self) -> bool:
        """Whether the job is to end here."""
        return bool(self.reason)

    @property
    def exit_code(self) -> int:
        """What the program is to exit with, if it is to stop."""
        return self.reason.exit_code


class Schedule:
    """Steps of a job. watch: None where nothing but its own end stops the job."""

    def __init__(self, comm: Comm, triggers: Triggers, watch: Watch | None) -> None:
        self._comm, self._triggers, self._watch = comm, triggers, watch
        self._saved_at = self._met_at = time.monotonic()
        self._epoch: int | None = None
        self._steps = 0  # since the last meeting
        self._until_meeting = 1
        self._interval = min(MEETING, triggers.seconds / 10)
        self._meets = watch is not None or triggers.seconds < math.inf

    def resumed(self, epoch: int | None) -> None:
        """Note the epoch that training goes on in."""
        self._epoch = epoch

    def saved(self) -> None:
        """Note that a save begins now."""
        self._saved_at = time.monotonic()

    def look(self, step: int, epoch: Callable[[], int | None], saver: Saver) -> Due:
        """What is due after `step`. Collective, as every step is."""
        save = False
        if self._triggers.steps or self._triggers.functions or self._triggers.epochs:
            now = epoch() if self._triggers.epochs or self._triggers.functions else None
            save = self._triggers.due(step, now, self._epoch)
            self._epoch = now
        if not self._meets:
            return Due(save) if save else _NOTHING
        self._steps += 1
        if self._steps < self._until_meeting:
            return Due(save) if save else _NOTHING
        return self._meet(saver, save=save)

    def _meet(self, saver: Saver, *, save: bool) -> Due:
        replies = together(self._comm, "meeting after a step", lambda: _MESSAGE.pack(*self._own(saver)))
        said = [_Said(*_MESSAGE.unpack(reply)) for reply in replies]
        self._steps, self._until_meeting = 0, said[0].steps
        left, takes = min(s.seconds_left for s in said), max(s.save_seconds for s in said)
        fits = takes < left or not said[0].committed
        return Due(save or said[0].time_is_up, Reason(max(s.reason for s in said)), left, takes, fits)

    def _own(self, saver: Saver) -> _Said:
        now = time.monotonic()
        a_step = (now - self._met_at) / max(1, self._steps)
        self._met_at = now
        steps = 1 if self._comm.world_size == 1 else max(1, min(_MOST_STEPS, int(self._interval / max(a_step, 1e-9))))
        reason = self._watch.reason(saver.seconds) if self._watch else Reason.NONE
        left = self._watch.seconds_left() if self._watch else 1e9
        time_is_up = now - self._saved_at >= self._triggers.seconds
        return _Said(time_is_up, reason, steps, left, saver.seconds, saver.has_committed)


_NOTHING = Due()
