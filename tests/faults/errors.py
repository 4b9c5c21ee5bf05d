"""The n-th fault: every file call of a save, a load and a resume fails, once or from then on, with every error there is.

    python -m tests.faults errors --seconds 600 --seed 1

What comes of it: the operation is whole all the same, or every rank raises one error of ours that says what and where.
The checkpoints before are as they were, the next save succeeds, no fsync that failed is tried again, and nothing is
left: no temp file, no descriptor, thread or process. A file system that is full, a disk that fails, a server that has
forgotten a file, descriptors that are used up; calls that stop short must cost nothing at all.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import random
import shutil
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from distckpt import Checkpointer, Keep
from distckpt.errors import DistckptError
from distckpt.store import local, pieces
from tests.faults import syscalls
from tests.faults.failpoints import Fuse
from tests.faults.sharded import Sharded, on_threads
from tests.faults.tally import Tally

SHORT = 0
"""No error: a read or a write does half of what it is asked for."""
ERRORS = {
    getattr(errno, name): name for name in ("ENOSPC", "EDQUOT", "EIO", "EINTR", "EMFILE", "EACCES", "ESTALE", "EROFS")
} | {SHORT: "short"}
NEVER = 1 << 40
KEEP = Keep(last=2)
TIMEOUT = 6.0
"""Seconds that ranks wait for each other."""


@dataclass(frozen=True)
class Operation:
    """What is done while calls fail, after two saves of `size` ranks, here threads."""

    name: str
    size: int = 1
    wait: bool = True
    rank: int = 0
    """Whose writer process it is that has the faults, if it is not waited for."""
    large: bool = False
    """Files are written as large ones are: room set aside, several writes at once."""

    @property
    def saves(self):
        return self.name.startswith("save")

    def __str__(self):
        told = [self.name, "large" * self.large, f"by the writer of rank {self.rank}" * (not self.wait)]
        return f"{' '.join(filter(None, told))}, {self.size} rank{'s' * (self.size > 1)}"


OPERATIONS = [Operation(name, size) for name in ("save", "load", "resume") for size in (1, 2)]
OPERATIONS += [Operation("save", 1, large=True), Operation("save", 1, wait=False)]
OPERATIONS += [Operation("save", 2, wait=False, rank=rank) for rank in (0, 1)]


@dataclass(frozen=True)
class Case:
    """at: number of the point."""

    of: Operation
    error: int
    at: int
    forever: bool

    def __str__(self):
        return f"{self.of}: {ERRORS[self.error]} {'from' if self.forever else 'at'} point {self.at}"


@dataclass
class Seen:
    """What came of a case. said: of each rank what it raised, and at what value it was then."""

    said: list
    trace: list
    blown: bool
    left: list
    problems: list


def campaign(seed: int, seconds: float, most: int = 1 << 62, among=OPERATIONS) -> Tally:
    """Every case there is, in an order that follows from the seed, until the time is up or so many are done."""
    draw, tally, until = random.Random(seed), Tally(), time.monotonic() + seconds
    ram = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=ram) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bench = Bench(Path(folder))
        cases = [c for of in among for c in bench.cases(of)]
        draw.shuffle(cases)
        tally.figures["cases there are"] = len(cases)
        for case in cases:
            if time.monotonic() > until or tally.cases >= most:
                break
            verdict, told = bench.judged(case)
            problem = f"seed {seed}: {case}: {told}" if told else None
            tally.add(f"{case.of} {ERRORS[case.error]}", verdict, problem)
        tally.figures |= bench.figures
    return tally


class Bench:
    """Runs that cases begin with, by number of ranks."""

    def __init__(self, folder):
        self.folder, self._made, self._number = folder, {}, 0
        self.figures = dict.fromkeys(("faults that were met", "fsyncs that failed", "snapshots of what is held"), 0)

    def run(self, size):
        """A new copy of a run with steps 1 and 2, of so many ranks."""
        if size not in self._made:
            at = self._made[size] = self.folder / f"of-{size}"
            on_threads(size, lambda comm: _two_saves(at, comm, size))
        self._number += 1
        return Path(shutil.copytree(self._made[size], self.folder / f"case-{self._number}" / "run", symlinks=True))

    def trace(self, of):
        """Points of an operation in which nothing fails."""
        return self.tried(Case(of, errno.EIO, NEVER, forever=False)).trace

    def cases(self, of):
        """Every case of an operation."""
        trace = self.trace(of)
        points = range(1, len(trace) + 1)
        torn = [n for n in points if trace[n - 1].endswith(" torn")]
        return [
            Case(of, error, n, forever)
            for error in ERRORS
            for forever in (False, True)
            for n in (torn if error == SHORT else points)
        ]

    def tried(self, case):
        root = self.run(case.of.size)
        try:
            with _as_large() if case.of.large else contextlib.nullcontext():
                return (_here if case.of.wait else _in_writer)(root, case)
        finally:
            shutil.rmtree(root.parent)

    def judged(self, case):
        """(verdict, what must not be)."""
        before = held()
        seen = self.tried(case)
        if (after := held()) != before:
            gc.collect()  # it takes longer than the case does
            after = held()
        self.figures["faults that were met"] += seen.blown
        self.figures["fsyncs that failed"] += bool(seen.blown and " fsync " in f" {_point(seen, case)}")
        self.figures["snapshots of what is held"] += 2
        problems = [*seen.problems, *_of_said(case, seen)]
        if seen.left and not case.forever and not _point(seen, case).startswith(("unlink", "rmdir")):
            problems.append(f"left behind: {seen.left}")
        problems += [f"leaked {what}: {after[what] - before[what]}" for what in before if after[what] - before[what]]
        if problems:
            return "PROBLEM", f"{_point(seen, case)}: {'; '.join(problems)}; {seen.said}"
        if not seen.blown:
            return "passed before it", None
        return ("told" if seen.said[0][0] else "whole"), None


def _point(seen, case):
    return seen.trace[case.at - 1] if case.at <= len(seen.trace) else "?"


def _of_said(case, seen):
    """What is wrong with what ranks raised."""
    if odd := [said for said in seen.said if not isinstance(said, tuple)]:
        yield f"raised what is no error of ours, or hung: {odd}"
        return
    errors = [error for error, _ in seen.said]
    if any(errors) and not all(errors):
        yield "some ranks believe in it"
    if any(errors) and case.error == SHORT:
        yield "it should have cost nothing"
    for error in filter(None, errors):
        if os.strerror(case.error) not in error:
            yield f"does not say {os.strerror(case.error)!r}"
        if "step-" not in error and "/run" not in error:
            yield "does not say where"
    if not any(errors):
        wanted = 3 if case.of.saves else 2
        if any(value != wanted for _, value in seen.said):
            yield f"value {wanted} is expected"
        point = _point(seen, case)
        if seen.blown and case.error != SHORT and point.startswith("fsync step-00000003/.tmp-"):
            yield "a failed fsync is a success" * ("-ack-" not in point)


def held():
    """What this process holds: descriptors, threads, children."""
    found = {"descriptors": set(), "threads": {t.name for t in threading.enumerate()}, "children": set()}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found["descriptors"].add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError):
            found["children"].update(Path(f"/proc/self/task/{task}/children").read_text().split())
    return found


@contextlib.contextmanager
def _as_large():
    """Have small files written as large ones are."""
    usual = local.LARGE, pieces.LARGE, pieces.goes_direct
    local.LARGE = pieces.LARGE = 1
    pieces.goes_direct = lambda _: True
    try:
        yield
    finally:
        local.LARGE, pieces.LARGE, pieces.goes_direct = usual


# -- one case ----------------------------------------------------------------------------------------------------------


def _two_saves(root, comm, size):
    with Checkpointer(root, comm=comm, wait=True, keep=KEEP) as c:
        c.resume(Sharded(comm.rank, size))
        for step in (1, 2):
            c.save(step, Sharded(comm.rank, size, step))


def _here(root, case):
    """Calls of this process fail, while all its ranks are at it."""
    of, fuse, failed, again, left = case.of, Fuse(_action(case.error)), set(), [], []
    make = syscalls.points_of(fuse)

    def answer(call):
        if call.name == "fsync" and call.key in failed:
            again.append(call.key)
        try:
            return make(call)
        except OSError:
            if call.name == "fsync" and not (root / call.key).is_dir():
                failed.add(call.key)
            raise

    def work(comm):
        with Checkpointer(root, comm=comm, wait=True, keep=KEEP) as c:
            state = Sharded(comm.rank, of.size)
            if of.saves:
                c.resume(state)
                state.set(3)
            _meet(comm, lambda: fuse.arm(case.at, forever=case.forever))
            said = _error(lambda: _operate(c, of, state)), state.value
            _meet(comm, fuse.disarm)
            _meet(comm, lambda: left.extend(_unfinished(root, "step-00000003")))
            _go_on(c, of, state)
        return said if state.is_at(state.value) else AssertionError("a mix of two states")

    with syscalls.seen(root, answer):
        said = on_threads(of.size, work, timeout=TIMEOUT)
    problems = [f"fsync of {key} is tried again" for key in again] + _after(root, of)
    return Seen(said, fuse.trace, fuse.blown, left, problems)


def _in_writer(root, case):
    """Calls of the writer processes fail, while they write, commit, and do what follows."""
    of, told, left = case.of, root.parent / "told", []

    def work(comm):
        c = Checkpointer(root, comm=comm, keep=KEEP)
        if comm.rank == of.rank:
            with syscalls.in_writer(syscalls.plant, str(root), str(told), case.at, case.error, case.forever):
                c._saver._background.start()
        comm.all_gather("started", b"")
        state = Sharded(comm.rank, of.size)
        with contextlib.ExitStack() as stack:
            stack.callback(c._close, failed=True)
            c.resume(state)
            state.set(3)
            said = _error(lambda: c.save(3, state).wait()), 3
            _meet(comm, lambda: left.extend(_unfinished(root, "step-00000003")))
            if not case.forever:
                _go_on(c, of, state)
        if case.forever:
            with Checkpointer(root, comm=comm, keep=KEEP) as c:
                state = Sharded(comm.rank, of.size)
                c.resume(state)
                _go_on(c, of, state)
        return said

    said = on_threads(of.size, work, timeout=TIMEOUT)
    trace = told.read_text().splitlines() if told.exists() else []
    of_next = [n for n, point in enumerate(trace) if "step-00000004" in point]
    if not case.forever and of_next and case.at > of_next[0]:  # it came when the next save was on
        return Seen([(None, 3)] * of.size, trace[: of_next[0]], False, [], [])
    return Seen(said, trace, case.at <= len(trace), left, _after(root, of))


def _action(error):
    def act(point):
        if error != SHORT:
            raise OSError(error, os.strerror(error), point)

    return act


def _meet(comm, do):
    """Do it on rank 0, while the others wait."""
    comm.all_gather("before", b"")
    if comm.rank == 0:
        do()
    comm.all_gather("after", b"")


def _operate(c, of, state):
    if of.saves:
        c.save(3, state)
    else:
        getattr(c, of.name)(state)


def _go_on(c, of, state):
    """What the job does next, now that nothing fails. It must succeed."""
    if of.saves:
        state.set(4)
        made = c.save(4, state)
        if hasattr(made, "wait"):
            made.wait()
    else:
        assert getattr(c, of.name)(state).step == 2


def _error(fn):
    try:
        fn()
    except DistckptError as e:
        return f"{type(e).__name__}: {e}"


def _unfinished(root, step="step-*"):
    """Temp files, and what lies in such directories and no checkpoint has."""
    committed = {p.parent for p in root.glob("step-*/commit.json")}
    return sorted(
        str(p.relative_to(root))
        for p in root.rglob("*")
        if p.name.startswith(".tmp-") or (p.match(f"{step}/*") and p.parent not in committed)
    )


def _after(root, of):
    """What a new job finds, once it has resumed: the newest bit for bit, the ones before too, and nothing else."""
    problems, newest = [], 4 if of.saves else 2

    def work(comm):
        with Checkpointer(root, comm=comm, wait=True) as c:
            state = Sharded(comm.rank, of.size)
            steps = c.steps()
            if c.resume(state).step != newest or not state.is_at(newest):
                problems.append(f"resumes at {state.value} of {steps}, not {newest}")
            for step in steps:
                c.load(state, step=step)
                if not state.is_at(step):
                    problems.append(f"step {step} is not as it was saved")
            if len(steps) < 2:
                problems.append(f"only {steps} are left")

    odd = [said for said in on_threads(of.size, work, timeout=TIMEOUT) if said is not None]
    problems += [f"a new job: {type(said).__name__}: {said}" for said in odd]
    if left := _unfinished(root):
        problems.append(f"left behind for good: {left}")
    if not (root / "last.json").exists() or f"step-{newest:08}" not in (root / "last.json").read_text():
        problems.append("last.json does not lead to the newest")
    return problems
