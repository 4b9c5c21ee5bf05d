"""The n-th request: whatever networks and servers do to any request of a save, a load, a resume and a replication.

    python -m tests.faults requests --seconds 600 --seed 1

A real server (moto) behind a proxy that refuses, resets, loses, cuts off, holds back; the n-th request, or all from it
on. What fails once costs nothing, or every rank is told; what stays is told on every rank. What was committed before
is whole, and so is what is committed then; once all is well the next save succeeds, and a resume finds it; and no
descriptor, thread or process is left.
"""

from __future__ import annotations

import gc
import random
import re
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from distckpt import Checkpointer, Keep, Local
from distckpt.errors import DistckptError
from distckpt.store.base import read_all, write_all
from distckpt.store.object import ObjectStore
from tests.faults.errors import held
from tests.faults.sharded import Sharded, on_threads
from tests.faults.tally import Tally
from tests.store import servers
from tests.store.faulty import Fault, Faulty

TWO = 2
PATIENCE = 4.0
"""Seconds for which the store tries again."""
TIMEOUT = 40.0
AT_ONCE = 8
"""Cases that are on at once: most of their time they wait."""
EVER = 1 << 30
FLIPPED = "bit flipped"
"""In an answer to a load: it is never taken, and every rank falls back, or fails."""
FAULTS = {str(status): Fault(status=status) for status in (409, 412, 429, 500, 503)} | {
    "reset in the upload": Fault(upload=100),
    "reset at once": Fault(upload=0),
    "answer lost": Fault(lost=True),
    "answer cut off": Fault(body=20),
    "slow answer": Fault(slow=0.5),
    "hangs": Fault(hang=True),
    FLIPPED: Fault(flip=300),
}
FINAL = {"409", "412", FLIPPED}
"""What is not asked for again."""
OPERATIONS = ("save", "save in the background", "load", "resume", "replication")


@dataclass(frozen=True)
class Case:
    """at: requests before the one that suffers. times: how many from it on do."""

    of: str
    fault: str
    at: int
    times: int = 1

    def __str__(self):
        return f"{self.of}: {self.fault}, {'from' if self.times > 1 else 'at'} request {self.at + 1}"


class Seen(NamedTuple):
    """What came of a case: of each rank what was raised, None if nothing; requests; what must not be."""

    said: list
    count: int
    problems: list


def campaign(seed: int, seconds: float, most: int = 1 << 62, among=OPERATIONS) -> Tally:
    """Every case there is, in an order that follows from the seed, until the time is up or so many are done."""
    draw, tally, until = random.Random(seed), Tally(), time.monotonic() + seconds
    server = servers.start("moto")
    with Faulty(server.bucket().address) as proxy, warnings.catch_warnings(), ThreadPoolExecutor(AT_ONCE) as pool:
        warnings.simplefilter("ignore")  # what fails after the commit, at a pointer, is warned of
        benches = [Bench(proxy, server.bucket()) for _ in range(AT_ONCE)]
        cases = [case for of in among for case in benches[0].cases(of)]
        draw.shuffle(cases)
        tally.figures["cases there are"] = len(cases)
        before = held()
        while cases and time.monotonic() < until and tally.cases < most:
            some = [cases.pop() for _ in range(min(AT_ONCE, len(cases), most - tally.cases))]
            judged = pool.map(Bench.judged, benches, some)
            for case, (verdict, told) in zip(some, judged, strict=True):
                tally.add(f"{case.of} {case.fault}", verdict, told and f"seed {seed}: {case}: {told}")
            if left := _left(before):
                tally.problems.append(f"seed {seed}: leaked {left} after one of {'; '.join(map(str, some))}")
    return tally


class Bench:
    """A bucket, and a proxy before its server. Every case is of a run of its own."""

    def __init__(self, proxy, bucket):
        self.proxy, self._bucket, self._numbers = proxy, bucket, count()
        self._saved = self._store("saved", direct=True)
        on_threads(TWO, lambda comm: _two_saves(self._saved, comm), timeout=TIMEOUT)

    def _store(self, name, *, direct=False):
        options = self._bucket.options if direct else self._bucket.at(self.proxy.endpoint).options
        patience = {} if direct else {"timeout": PATIENCE}
        return ObjectStore(f"{self._bucket.uri}/{name}", options, **patience)

    def cases(self, of):
        """Every case of an operation, from a look at it without a fault."""
        found = self.tried(Case(of, "500", EVER)).count
        names = [name for name in FAULTS if name != FLIPPED or of == "load"]
        return [Case(of, name, at, times) for name in names for at in range(found) for times in (1, EVER)]

    def tried(self, case):
        name = f"case-{next(self._numbers)}"
        mine = f"/{self._bucket.uri.split('/')[2]}[/?]"
        run = Run(self.proxy, mine, self._store(name), self._store(name, direct=True))
        if case.of == "replication":
            return run.replicated(case)
        for directory in ("", "launches", *(e.name for e in self._saved.list("") if e.name.startswith("step-"))):
            for entry in self._saved.list(directory):
                if entry.size is not None:
                    key = f"{directory}/{entry.name}".lstrip("/")
                    write_all(run.direct, key, read_all(self._saved, key, limit=1 << 20))
        return run.tried(case)

    def judged(self, case):
        """(verdict, what must not be)."""
        seen = self.tried(case)
        if problems := [*seen.problems, *_of_said(case, seen)]:
            return "PROBLEM", f"{'; '.join(map(str, problems))}; {seen.said}"
        if seen.count <= case.at:
            return "passed before it", None
        return ("told" if seen.said[0] else "whole"), None


def _two_saves(store, comm):
    with Checkpointer(store, comm=comm, wait=True, keep=Keep(last=2)) as c:
        c.resume(Sharded(comm.rank, TWO))
        for step in (1, 2):
            c.save(step, Sharded(comm.rank, TWO, step))


def _of_said(case, seen):
    if any(seen.said) and not all(seen.said):
        yield "some ranks believe in it"
    if any(seen.said) and case.times == 1 and case.fault not in FINAL:
        yield "it should have been asked for again"
    for error in filter(None, seen.said):
        if not re.search("s3://|step-0000000", error):
            yield "does not say where"


def _left(before, patience=5.0):
    """What is held that was not, once connections that end have ended."""
    gc.collect()
    until = time.monotonic() + patience
    while (left := _new(before)) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def _new(before):
    after = held()
    names = {n for n in after["threads"] - before["threads"] if n.startswith("distckpt")}
    files = {d.split(" ", 1)[1] for d in after["descriptors"] - before["descriptors"]}
    return sorted({f for f in files if not f.startswith(("socket:", "anon_inode:"))} | names) + sorted(
        after["children"] - before["children"]
    )


class Run(NamedTuple):
    """A run of two ranks, threads here, to which requests go by way of a proxy."""

    proxy: Faulty
    mine: str
    """Pattern of its requests."""
    store: ObjectStore
    direct: ObjectStore

    def tried(self, case):
        """Steps 1 and 2 are there; then the operation with its fault; then, for a save, the next one without."""
        seen = []

        def work(comm):
            options = {"keep": Keep(last=2), "wait": case.of != "save in the background", "comm": comm}
            with Checkpointer(self.store, **options) as c:
                state = Sharded(comm.rank, TWO)
                if saves := case.of.startswith("save"):
                    c.resume(state)
                    state.set(3)
                _meet(comm, lambda: seen.append(self._arm(case)))
                error = _error(lambda: _saved(c, 3, state) if saves else getattr(c, case.of)(state))
                _meet(comm, lambda: seen.append(self._disarmed()))
                wanted = {1, 2} if case.fault == FLIPPED else {3 if saves else 2}
                if not error and not (state.value in wanted and state.is_at(state.value)):
                    return f"at {state.value}", []
                if saves:
                    state.set(4)
                    _saved(c, 4, state)
                else:
                    getattr(c, case.of)(state)
            return error, []

        results = on_threads(TWO, work, timeout=TIMEOUT)
        if odd := [r for r in results if not isinstance(r, tuple)]:
            return Seen([str(odd)] * TWO, EVER, [f"raised what is no error of ours: {odd!r}"])
        return Seen(
            [error for error, _ in results], seen[1] - seen[0], self.whole(4 if case.of.startswith("save") else 2)
        )

    def whole(self, newest):
        """What is wrong with what a new job finds."""
        problems = []
        if error := _error(lambda: problems.extend(self._found(newest))):
            problems.append(f"a new job: {error}")
        return problems

    def _found(self, newest):
        problems, state = [], Sharded(0, 1)
        with Checkpointer(self.direct, wait=True, timeout=TIMEOUT) as c:
            steps = c.steps()
            if c.resume(state).step != newest or not state.is_at(newest):
                problems.append(f"resumes at {state.value} of {steps}, not {newest}")
            for step in steps:
                c.load(state, step=step)
                if not state.is_at(step):
                    problems.append(f"step {step} is not as it was saved")
        return problems if len(steps) > 1 else [*problems, f"only {steps} are left"]

    def replicated(self, case):
        """A local directory in front: step 2 is replicated while requests fail, then by a new job what is lacking."""
        near = Path(tempfile.mkdtemp())
        state, problems = Sharded(0, 1), []
        local = Local(near / "run", keep=Keep(last=2))
        try:
            with Checkpointer(self.store, local=local, timeout=5) as c:
                c.resume(state)
                state.set(1)
                c.save(1, state).wait()
            with Checkpointer(self.store, local=local, timeout=5) as c:
                c.resume(state)
                state.set(2)
                first = self._arm(case)
                c.save(2, state).wait()
            requests = self._disarmed() - first
            state.set(0)
            with Checkpointer(self.store, local=local, timeout=TIMEOUT) as c:
                if c.resume(state).step != 2 or not state.is_at(2):
                    problems.append(f"resumes at {state.value}")
            with Checkpointer(self.direct, wait=True) as c:
                for step in (1, 2):
                    state.set(0)
                    c.load(state, step=step)
                    if not state.is_at(step):
                        problems.append(f"step {step} of the root is not as it was saved")
        finally:
            self.proxy.off(self.mine)
            shutil.rmtree(near)
        return Seen([None], requests, problems)

    def _arm(self, case):
        self.proxy.on(self.mine, FAULTS[case.fault], after=case.at, times=case.times)
        return self.proxy.count(self.mine)

    def _disarmed(self):
        self.proxy.off(self.mine)
        return self.proxy.count(self.mine)


def _saved(c, step, state):
    made = c.save(step, state)
    if hasattr(made, "wait"):
        made.wait()


def _meet(comm, do):
    """Do it on rank 0, while the others wait."""
    comm.all_gather("before", b"")
    if comm.rank == 0:
        do()
    comm.all_gather("after", b"")


def _error(fn):
    try:
        fn()
    except DistckptError as e:
        return f"{type(e).__name__}: {e}"
