"""A rank that is not as the others are: it fails, is missing, slow, late, stopped for a while, or says something else.

Whatever it is, every rank gets one error that names it, no wait outlasts its timeout, and the checkpoint before stays.
`crowd`: up to 64 ranks as threads. `stopped`: real ranks, of which one is stopped in a save, and goes on when all is
over: another job has resumed and saved meanwhile.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from distckpt import Checkpointer
from distckpt.comm import TorchComm
from distckpt.errors import DistckptError, RanksMissing
from distckpt.format.box import Box
from distckpt.run.history import History
from distckpt.state import Everywhere, GlobalTensor, Shard
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import ranks
from tests.faults.failpoints import FaultyComm, FaultyStore, Fuse
from tests.faults.sharded import Sharded, on_threads
from tests.faults.tally import Tally
from tests.run import lives

TIMEOUT = 3.0
"""Seconds that a rank waits for the others at most."""
SIZES = (2, 3, 5, 8, 17, 64)
SLACK = 5.0
"""Seconds that an error may come after the timeout: who is missing is asked for, and the machine may be busy."""


# -- what one rank may hold that the others do not -------------------------------------------------------------------


def _shape(state):
    shard = Shard(Box.whole((5, 4)), torch.zeros(5, 4))
    state.tensors["model.same"] = GlobalTensor((5, 4), "float32", Everywhere(), (shard,))


def _dtype(state):
    rows = state.tensors["model.rows"]
    shards = tuple(Shard(shard.region, shard.tensor.double()) for shard in rows.shards)
    state.tensors["model.rows"] = replace(rows, dtype="float64", shards=shards)


def _whole(state):
    state.tensors["model.rows"] = replace(state.tensors["model.rows"], shape=(38, 11))


def _lacks(state):
    del state.tensors["model.rows"]


def _fails(state):
    raise ValueError("it cannot be captured")


HOLDS = {
    "another shape": (_shape, r"model\.same: .*float32\[5, 4\].*|model\.same: .*float32\[5, 3\]"),
    "another dtype": (_dtype, r"model\.rows: .*float64\[37, 11\]"),
    "another global shape": (_whole, r"model\.rows: .*float32\[38, 11\]"),
    "a tensor less": (_lacks, r"model\.rows: rank \d+ should hold .* and does not"),
    "what cannot be captured": (_fails, "ValueError: it cannot be captured"),
}
"""What it is -> what makes it, what the error says of it."""


class Odd(Sharded):
    """Sharded, and on one rank not quite."""

    how = None

    def capture(self):
        state = super().capture()
        if self.how:
            self.how(state)
        return state


# -- ranks as threads ------------------------------------------------------------------------------------------------


class Crowd:
    """One case: a save of step 1, one of step 2 in which a rank is odd, and what other numbers of ranks find."""

    def __init__(self, seed, size=None):
        self.seed, self.draw = seed, random.Random(seed)
        self.size = size or self.draw.choice(SIZES)
        self.odd = self.draw.randrange(self.size)
        self.kind = self.draw.choice([*HOLDS, "another step", "a fault", "a fault", "missing", "slow", "late"])
        self.store, self.problems, self.fuse = MemoryStore(), [], Fuse()
        self.at, self.forever = self.draw.randint(1, 30), self.draw.random() < 0.5
        self.seconds = 0.0

    def __str__(self):
        return f"{self.seed}: of {self.size} ranks, {self.odd}: {self.kind}"

    def saves(self, comm):
        """Save steps 1 and 2 on this rank; seconds, and what step 2 raised."""
        odd = comm.rank == self.odd
        store = FaultyStore(self.store, self.fuse) if odd else self.store
        checkpointer, state = Checkpointer(store, comm=comm, wait=True), Odd(comm.rank, self.size, 1)
        checkpointer.save(1, state)
        state.set(2)
        comm.all_gather("saved", b"")
        if odd and self.kind in HOLDS:
            state.how = HOLDS[self.kind][0]
        if odd and self.kind == "a fault":
            self.fuse.arm(self.at, forever=self.forever)
        if odd and self.kind in {"slow", "late"}:
            time.sleep(comm.timeout * (0.5 if self.kind == "slow" else 1.5))
        if odd and self.kind == "missing":
            return None, 0.0
        started = time.monotonic()
        try:
            checkpointer.save(2 + (odd and self.kind == "another step"), state)
        except DistckptError as e:
            return e, time.monotonic() - started
        finally:
            checkpointer._job._heartbeat._stop.set()
        return None, time.monotonic() - started

    def go(self):
        timeout = 1.0 if self.kind == "late" else TIMEOUT
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = on_threads(self.size, self.saves, timeout=timeout, patience=30)
            if broken := [e for e in found if isinstance(e, Exception)]:
                return [f"{self}: {type(broken[0]).__name__}: {broken[0]}"]
            others = [e for rank, (e, _) in enumerate(found) if rank != self.odd]
            self.look(found[self.odd][0], others)
            if slow := max(seconds for _, seconds in found) > timeout + SLACK:
                self.problems.append(f"it took {slow:.1f} s")
            self.disarmed()
        return [f"{self}: {problem}" for problem in self.problems]

    def look(self, own, others):
        """Whether everybody was told what they must be."""
        told = {type(e).__name__ + str(e) for e in others}
        committed = "step-00000002/commit.json" in self.store._data
        if self.kind == "slow":
            if own or any(others) or not committed:
                self.problems.append(f"it was in time, and the save failed: {own or told}")
        elif self.kind in {"missing", "late"}:
            if not all(isinstance(e, RanksMissing) and f"rank {self.odd} did not answer" in str(e) for e in others):
                self.problems.append(f"the others were told {told}")
            if self.kind == "late" and own is None:
                self.problems.append("who came late believes in a save that the others gave up")
        elif self.kind == "a fault":
            if len({e is None for e in (own, *others)}) > 1:
                self.problems.append(f"some were told, others not: {own}; {told}")
            if own and not all(f"rank {self.odd}" in str(e) and "injected fault" in str(e) for e in others):
                self.problems.append(f"the others were told {told}")
            if own is None and not committed:
                self.problems.append("nobody was told that nothing was committed")
        elif own is None or not all(others):
            self.problems.append(f"some were told, others not: {own}; {told}")
        else:
            says = HOLDS[self.kind][1] if self.kind in HOLDS else rf"rank {self.odd}: 3|rank 16"
            self.problems += [f"it says {e}" for e in (own, *others) if not _says(e, says, self.odd, self.kind)][:1]

    def disarmed(self):
        """Other numbers of ranks resume what is there, save, and load."""
        self.fuse.disarm()
        committed = "step-00000002/commit.json" in self.store._data
        expected = 2 if committed else 1
        for size, step in ((self.draw.choice(SIZES), 3), (self.draw.choice(SIZES), 4)):

            def resumes(comm, size=size, step=step):
                state = Sharded(comm.rank, size)
                checkpointer = Checkpointer(self.store, comm=comm, wait=True)
                found = checkpointer.resume(state).step, state.value if state.shares(state.value) else "a mix"
                state = Sharded(comm.rank, size, step)
                checkpointer.save(step, state)
                checkpointer._job._heartbeat._stop.set()
                return found

            found = on_threads(size, resumes, timeout=TIMEOUT, patience=30)
            if set(found) != {(expected, expected)}:
                self.problems.append(
                    f"on {size} ranks, step {expected} was resumed as {list(dict.fromkeys(found))[:3]}"
                )
                return
            expected = step


def _says(error, pattern, odd, kind):
    """Whether an error names what was found, and the rank; of what many ranks hold alike, the first is named."""
    return bool(re.search(pattern, str(error))) and (kind == "another step" or f"rank {odd}" in str(error))


# -- real ranks ------------------------------------------------------------------------------------------------------


def save_and_stop(root, victim, point, wait):
    """Save step 1, then step 2, in which a rank is stopped when it comes to a point. (error, seconds, trace)."""
    fuse = Fuse(lambda _: os.kill(os.getpid(), signal.SIGSTOP))
    comm = FaultyComm(TorchComm(TIMEOUT), fuse)
    store = FaultyStore(LocalStore(root), fuse) if wait else root
    checkpointer, state = Checkpointer(store, comm=comm, wait=wait), Sharded(comm.rank, comm.world_size, 1)
    checkpointer.save(1, state, wait=True)
    state.set(2)
    fuse.arm(point if comm.rank == victim else None)
    started, error = time.monotonic(), None
    try:
        made = checkpointer.save(2, state)
        if not wait:
            made.wait()
    except DistckptError as e:
        error = f"{type(e).__name__}: {e}"
    seconds = time.monotonic() - started
    checkpointer._close(failed=error is not None)
    return error, seconds, fuse.trace


def succeed(root, step):
    """Another job: resume, look whether all is whole, and save a step. Returns the step resumed."""
    comm = TorchComm(20.0) if torch.distributed.is_initialized() else None
    size, rank = (comm.world_size, comm.rank) if comm else (1, 0)
    state = Sharded(rank, size)
    with Checkpointer(root, comm=comm, wait=True, timeout=TIMEOUT) as checkpointer:
        found = checkpointer.resume(state).step
        assert state.value == found, f"step {found} has value {state.value}"
        checkpointer.save(step, Sharded(rank, size, step))
    return found


class Stopped:
    """One case. Of the points at which a rank may be stopped, the trace of an undisturbed save tells."""

    def __init__(self, seed, traces):
        draw = random.Random(seed)
        self.seed, self.wait, self.size = seed, draw.random() < 0.6, draw.choice((2, 2, 3))
        self.victim, self.successors = draw.randrange(self.size), draw.choice((1, 2))
        trace = traces[self.wait, self.size][self.victim]
        self.point = draw.randint(1, len(trace))
        self.at, self.beyond = trace[self.point - 1], draw.random() < 0.8
        self.problems = []

    def __str__(self):
        how = "beyond" if self.beyond else "below"
        kind = "waited for" if self.wait else "async"
        return f"{self.seed}: rank {self.victim} of {self.size}, {kind}, stopped {how} the timeout at {self.at!r}"

    def go(self, folder):
        root, place = Path(folder, "run"), Path(folder, "ranks")
        root.mkdir(parents=True)
        place.mkdir()
        group = ranks.start(self.size, save_and_stop, str(root), self.victim, self.point, self.wait, folder=place)
        victim = group[self.victim]
        try:
            lives.until(lambda: _is_stopped(victim.pid) or not victim.is_alive(), 60)
            if not victim.is_alive():
                return "it never came there"
            if self.beyond:
                self.outlived(root, group, victim)
            else:
                time.sleep(TIMEOUT / 3)
                os.kill(victim.pid, signal.SIGCONT)
            for process in group:
                process.join(TIMEOUT + 30)
                if process.is_alive():
                    self.problems.append("a rank hangs")
            self.look(root, ranks.answers(group, place, may_die=range(self.size)))
        except AssertionError as e:
            self.problems.append(f"{type(e).__name__}: {e}")
        finally:
            ranks.kill(group)
        return "goes on in time" if not self.beyond else "goes on when all is over"

    def outlived(self, root, group, victim):
        """The others give up, another job resumes and saves; then the stopped one goes on."""
        for process in group:
            if process is not victim:
                process.join(3 * TIMEOUT + 30)
                if process.is_alive():
                    self.problems.append("a rank waits for ever for one that is stopped")
        committed = max(lives.counting(root))
        found = set(ranks.run(self.successors, succeed, str(root), 3))
        if found - {committed, 2} or len(found) > 1:
            self.problems.append(f"step {committed} was committed, and the next job resumed {found}")
        os.kill(victim.pid, signal.SIGCONT)

    def look(self, root, answers):
        """What the ranks were told, and what is there in the end."""
        counting = lives.counting(root)
        for rank, (error, seconds, _) in enumerate(answers):
            if rank == self.victim and self.beyond:
                continue  # below
            if seconds > TIMEOUT + SLACK + (TIMEOUT if not self.wait else 0):
                self.problems.append(f"rank {rank} waited {seconds:.1f} s")
            if error and not self.beyond:
                self.problems.append(f"rank {rank} was told {error}")
            if error and f"rank {self.victim}" not in error and f"ranks {self.victim}" not in error:
                self.problems.append(f"rank {rank} was told {error}")
        own = answers[self.victim][0]
        if self.beyond and own is None and not LocalStore(root).list("step-00000002"):
            self.problems.append("who was stopped believes in a save that is not there")
        if self.beyond and counting[-1] != 3:
            self.problems.append(f"in the end there are {counting}")
        last = counting[-1]
        if (resumed := ranks.run(1, succeed, str(root), 4)) != [last]:
            self.problems.append(f"{counting} are there, and {resumed} was resumed")
        if problems := [found.problem for found in History(LocalStore(root)).committed() if found.problem]:
            self.problems.append(f"damaged: {problems}")


def _is_stopped(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def traced(wait, size):
    """Points of an undisturbed save, by rank."""
    with tempfile.TemporaryDirectory(prefix="stopped-") as folder:
        answers = ranks.run(size, save_and_stop, folder, None, None, wait)
        assert not any(error for error, _, _ in answers), answers
        return [trace for _, _, trace in answers]


def campaign(seed, seconds, most=10**9):
    """Crowds of threads for half of the time, stopped ranks for the other."""
    tally, started = Tally(), time.monotonic()
    for number in range(most):
        if time.monotonic() > started + seconds / 2:
            break
        crowd(f"{seed}/{number}", tally)
    traces = {(wait, size): traced(wait, size) for wait in (True, False) for size in (2, 3)}
    numbers = iter(range(most))

    def one(_):
        while time.monotonic() < started + seconds and (number := next(numbers, None)) is not None:
            stopped(f"{seed}/{number}", traces, tally)

    with ThreadPoolExecutor(4) as pool:  # most of the time they wait
        list(pool.map(one, range(4)))
    return tally


def crowd(seed, tally, size=None):
    case = Crowd(seed, size)
    problems = case.go()
    tally.add(f"threads: {case.kind}", "wrong" if problems else "as it must be")
    tally.problems += [f"crowd {problem}" for problem in problems]


def stopped(seed, traces, tally):
    case, folder = Stopped(seed, traces), tempfile.mkdtemp(prefix="stopped-")
    try:
        how = case.go(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    what = "a save" if case.wait else "an async save"
    tally.add(f"stopped in {what}: {how}", "wrong" if case.problems else "as it must be")
    tally.problems += [f"stopped {case}: {problem}" for problem in case.problems]
