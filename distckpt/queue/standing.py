"""Where a run stands: derived from its directory alone, so that a reboot of everything changes nothing.

Its events say how its command ended and what was committed; its heartbeat and the process that was started last say
whether it runs. What the queue itself notes there (`started`, `exited`) is all that it ever writes.
"""

from __future__ import annotations

import enum
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.run.events import read
from distckpt.run.heartbeat import seen_alive
from distckpt.run.preemption import REQUEUE, STOPPED
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.queue.spec import Run

Event = Mapping[str, Any]


class State(enum.Enum):
    """Where a run stands."""

    FINISHED = "finished"
    RUNNING = "running"
    RESUMABLE = "resumable"
    FAILED = "failed"
    STOPPED = "stopped"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class Standing:
    """A run's state, and what its events tell. crashes: in a row, without a checkpoint between."""

    state: State
    crashes: int
    events: Sequence[Event]


def standing(run: Run, restarts: int) -> Standing:
    """Where a run stands now."""
    events = [event for event, _ in read(run.root)]
    crashes = crashes_in_a_row(events)
    return Standing(_state(run, events, crashes, restarts), crashes, events)


def _state(run: Run, events: Sequence[Event], crashes: int, restarts: int) -> State:
    last = next((e for e in reversed(events) if e["event"] in {"started", "exited"}), None)
    if started_process(events) is not None or seen_alive(LocalStore(run.root)):
        return State.RUNNING
    if last and last.get("code") == 0 and last["event"] == "exited":
        return State.FINISHED
    if last and last.get("code") == STOPPED:
        return State.STOPPED
    if crashes > restarts:
        return State.FAILED
    return State.RESUMABLE if newest_step(events) is not None else State.WAITING


def crashes_in_a_row(events: Sequence[Event]) -> int:
    """How often the command has crashed since it last committed a checkpoint, or was told to go on."""
    count = 0
    for event in reversed(events):
        if event["event"] == "committed" or (event["event"] == "started" and event.get("afresh")):
            break
        count += event["event"] == "exited" and event.get("code") not in {0, REQUEUE, STOPPED}
    return count


def newest_step(events: Sequence[Event]) -> int | None:
    """Step of the newest commit; None where there is none."""
    return next((int(e["step"]) for e in reversed(events) if e["event"] == "committed"), None)


def started_process(events: Sequence[Event]) -> int | None:
    """Process that the run's command was last started as, if it still lives on this machine."""
    last = next((e for e in reversed(events) if e["event"] in {"started", "exited"}), None)
    if not last or last["event"] != "started" or last.get("host") != socket.gethostname():
        return None
    pid = last.get("pid")
    return pid if isinstance(pid, int) and born(pid) == last.get("born") else None


def born(pid: int) -> str | None:
    """What tells a process from a later one with its number: machine's boot, and ticks since. None: it is no more."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if state in {"Z", "X"} else f"{boot}.{rest[18]}"


def signal_run(events: Sequence[Event], number: int) -> bool:
    """Signal the process group that a run was started as. False where it is not there."""
    pid = started_process(events)
    if pid is None:
        return False
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def age(event: Event) -> float:
    """Seconds since an event."""
    return max(0.0, time.time() - float(event["time"]))
