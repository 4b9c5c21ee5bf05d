"""Being told to stop: by a signal, a file, or the end of the job's time. Nothing here does more than to note it.

The ranks agree on one step boundary (`run/schedule.py`), save there, and leave with an exit code that says what is
next. Nothing is ever saved inside a signal handler.
"""

from __future__ import annotations

import enum
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import StateWarning
from distckpt.run import shield
from distckpt.run.triggers import duration
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from types import FrameType

REQUEUE = 75
"""Exit code: stopped by the system; start the job again (EX_TEMPFAIL)."""
STOPPED = 76
"""Exit code: stopped because somebody asked; do not start it again by itself."""

_AGAIN = 10.0
"""Seconds within which the same signal is the same request: schedulers and launchers pass it on, up to three times."""
_AGAIN_BY_HAND = 1.0
"""The same for SIGINT: who presses Ctrl-C twice means it."""
GRACE = 30.0
"""Seconds from a signal to the kill that follows: what torchrun, SLURM and Kubernetes give unless told otherwise."""


class Reason(enum.IntEnum):
    """Why to stop; the largest of all ranks' counts."""

    NONE = 0
    DEADLINE = 1
    SIGNAL = 2
    ASKED = 3

    @property
    def exit_code(self) -> int:
        """Exit code that says so."""
        return {Reason.NONE: 0, Reason.ASKED: STOPPED}.get(self, REQUEUE)


@dataclass(frozen=True, slots=True)
class Preemption:
    """What stops a job, besides its own end.

    signals: by name. stop_file: name of a file in the run's directory; "" for none. grace: from a signal to the kill:
    seconds, or "2 min". deadline: seconds since the epoch at which the job is killed; None for SLURM's, where there is
    one. margin: seconds before the deadline at which to stop, beyond what a save takes.
    """

    signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT")
    stop_file: str = "stop"
    grace: str | float = GRACE
    deadline: float | None = None
    margin: float = 20.0

    def __post_init__(self) -> None:
        for name in self.signals:
            if not isinstance(getattr(signal, name, None), signal.Signals):
                raise ValueError(f"signals={self.signals!r}: {name!r} is no signal here")  # noqa: TRY004
        object.__setattr__(self, "grace", duration(self.grace, "grace"))
        told = os.environ.get("SLURM_JOB_END_TIME", "")
        if self.deadline is None and told.isdigit() and float(told) > time.time():  # else it is of a job that has ended
            object.__setattr__(self, "deadline", float(told))


def leave(exit_code: int) -> None:
    """End the program with an exit code that reaches the script that started the job. Returns under torchrun.

    torchrun takes any code but 0 for a crash, and does not pass it on. So one rank of each node leaves it in the file
    that DISTCKPT_EXIT_FILE names (launch/ reads it there), and the process ends as if all were well.
    """
    told = os.environ.get("DISTCKPT_EXIT_FILE")
    if told and os.environ.get("LOCAL_RANK", "0") == "0":
        path = Path(told).absolute()
        write_all(LocalStore(path.parent), path.name, str(exit_code).encode())
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        sys.exit(exit_code)


@dataclass(slots=True)
class Watch:
    """What one process has been told. The main thread makes and closes it."""

    preemption: Preemption
    root: Path | None
    """The run's directory, where this rank looks for the stop file."""
    _owner: int = field(default_factory=os.getpid)
    _looked: float = 0.0
    _asked: bool = False
    _told: dict[int, float] = field(default_factory=dict)
    _before: dict[int, Any] = field(default_factory=dict)
    _closed: bool = False

    def start(self) -> None:
        """Take the signals over. From any thread but the main one that cannot be done, and is warned of."""
        if threading.current_thread() is not threading.main_thread():
            warnings.warn("preemption: signals can be watched from the main thread only", StateWarning, stacklevel=4)
            return
        shield.install([int(getattr(signal, name)) for name in self.preemption.signals])
        for number in {int(getattr(signal, name)) for name in self.preemption.signals}:
            self._before[number] = signal.signal(number, self._handle)

    def close(self) -> None:
        """Give the signals back; or, where another Watch has taken them over since, leave that to it."""
        self._closed = True
        for number in self._before:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, self._below(number))

    def _below(self, number: int) -> Any:
        """Handler that was there before this one, and is not closed."""
        before = self._before[number]
        while isinstance(other := getattr(before, "__self__", None), Watch) and other._closed:
            before = other._before[number]
        return before if before is not None else signal.SIG_DFL

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. The same one again, later, ends the process as it would have without us."""
        if os.getpid() != self._owner:
            shield.handle(number, frame)  # a child that was forked a moment ago
            return
        now, below = time.monotonic(), self._below(number)
        shield.told()
        if number not in self._told:
            self._told[number] = now
            if isinstance(getattr(below, "__self__", None), Watch):
                below(number, frame)  # that of another Checkpointer of this process, which is to stop, too
        elif now - self._told[number] > (_AGAIN_BY_HAND if number == signal.SIGINT else _AGAIN):
            signal.signal(number, below)
            os.kill(os.getpid(), number)

    def reason(self, save_seconds: float) -> Reason:
        """Why to stop now, if a save takes so long."""
        if signal.SIGINT in self._told or self._is_asked():
            return Reason.ASKED
        if self._told:
            return Reason.SIGNAL
        end = self.preemption.deadline
        late = end is not None and time.time() > end - self.preemption.margin - 2 * save_seconds
        return Reason.DEADLINE if late else Reason.NONE

    def _is_asked(self) -> bool:
        """Whether the stop file is there. Looked for about once a second."""
        if (
            self.root
            and self.preemption.stop_file
            and not self._asked
            and (now := time.monotonic()) - self._looked > 1.0
        ):
            self._looked = now
            self._asked = (self.root / self.preemption.stop_file).exists()
        return self._asked

    def seconds_left(self) -> float:
        """Seconds until the kill, as far as is known; many where nothing is."""
        grace = duration(self.preemption.grace, "grace")
        left = [told + grace - time.monotonic() for n, told in self._told.items() if n == signal.SIGTERM]
        if (end := self.preemption.deadline) is not None:
            left.append(end - time.time())
        return max(0.0, min(left, default=1e9))
