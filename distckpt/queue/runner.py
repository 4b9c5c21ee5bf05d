"""Starts the runs of a queue, in order, as slots come free; and starts again what crashed or was stopped by the system.

It keeps nothing in memory that it could not find out again: killed and started anew, it goes on. Runs whose command
outlived it hold their slots until they end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distckpt.errors import KeyExists, RunConflict, StoreError
from distckpt.queue.standing import State, identity, lives, signal_run, standing
from distckpt.run.events import Following, record
from distckpt.run.preemption import REQUEUE, STOPPED
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from distckpt.queue.spec import Queue, Run
    from distckpt.queue.standing import Standing

_LOOK = 0.5
"""Seconds between looks at the runs."""
_LONGEST_BACKOFF = 600.0
GRACE = 120.0
"""Seconds that runs have to save and end, once told to; then they are killed."""
_OVER = (State.FINISHED, State.FAILED, State.STOPPED)


@dataclass(slots=True)
class _Slots:
    """Which run holds which slots; a run that outlived an earlier queue holds as many as it takes."""

    gpu_of: tuple[int | None, ...]
    held: dict[str, list[int]] = field(default_factory=dict)

    def take(self, run: Run, on: Sequence[int] = ()) -> list[int] | None:
        """Hold slots for a run; None where there are too few. on: GPUs that it is on already."""
        if run.name in self.held:
            return self.held[run.name]
        taken = {slot for slots in self.held.values() for slot in slots}
        free = [slot for slot in range(len(self.gpu_of)) if slot not in taken]
        free.sort(key=lambda slot: self.gpu_of[slot] not in on)
        if len(free) < run.slots:
            return None
        self.held[run.name] = free[: run.slots]
        return self.held[run.name]

    def gpus(self, slots: list[int]) -> list[int]:
        """GPUs that slots are on."""
        return sorted({gpu for slot in slots if (gpu := self.gpu_of[slot]) is not None})


class Runner:
    """Runs a queue. retry: start what has failed or was stopped, too. say: told what happens, a line each."""

    def __init__(self, queue: Queue, *, retry: bool = False, say: Callable[[str], None] = print) -> None:
        self._queue, self._say = queue, say
        self._slots = _Slots(queue.gpu_of)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._not_before: dict[str, float] = {}
        self._retry = {run.name for run in queue.runs} if retry else set[str]()
        self._given_up = set[str]()
        self._seen = {run.name: Following(run.root) for run in queue.runs}
        self._told = 0

    def run(self) -> dict[str, State]:
        """Run until nothing is left to run, or told to stop by SIGTERM or SIGINT. Returns where each run stands.

        KeyExists where the queue is being run already.
        """
        with LocalStore(self._queue.folder).locked(self._queue.lock), self._signals():
            lock = self._queue.folder / self._queue.lock
            lock.write_text(json.dumps(identity(os.getpid())), encoding="utf-8")
            while self._look() and not self._told:
                time.sleep(_LOOK)
            if self._told:
                self._stop()
            lock.write_text("")
        states = {run.name: self._standing(run).state for run in self._queue.runs}
        return states | dict.fromkeys(self._given_up, State.FAILED)

    def _standing(self, run: Run) -> Standing:
        return standing(run, self._queue.restarts, self._seen[run.name])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def told(number: int, _: FrameType | None) -> None:
            self._told = number

        before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> bool:
        """Take note of what has ended, and start what can be. Whether anything runs or is to run."""
        self._reap()
        found = {run.name: self._standing(run) for run in self._queue.runs}
        living = [r for r in self._queue.runs if found[r.name].state is State.RUNNING or r.name in self._children]
        self._slots.held = {run.name: self._slots.held[run.name] for run in living if run.name in self._slots.held}
        for run in sorted(living, key=lambda run: not found[run.name].gpus):
            self._slots.take(run, found[run.name].gpus)
        left = [run for run in self._queue.runs if run not in living and self._is_left(run, found[run.name])]
        for run in left:
            if time.monotonic() >= self._not_before.get(run.name, 0.0) and (slots := self._slots.take(run)):
                try:
                    self._start(run, slots, found[run.name])
                except (StoreError, OSError) as e:
                    self._give_up(run, e)
        return bool(living or left)

    def _is_left(self, run: Run, found: Standing) -> bool:
        """Whether a run that does not run is to run yet."""
        retried = run.name in self._retry and found.state is not State.FINISHED
        return run.name not in self._given_up and (found.state not in _OVER or retried)

    def _give_up(self, run: Run, error: Exception) -> None:
        """Start a run no more: what becomes of it cannot be written down, so it would be started without end."""
        self._given_up.add(run.name)
        self._say(f"{run.name}: given up, for its directory cannot be written to: {error}")

    def _reap(self) -> None:
        for run in self._queue.runs:
            child = self._children.get(run.name)
            if child is None or (code := child.poll()) is None:
                continue
            with contextlib.suppress(ProcessLookupError):  # whatever of it was left behind
                os.killpg(child.pid, signal.SIGKILL)
            del self._children[run.name]
            try:
                record(LocalStore(run.root), "exited", code=code, told=bool(self._told) or None)
            except StoreError as e:
                self._give_up(run, e)
                continue
            found = self._standing(run)
            wait = 0.0
            if found.crashes and code not in {0, REQUEUE, STOPPED}:
                wait = min(_LONGEST_BACKOFF, self._queue.backoff * 2 ** (found.crashes - 1))
            self._not_before[run.name] = time.monotonic() + wait
            again = f"; again in {wait:.0f} s" if found.state in {State.RESUMABLE, State.WAITING} else ""
            self._say(f"{run.name}: ended with {code}: {found.state.value}{again}")

    def _start(self, run: Run, slots: list[int], found: Standing) -> None:
        store = LocalStore(run.root)
        attempt = sum(e["event"] == "started" for e in found.events) + 1
        logs = run.root / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        gpus = self._slots.gpus(slots)
        env = {**os.environ, **run.env, **({"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {})}
        afresh = run.name in self._retry or None
        self._retry.discard(run.name)
        with (logs / f"attempt-{attempt:04d}.log").open("wb") as log:
            try:
                child = subprocess.Popen(  # noqa: S603  the command that the queue's file names
                    run.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd=self._queue.folder,
                    env=env,
                )
            except OSError as e:
                log.write(f"{run.command[0]}: {e}\n".encode())
                record(store, "started", afresh=afresh)
                record(store, "exited", code=127, error=str(e))
                self._not_before[run.name] = time.monotonic() + self._queue.backoff
                self._say(f"{run.name}: cannot be started: {e}")
                return
        try:
            record(store, "started", attempt=attempt, afresh=afresh, gpus=gpus or None, **identity(child.pid))
        except StoreError:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        self._children[run.name] = child
        how = "resumes" if found.state is State.RESUMABLE else "begins"
        self._say(f"{run.name}: {how}, attempt {attempt}" + (f", on GPU {', '.join(map(str, gpus))}" if gpus else ""))

    def _stop(self) -> None:
        """Have every run save and end; kill what has not after the grace."""
        self._say("stopping: runs save, and end")
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and self._running():
            self._reap()
            time.sleep(_LOOK)
        for run in self._running():
            self._say(f"{run.name}: has not ended in {GRACE:.0f} s, and is killed")
        self._signal(signal.SIGKILL)
        for child in self._children.values():
            child.wait(GRACE)
        self._reap()

    def _running(self) -> list[Run]:
        return [r for r in self._queue.runs if r.name in self._children or self._standing(r).state is State.RUNNING]

    def _signal(self, number: int) -> None:
        for run in self._queue.runs:
            if child := self._children.get(run.name):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            else:
                signal_run(self._standing(run).events, number)


def runs_it(queue: Queue) -> int | None:
    """Process on this machine that runs a queue; None: nobody does; 0: one has just begun, or ends.

    RunConflict where another machine runs it.
    """
    try:
        with LocalStore(queue.folder).locked(queue.lock):
            return None
    except KeyExists:
        said = (queue.folder / queue.lock).read_text(encoding="utf-8")
    who = json.loads(said) if said else {}
    if who and who["host"] != socket.gethostname():
        raise RunConflict(f"{queue.file}: is run by process {who['pid']} on {who['host']}: stop it there")
    return int(who["pid"]) if lives(who) else 0
