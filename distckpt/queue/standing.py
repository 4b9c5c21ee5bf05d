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

from distckpt.errors import DistckptError
from distckpt.run.events import Following
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
    """A run's state, and what its events tell. crashes: in a row, without progress. problem: why nothing is known."""

    state: State
    crashes: int
    events: Sequence[Event]
    problem: str = ""

    @property
    def gpus(self) -> list[int]:
        """GPUs that its command was last started on."""
        return list(next((e.get("gpus", []) for e in reversed(self.events) if e["event"] == "started"), []))


def standing(run: Run, restarts: int, following: Following | None = None) -> Standing:
    """Where a run stands now. following: its events, where they have been read before.

    A run that cannot be looked at has failed: the others go on.
    """
    following = following or Following(run.root)
    try:
        following.look()
        crashes = crashes_in_a_row(following.seen)
        return Standing(_state(run, following.seen, crashes, restarts), crashes, following.seen)
    except (DistckptError, OSError) as e:
        return Standing(State.FAILED, 0, (), str(e))


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
    """How often the command has crashed since a launch of it last came further than it began, or it was told to go on.

    What is killed because the queue is stopped has not crashed.
    """
    count, reached = 0, -1
    for event in reversed(events):
        match event["event"]:
            case "started" if event.get("afresh"):
                break
            case "committed":
                reached = max(reached, event["step"])
            case "launched" if reached > event.get("step", -1):
                break
            case "launched":
                reached = -1
            case "exited":
                count += event.get("code") not in {0, REQUEUE, STOPPED} and not event.get("told")
    return count


def newest_step(events: Sequence[Event]) -> int | None:
    """Step of the newest commit; None where there is none."""
    return next((int(e["step"]) for e in reversed(events) if e["event"] == "committed"), None)


def started_process(events: Sequence[Event]) -> int | None:
    """Process that the run's command was last started as, if it still lives on this machine."""
    last = next((e for e in reversed(events) if e["event"] in {"started", "exited"}), None)
    return last["pid"] if last and last["event"] == "started" and lives(last) else None


def identity(pid: int) -> dict[str, Any]:
    """What `lives` knows a process by."""
    return {"pid": pid, "born": born(pid), "host": socket.gethostname()}


def lives(who: Mapping[str, Any]) -> bool:
    """Whether a process lives on this machine, and is the same one."""
    pid, since = who.get("pid"), who.get("born")
    return who.get("host") == socket.gethostname() and isinstance(pid, int) and since is not None and born(pid) == since


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
