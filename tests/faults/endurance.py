"""One run that endures: saves in the background by the hundred, lives that are killed, other layouts each time.

After each life what is newest must be there, exact (tests/faults/enduring.py), with nothing left over; and a long life
must hold no more at its end than in its middle.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

from distckpt import ElasticSampler, errors
from tests import ranks
from tests.faults.enduring import LAYOUTS, TIMEOUT, lines, live, undisturbed
from tests.faults.tally import Tally
from tests.run import lives

KILLED = ("all", "ranks", "writers", "one", "none")
OF_TORCH = {"RuntimeError", "DistBackendError"}
"""What a collective of the training itself raises when a rank is gone."""
GROWTH = 4 << 10
"""KiB that a life may grow in a hundred saves: allocators round up."""


class Endured:
    """A run, and what is known of it."""

    def __init__(self, folder, seed, steps, *, frozen, plant=None):
        self.draw, self.folder, self.tally = random.Random(seed), Path(folder), Tally()
        self.seed, self.lives, self.saves = seed, 0, 0
        self.given = {name: str(self.folder / name) for name in ("root", "log", "temp", "reference")}
        for path in self.given.values():
            Path(path).mkdir()
        self.given |= {"frozen": frozen} | ({"plant": plant} if plant else {})
        ranks.run(1, undisturbed, self.given["reference"], steps, frozen, timeout=600)

    def problem(self, text):
        self.tally.problems.append(f"endurance {self.seed}, life {self.lives}: {text}")

    def logs(self, launch):
        return {path: lines(path) for path in sorted(Path(self.given["log"]).glob(f"{launch:04d}-*"))}

    def life(self, layout, size, saves, whom):
        """One life, killed once it has made about so many saves."""
        self.lives += 1
        folder = self.folder / f"life-{self.lives}"
        folder.mkdir()
        before = lives.counting(self.given["root"])
        launch = self.launch() + 1
        group = ranks.start(size, live, self.given, layout, saves + 50 * (whom != "none"), folder=folder)
        try:
            lives.until(lambda: self.staged(launch, size) >= saves or not any(p.is_alive() for p in group), 300)
            time.sleep(self.draw.random() * 0.05)
            newest = max(lives.counting(self.given["root"]), default=0)
            left = self.ends(group, whom)
            if whom in {"ranks", "one", "none"}:  # the writers finish what was staged
                newest = max(newest, self.staged_on_all(launch, size))
        finally:
            lives.kill(group, "ranks")
        try:
            lives.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), 2 * TIMEOUT)
        except AssertionError:
            self.problem(f"{layout} on {size}, killed: {whom}: a writer lives on for {2 * TIMEOUT:.0f} s")
        self.look(launch, before, newest, size, group)
        self.tally.add(f"life: {layout}", f"killed: {whom}")
        self.errors(group, folder, whom)
        shutil.rmtree(folder)

    def errors(self, group, folder, whom):
        """What ranks raised must be said of others that are gone, if any is."""
        try:
            ranks.answers(group, folder, may_die=range(len(group)) if whom != "none" else ())
        except ranks.RankError as e:
            for kind in re.findall(r"^rank \d+: (\w+):", str(e), re.MULTILINE):
                if whom == "none" or not (hasattr(errors, kind) or kind in OF_TORCH):
                    self.problem(f"killed: {whom}; {e}")

    def ends(self, group, whom):
        """Kill `whom`, then whoever is left. Returns the writers."""
        pids = [p.pid for p in group]
        if whom == "none":
            left = lives.writers(pids)
            for process in group:
                process.join(120)
            if any(p.is_alive() for p in group):
                self.problem("a rank hangs")
            return left
        if whom == "one":
            victim = self.draw.choice(group)
            left = lives.writers(pids)
            lives.kill([victim], "ranks")
            time.sleep(self.draw.random() * 0.5)
            lives.kill(group, "ranks")
            return left
        left = lives.kill(group, whom)
        if whom == "writers":
            time.sleep(self.draw.random() * 0.5)
            left += lives.kill(group, "all")
        return left

    # -- what must be ------------------------------------------------------------------------------------------------

    def launch(self):
        numbers = [int(path.name[:4]) for path in Path(self.given["root"], "launches").glob("????.json")]
        return max(numbers, default=0)

    def staged(self, launch, size):
        """Saves that rank 0 has made in a life."""
        return sum("staged" in line for line in next(iter(self.logs(launch).values()), []))

    def staged_on_all(self, launch, size):
        made = [[line["staged"] for line in log if "staged" in line] for log in self.logs(launch).values()]
        return min((max(steps, default=0) for steps in made), default=0) if len(made) == size else 0

    def look(self, launch, before, newest, size, group):
        """What a life has left behind."""
        logs = self.logs(launch)
        for path, log in logs.items():
            for problem in log[0]["problems"] if log else ():
                self.problem(f"{path.name}, {log[0]['layout']} on {size}, step {log[0]['resumed']}: {problem}")
        for log in logs.values():
            if log and log[0]["resumed"] < max(before, default=0):
                self.problem(f"resumed step {log[0]['resumed']}, and {before} were there")
        there = lives.counting(self.given["root"])
        if max(there, default=0) < newest:
            self.problem(f"step {newest} was staged on every rank or committed, and {there} are there")
        if len(there) > 4 or (len(there) > 3 and not self.given["frozen"]):
            self.problem(f"{len(there)} checkpoints are kept: {there}")
        if left := os.listdir(self.given["temp"]):
            self.problem(f"left in the temporary directory: {left}")
        pids = {str(process.pid) for process in group}
        if left := [name for name in os.listdir("/dev/shm") if any(pid in name.split("_") for pid in pids)]:
            self.problem(f"left in /dev/shm: {left}")
        self.saves += sum("staged" in line for line in next(iter(logs.values()), []))

    def samples(self):
        """Of the lives that count, each step consumed the samples that the undisturbed run did."""
        made, steps = {}, max(lives.counting(self.given["root"]))
        for path in sorted(Path(self.given["log"]).glob("*.jsonl")):
            log = lines(path)
            for line in log:
                if "step" in line:
                    shares = made.setdefault(line["step"], {}).setdefault(path.name[:4], {})
                    shares[int(path.name[5:7])] = (log[0]["layout"], line["samples"])
        sampler = ElasticSampler(lives.SAMPLES, global_batch=lives.BATCH, rank=0, world_size=1)
        for step in range(1, steps + 1):
            shares = made[step][max(made[step])]
            whole = [0] if shares[0][0] == "tp" else sorted(shares)
            order = iter(sampler)
            if [i for rank in whole for i in shares[rank][1]] != [next(order) for _ in range(lives.BATCH)]:
                self.problem(f"step {step} consumed {shares}")
            sampler.advance()

    def growth(self, launch):
        """What a long life held more at its end than in its middle."""
        for path, log in self.logs(launch).items():
            for process in ("trainer", "writer"):
                seen = [line[process] for line in log if "staged" in line]
                middle, end = (_typical(seen[at:]) for at in (len(seen) // 2, -len(seen) // 8))
                grown = [b - a for a, b in zip(middle, end, strict=True)]
                for name, amount in zip(("KiB", "descriptors", "threads"), grown, strict=True):
                    name = f"most {name} that a {process} grew by in the second half of {len(seen)} saves"
                    self.tally.figures[name] = max(self.tally.figures.get(name, 0), amount)
                if grown[0] > GROWTH * max(1.0, len(seen) / 200) or grown[1] > 0 or grown[2] > 0:
                    self.problem(f"{path.name}: the {process} grew by {grown} (KiB, descriptors, threads)")


def _typical(seen):
    """Of several measures, the least of each: what is held between saves."""
    return [min(each) for each in zip(*seen[: max(1, len(seen) // 4)], strict=True)]


def campaign(seed, seconds, saves=1000):
    """Runs of several hundred saves each, until as many are made or the time is up."""
    tally, ends = Tally(), time.monotonic() + seconds
    runs = max(1, saves // 500)
    for run in range(runs):
        part = run_on(f"{seed}/{run}", saves // runs, ends, frozen=run % 2 == 0)
        tally.counts += part.counts
        tally.problems += part.problems
        for name, value in part.figures.items():
            tally.figures[name] = (
                max(value, tally.figures.get(name, 0)) if "most" in name else (value + tally.figures.get(name, 0))
            )
    return tally


def run_on(seed, saves, ends, *, frozen, longest=200):
    """One run: its first life is a long one."""
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        run = Endured(folder, seed, 2 * saves + 200, frozen=frozen)
        long = min(saves // 2, longest)
        run.life("fsdp2" if frozen else "fsdp1", 2, long, "none")
        run.growth(1)
        while run.saves < saves and time.monotonic() < ends and not run.tally.problems:
            layout = run.draw.choice(list(LAYOUTS))
            size = run.draw.choice(LAYOUTS[layout])
            run.life(layout, size, run.draw.randint(2, min(40, saves)), run.draw.choice(KILLED))
        run.life("plain", 1, 1, "none")
        run.samples()
        run.tally.figures |= {"saves in the background": run.saves, "lives": run.lives}
        return run.tally
