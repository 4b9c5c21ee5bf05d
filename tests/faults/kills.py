"""SIGKILL at every file call of a job, in its trainers and its writers, one at a time; then the job is started again.

Verdicts: PASS; HARD_FAIL: it does not resume, or hangs; SILENT_DIVERGENCE: it resumes other bits (parameters, moments,
step, position in the data, random numbers) than a training that nothing interrupted has; LOST_WORK: it resumes an older
step than the newest that was committed, or acknowledged, or wholly staged in writers that lived on to their end.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests import ranks
from tests.faults.failpoints import memory, writers
from tests.faults.killed import Job, Kill, Told, live, resume, trained
from tests.faults.tally import Tally
from tests.run.lives import counting, until

JOBS = (
    Job("waited", wait=True),
    Job("async", saves=2),
    Job("tiers", tiers=True),
    Job("waited on 2 ranks", wait=True, ranks=2),
    Job("async on 2 ranks", ranks=2),
)
PRELOAD = ("tests.faults.killed",)
MOST_STEPS = 12
"""That a case can come to: those of the run it begins with, of its lives, and of the job that comes after them."""
TOGETHER = 8
"""Cases at a time: most of a case is waiting."""


@dataclass(frozen=True)
class Case:
    """kills: of lives one after another. waits: for writers that have lost their trainers; then all staged must be there.

    torn: the run that the first life finds has a save that all ranks have acked, and nobody has committed.
    """

    job: Job
    kills: tuple[Kill, ...]
    waits: bool = True
    torn: bool = False


def _lived(job, place, folder, number, plan):
    """Live a life. Returns its points (None of a process that died), and what it told."""
    log = folder / f"log-{number}"
    found = ranks.run(
        job.ranks,
        live,
        *(job, str(place), str(log), plan),
        may_die=range(job.ranks),
        preload=PRELOAD,
        timeout=40,
    )
    return found, Told.of(log)


class Campaign:
    def __init__(self, seed, folder, jobs):
        self.seed, self.folder, self.tally = seed, Path(folder), Tally()
        self._acked, self._lock = {}, threading.Lock()
        self._trained = {n: ranks.run(n, trained, MOST_STEPS, preload=PRELOAD) for n in sorted({j.ranks for j in jobs})}

    def prepare(self, job):
        """Make a run of two lives, and one whose last save all ranks have acked, and nobody has committed.

        Returns the points of a life that goes on from either.
        """
        for name in "whole", "torn":
            place = self.folder / f"{job.name}-{name}"
            place.mkdir()
            for life in range(2):
                _, told = _lived(job, place, self.folder, f"{job.name}-{name}-{life}", Kill())
                assert not told.failed, told.failed
        points = self.points(job, torn=False)
        plan, log = _before_commit(points), f"{job.name}-torn"
        _, told = _lived(job, place, self.folder, log, plan)
        assert _died_at(self.folder / f"log-{log}", plan) == [plan.at]
        until(lambda: not writers(told.pids))
        self._acked[job.name] = max(told.staged, default=0) or _newest(place) + 1
        return points, self.points(job, torn=True)

    def points(self, job, torn):
        """(process, rank, number) -> point, of a life that nobody ends."""
        place = self._copy(job, torn)
        found, told = _lived(job, place, place.parent, "undisturbed", Kill())
        assert not told.failed, told.failed
        shutil.rmtree(place.parent)
        return {
            (process, rank, number): point
            for rank, both in enumerate(found)
            for process, trace in zip(("trainer", "writer"), both, strict=True)
            for number, point in enumerate(trace, 1)
        }

    def _copy(self, job, torn):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.folder / f"{job.name}-{'torn' if torn else 'whole'}", folder / "place", symlinks=True)
        (folder / "place" / "near" / "node.json").unlink(missing_ok=True)  # it names the far one, which has been moved
        return folder / "place"

    # -- one case ----------------------------------------------------------------------------------------------------

    def check(self, case):
        """Live through a case. Returns (verdict, what was wrong, points at which somebody was killed)."""
        place = self._copy(case.job, case.torn)
        folder, acknowledged = place.parent, self._acked[case.job.name] if case.torn else 0
        pids, died, unclear = [], [], []
        for number, plan in enumerate(case.kills):
            _, told = _lived(case.job, place, folder, number, plan)
            pids += told.pids
            acknowledged = max(acknowledged, told.acknowledged)
            if case.waits:
                until(lambda told=told: not writers(told.pids))
                if plan.process == "trainer" and not plan.all_:
                    acknowledged = max(acknowledged, told.staged_by(case.job.ranks))
            died += _died_at(folder / f"log-{number}", plan)
            alone = plan.process == "trainer" and not plan.all_ and case.job.ranks > 1
            unclear = [error for error in told.failed if died and alone and f"rank {plan.rank}" not in error]
        verdict, problem = self._resumed(case, place, acknowledged)
        if verdict == "PASS" and unclear:
            verdict, problem = "HARD_FAIL", f"a rank that survived does not say who is missing: {unclear}"
        until(lambda: not writers(pids))
        shutil.rmtree(folder)
        return verdict, problem, died

    def _resumed(self, case, place, acknowledged):
        newest = max(acknowledged, _newest(place))
        for path in place.rglob("far/**/.tmp-*"):
            old = (time.time() - 120,) * 2  # what the next launch removes is older than any clock is wrong
            os.utime(path, old, follow_symlinks=False)
        try:
            found = ranks.run(
                case.job.ranks, resume, case.job, str(place), self._trained[case.job.ranks], preload=PRELOAD
            )
        except ranks.RankError as e:
            return "HARD_FAIL", str(e)
        for told in found:
            if told.wrong:
                return "SILENT_DIVERGENCE", "; ".join(told.wrong)[:500]
            if told.step < newest:
                return (
                    "LOST_WORK",
                    f"step {told.step} was resumed, {newest} had been saved ({acknowledged} acknowledged)",
                )
            if (count := counting(case.job.root(place)))[-1] != told.step + 1:
                return "HARD_FAIL", f"the next save, of step {told.step + 1}, does not count: {count}"
        if len({told.step for told in found}) > 1:
            return "HARD_FAIL", f"ranks resumed different steps: {found}"
        try:
            until(lambda: not case.waits or not list(place.rglob(".tmp-*")), 20)  # a writer may still be replicating
        except AssertionError:
            return "HARD_FAIL", f"left behind for good: {[*map(str, place.rglob('.tmp-*'))]}"
        return "PASS", None

    def take(self, case):
        """Check a case, and count it."""
        try:
            verdict, problem, died = self.check(case)
        except Exception as e:  # a hang, for one: the campaign goes on
            verdict, problem, died = "HARD_FAIL", f"{type(e).__name__}: {e}", []
        what = operation(died[0]) if died else "nobody came to die"
        if len(died) > 1:
            what = "killed, and killed again in what came after"
        with self._lock:
            self.tally.add(
                f"{case.job.name}: {what}",
                verdict,
                problem and f"{verdict} seed {self.seed} at {' and '.join(died)}: {problem} ({case})",
            )
            self.tally.figures["times that a process was killed"] += len(died)
            self.tally.figures["times that all were killed at once"] += sum(
                plan.all_ for plan in case.kills[: len(died)]
            )


def _newest(place):
    """Newest step that is committed."""
    return max((int(path.parent.name[5:13]) for path in place.glob("*/step-*/commit.json")), default=0)


def _died_at(log, plan):
    """Point at which a process was killed; none if it never came to it."""
    told = Path(f"{log}-points-{plan.rank}" + ("-writer-killed" if plan.process == "writer" else "-killed"))
    return [told.read_text()] if told.exists() else []


def _before_commit(points):
    """The kill of all just before the last commit of a life; by its name, for waits make numbers differ."""
    names = ("link run/step-", "link near/step-")
    commits = [
        (*where, name) for where, name in points.items() if name.startswith(names) and name.endswith("commit.json")
    ]
    process, rank, _, name = max(commits)
    return Kill(process, rank, name, all_=True)


# -- which cases -------------------------------------------------------------------------------------------------------

_LOOKS = {"preadv": "read", "pread": "read", "read": "read", "stat": "look at", "lstat": "look at", "scandir": "look at",
          "listdir": "look at", "readlink": "look at", "unlink": "remove", "rmdir": "remove"}  # fmt: skip
_EFFECTS = ("open", "write", "pwrite", "pwritev", "ftruncate", "link", "replace", "rename", "unlink", "mkdir", "rmdir",
            "symlink", "send", "all_gather")  # fmt: skip
"""Calls between which what is on the disk, or was told others, differs."""
_THINGS = {
    "launches": "launch record, heartbeat", "lease": "lease", "last": "pointer", "best": "pointer",
    "meta.json": "meta.json", "events.jsonl": "events.jsonl", "commit.json": "commit.json", "ack-": "ack",
    "rank-": "data file", ".json": "object",
}  # fmt: skip


def operation(point):
    """What a point is part of, for the table."""
    call, _, rest = point.partition(" ")
    if call in {"send", "all_gather", "broadcast", "swap"}:
        return {"send": "message to the writer"}.get(call, "message between ranks")
    key = rest.removesuffix(" torn")
    tier = next((f"{tier} " for tier in ("far", "near") if key.startswith(tier)), "")
    thing = next((thing for part, thing in _THINGS.items() if part in key), "directory")
    return f"{_LOOKS.get(call, 'write')} {tier}{thing}" + (", torn" if rest != key else "")


def _cases(campaign, job, points_of, draw):
    """(urgency, case) of every kill of a job: of one process, of all, and of one followed by another, drawn, in what
    comes after. First those that differ in what they leave on the disk.
    """
    found = []
    for torn, points in enumerate(points_of):
        campaign.tally.figures[f"points: {job.name}{', rolling forward' if torn else ''}"] = len(points)
        for (process, rank, number), point in points.items():
            late = point.split(" ")[0] not in _EFFECTS and not point.endswith(" torn")
            alone, everybody = (Kill(process, rank, number, all_) for all_ in (False, True))
            second = Kill("trainer", draw.randrange(job.ranks), draw.randrange(1, 150), draw.random() < 0.5)
            twice = Case(job, (alone, second), waits=draw.random() < 0.5, torn=bool(torn))
            found += [(late, Case(job, (kill,), torn=bool(torn))) for kill in (alone, everybody)] + [(late, twice)]
    draw.shuffle(found)
    return found


def campaign(seed, seconds, most=None, jobs=JOBS):
    """Check cases in random order, of all jobs at once, until the time is up or `most` are done."""
    deadline, draw = time.monotonic() + seconds, random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kills-", dir=memory()) as folder:
        it = Campaign(seed, folder, jobs)
        todo = []
        with ThreadPoolExecutor(TOGETHER) as pool:
            for job, points in zip(jobs, pool.map(it.prepare, jobs), strict=True):
                some = _cases(it, job, points, draw)
                todo += [(late, i / len(some), case) for i, (late, case) in enumerate(some)]
            todo.sort(key=lambda each: each[:2])
            it.tally.figures["cases there are"] = len(todo)
            list(pool.map(lambda each: time.monotonic() < deadline and it.take(each[2]), todo[:most]))
    return it.tally
