"""Several jobs, readers and caretakers on one run directory, interleaved at random: zombies, rewinds, races, kills.

Jobs are resumed, at what is newest or at an earlier step, save, stand still for long and go on, or die, at any point;
others load, prune and clear up meanwhile. A small model says what must be resumable, from the commits and launches
alone as they are created.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from distckpt import Checkpointer, Keep
from distckpt.errors import NotACheckpoint, RanksMissing, RunConflict
from distckpt.format import manifest
from distckpt.format.layout import COMMIT, LAUNCHES, LEASES, StepDir, launch_number, lease_of
from distckpt.format.sealed import unseal
from distckpt.run.history import History
from distckpt.run.publish import Retention, pointing, retain
from distckpt.run.sweep import leftovers, sweep
from tests.faults.sharded import Sharded
from tests.faults.tally import Tally
from tests.faults.turns import Job, TurnedLocal, TurnedMemory, clocked

KEEPS = (None, Keep(last=1), Keep(last=2), Keep(last=1, best=("loss", "min", 1)), Keep(every_steps=4))
MOST_TURNS = 20_000
"""Of one case: they come to an end long before, unless something waits for ever."""


class Run:
    """What a run must be, told of each commit, launch and deletion as it happens."""

    def __init__(self):
        self.values = {}
        """Step directory -> (launch, value) of each commit that is there."""
        self.launches, self.problems, self.moments = [], [], []
        self.saved, self.ever = itertools.count(1), {}
        self.said, self.going = {}, set()
        """(job, what it says that it removes) -> (the two newest, number of launches) by then."""

    def counting(self):
        """Directories that can be resumed, newest first: no later launch began before them."""

        def counts(directory, launch):
            return all(start and directory <= start for number, start in self.launches if number > launch)

        return sorted((d for d, (launch, _) in self.values.items() if counts(d, launch)), reverse=True)

    def newest(self):
        return next(iter(self.counting()), None)

    def seen(self, job, verb, key, data):
        """Something is done to the store, or (`created`) has just been."""
        folder, _, name = key.rpartition("/")
        directory = StepDir.parse(folder)
        if verb == "created" and name == COMMIT:
            found = manifest.decode(data, None)
            self.values[directory] = found.launch, found.metrics["value"]
            self.ever[found.metrics["value"]] = directory
        elif verb == "created" and folder == LAUNCHES and launch_number(name):
            said = unseal(data, None)
            self.launches.append((said["number"], StepDir.parse(said["resumed_from"] or "")))
        elif verb == "delete" and name == COMMIT and directory in self.values:
            self.removed(job, directory)
        elif verb == "write" and folder == LEASES and json.loads(data).get("removes"):
            self.said[job.name, lease_of(name)] = self.counting()[:2], len(self.launches)
            self.going.add(lease_of(name))
            return
        else:
            return
        self.moments.append(self.counting())

    def removed(self, job, directory):
        """A commit goes. One that a launch before it made one of the two newest may, if its removal had begun by then;
        never what a launch since has begun with.
        """
        newest, launches = self.said.get((job.name, directory), ([directory], 0))
        begun_with = any(start == directory for _, start in self.launches[launches:])
        if directory in self.counting()[:2] and (directory in newest or begun_with):
            said = f"(of {newest}, and launches since {self.launches[launches:]})"
            self.problems.append(f"{job.name} removes {directory}, one of the two newest of {self.counting()} {said}")
        del self.values[directory]


class Case:
    """One interleaving."""

    def __init__(self, seed, root=None):
        self.draw, self.run, self.counts = random.Random(seed), Run(), Counter()
        self.keep, self.root, self.data = self.draw.choice(KEEPS), root, {}
        self.jobs, self.names = [], itertools.count(1)
        self.crowded = self.draw.choice((0.03, 0.1, 0.4))
        """How likely the next one begins at each turn."""

    def store(self, job):
        seen = self.run.seen
        return TurnedLocal(job, seen, self.root) if self.root else TurnedMemory(job, seen, self.data)

    def whole(self):
        """The store as nobody's turn."""
        return self.store(Aside())

    # -- who there is ------------------------------------------------------------------------------------------------

    def trains(self, job):
        """A job that resumes and saves."""
        self.clock.pauses[job.thread] = job.pause
        checkpointer = Checkpointer(self.store(job), keep=self.keep, wait=True, timeout=4.0)
        state = Sharded(0, 1, 0)
        try:
            step = self.resumes(job, checkpointer, state)
            for _ in range(self.draw.randint(0, 4) if step is not None else 0):
                step += self.draw.randint(1, 2)
                value = next(self.run.saved)
                state.set(value)
                report = checkpointer.save(step, state, {"value": value, "loss": self.draw.randint(0, 9)})
                self.counts["saves"] += 1
                if self.run.ever.get(value) != StepDir.parse(report.directory):
                    self.problem(f"{job.name}: {value} was saved as {report.directory}: {self.run.ever.get(value)}")
        except (RunConflict, RanksMissing) as e:
            self.counts["jobs that were told that a later one has begun"] += 1
            launch = checkpointer._job.launch or 0
            if max((n for n, _ in self.run.launches), default=0) <= launch:
                self.problem(f"{job.name}: launch {launch} is the last, and was told {e}")
        finally:
            checkpointer._job._heartbeat._stop.set()

    def resumes(self, job, checkpointer, state):
        """Resume at what is newest, or rewind. Returns the step; None where the one asked for is gone."""
        counting = self.run.counting()
        wanted = self.draw.choice(counting) if counting and self.draw.random() < 0.4 else None
        since = self.since()
        try:
            report = checkpointer.resume(state, step=wanted.step if wanted else None)
        except NotACheckpoint:
            self.counts["rewinds to what was just removed"] += 1
            if wanted is None or (all(wanted in then for then in since()) and wanted not in self.run.going):
                self.problem(f"{job.name}: {wanted} is there, and was not found")
            return None
        self.counts["rewinds" if wanted else "resumes"] += 1
        start = next(s for n, s in self.run.launches if n == checkpointer._job.launch)
        if wanted is None and not any(start == next(iter(then), None) for then in since()):
            self.problem(f"{job.name}: resumed from {start}, and there were {since()}")
        if report and (not state.is_at(state.value) or self.run.ever[state.value] != start):
            self.problem(f"{job.name}: a mix was loaded from {start}")
        return report.step if report else 0

    def since(self):
        """What there was from now on, whenever it is asked: countings, one after another."""
        before = len(self.run.moments)
        now = self.run.counting()
        return lambda: [now, *self.run.moments[before:]]

    def reads(self, job):
        """A reader of the newest, or of one step."""
        self.clock.pauses[job.thread] = job.pause
        counting = self.run.counting()
        step = self.draw.choice(counting).step if counting and self.draw.random() < 0.5 else None
        state, since = Sharded(0, 1, 0), self.since()
        try:
            report = Checkpointer(self.store(job), wait=True, timeout=4.0).load(state, step=step)
        except NotACheckpoint:
            self.counts["loads of what was just removed"] += 1
            if step is None and all(since()):
                self.problem(f"{job.name}: found nothing, and there was a checkpoint all the time")
            return
        self.counts["loads"] += 1
        if not state.is_at(state.value) or self.run.ever[state.value].step != report.step:
            self.problem(f"{job.name}: a mix was loaded as step {report.step}")

    def tends(self, job):
        """Somebody who prunes, or clears up, from outside."""
        history = History(self.store(job))
        if self.draw.random() < 0.5 and next(history.committed(), None):
            retain(history, Retention(Keep(last=1), lasting=False))
        else:
            sweep(history, leftovers(history))
        self.counts["prunes and sweeps"] += 1

    def problem(self, text):
        self.run.problems.append(text)

    # -- how it goes -------------------------------------------------------------------------------------------------

    def go(self):
        """Play it, then see what a last job resumes. Returns what was wrong."""
        with clocked() as self.clock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            todo = [self.draw.choices((self.trains, self.reads, self.tends), (6, 2, 1))[0] for _ in range(7)]
            todo[0] = self.trains
            for turn in itertools.count():
                alive = [job for job in self.jobs if not job.ended]
                if todo and (not alive or self.draw.random() < self.crowded):
                    fn = todo.pop(0)
                    alive.append(Job(f"{fn.__name__} {next(self.names)}", fn))
                    self.jobs.append(alive[-1])
                if not alive:
                    break
                self.plays(alive)
                assert turn < MOST_TURNS, [(job.name, job.at) for job in alive]
            self.counts["turns"] = turn
            for job in self.jobs:
                if job.error:
                    self.problem(f"{job.name} at {job.at!r}: {type(job.error).__name__}: {job.error}")
            self.counts["jobs"] = len(self.jobs)
            self.ends()
        return self.run.problems

    def plays(self, alive):
        """One job has its turns; or it is killed, or stands still for long."""
        awake = [job for job in alive if not job.frozen] or alive
        for job in alive:
            job.frozen = max(0, job.frozen - 1)
        job = self.draw.choice(awake)
        fate = self.draw.random()
        if fate < 0.004:
            self.counts["kills"] += 1
            job.kill()
            return
        if fate < 0.02:
            self.counts["jobs that stood still"] += 1
            job.frozen = self.draw.choice((10, 60, 300))
            return
        for _ in range(self.draw.choice((1, 1, 2, 5, 20))):
            if not job.ended:
                job.turn()

    def ends(self):
        """A last job, alone, resumes the newest, saves, and leaves nothing behind."""
        store, state = self.whole(), Sharded(0, 1, 0)
        newest = self.run.newest()
        for name, target in pointing(store).items():
            if StepDir.parse(target) not in self.run.values and not self.counts["kills"]:
                self.problem(f"{name} names {target}, which is not there")
        try:
            checkpointer = Checkpointer(store, keep=self.keep, wait=True, timeout=4.0)
            report = checkpointer.resume(state)
            start = self.run.launches[-1][1]
            if start not in {newest, self.run.newest()}:  # it may have committed what a killed job had acked
                self.problem(f"the last job resumed {start}; {newest} is newest")
            if start and not state.is_at(self.run.values[start][1]):
                self.problem(f"the last job resumed {start} with value {state.value}: {self.run.values[start]}")
            state.set(0)
            made = checkpointer.save((report.step if report else 0) + 1, state, {"value": 0, "loss": 0}).directory
            checkpointer.close()
        except Exception as e:
            self.problem(f"the last job: {type(e).__name__}: {e}")
            return
        if (last := pointing(store).get("last")) != made:
            self.problem(f"last.json names {last}, and {made} is the newest")
        left = [x.key for x in leftovers(History(store), alone=True) if not x.key.startswith(LEASES)]
        if left:
            self.problem(f"left behind: {left[:4]}")


class Aside:
    """Of nobody's turn."""

    name = "the last job"

    def pause(self, point):
        pass


def play(seed, number, tally, *, case=Case):
    """One case: in memory, or each tenth in a directory."""
    root = Path(tempfile.mkdtemp(prefix="interleaving-")) if number % 10 == 9 else None
    try:
        made = case(f"{seed}/{number}", root)
        problems = made.go()
    finally:
        if root:
            shutil.rmtree(root, ignore_errors=True)
    tally.add("interleaving in a directory" if root else "interleaving", "wrong" if problems else "as the model says")
    tally.problems += [f"interleaving {seed}/{number}: {problem}" for problem in problems]
    for what, count in made.counts.items():
        tally.figures[what] = tally.figures.get(what, 0) + count


def campaign(seed, seconds, most=10**9):
    """Play cases until the time is up."""
    tally, ends = Tally(), time.monotonic() + seconds
    for number in range(most):
        if time.monotonic() > ends:
            break
        play(seed, number, tally)
    return tally
