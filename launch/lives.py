"""Lives of a training job: started, watched, cut off in the middle of a save, started again."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from launch.job import Job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LIFE_TIMEOUT = 120.0
"""Seconds that one life may take."""

_STEP_DIR = re.compile(r"step-(\d+)(\.\d+)?")


class Broken(Exception):
    """A run that did not do what was asked of it. The message ends with the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a phase does: the ranks of each life, and the step from which on a save of each life but the last is cut."""

    phase: str
    dropout: float
    ranks: tuple[int, ...]
    kills: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """What happened between one start and its end or death."""

    phase: str
    ranks: int
    first: int
    last: int
    startup: float
    """Seconds from the start of torchrun to the end of the first step."""
    cut: int | None
    """Step whose save was under way when the job was killed; None if it came to its end, or died between saves."""


class Screen:
    """What a user sees meanwhile: one bar over all steps on a terminal, else a line now and then."""

    def __init__(self, steps: int) -> None:
        self._bar = tqdm(total=steps, unit="step") if sys.stderr.isatty() else None
        self._started, self._said = time.monotonic(), 0.0

    def say(self, text: str) -> None:
        """Print a line."""
        self._said = time.monotonic()
        tqdm.write(f"{self._said - self._started:5.0f} s  {text}", file=sys.stdout)
        sys.stdout.flush()

    def step(self, phase: str, row: dict[str, Any], *, new: bool) -> None:
        """Show a step that was made, for the first time or again."""
        if self._bar is not None:
            self._bar.update(int(new))
        elif time.monotonic() - self._said > 5:
            self.say(f"phase {phase}: step {row['step']}, loss {row['loss']:.3f}")

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._bar is not None:
            self._bar.close()


class Run:
    """One phase: its checkpoints, its losses, the lives it has led. Begins in an empty directory."""

    def __init__(self, out: Path, plan: Plan, steps: int, screen: Screen) -> None:
        self.plan, self.steps = plan, steps
        self.dir = out / f"phase-{plan.phase}"
        self.root = self.dir / "checkpoints"
        self.lives: list[Life] = []
        self.rows: list[dict[str, Any]] = []
        """Every step made, in the order of time; a step that a kill undid and a later life made again comes twice."""
        self._screen = screen
        self._losses = self.dir / "losses.jsonl"
        self._read_to = 0
        shutil.rmtree(self.dir, ignore_errors=True)
        self.root.mkdir(parents=True)
        self._losses.touch()

    def go(self) -> None:
        """Lead every life of the plan. Broken if one does not get as far as it must."""
        for ranks, kill_from in zip(self.plan.ranks, [*self.plan.kills, None], strict=True):
            kill = kill_from
            while True:
                life = self._live(ranks, kill)
                self.lives.append(life)
                if kill is None or life.cut is not None:
                    break
                self._screen.say(f"phase {self.plan.phase}: that save was whole before the kill; trying the next one")
                kill = life.last + 1

    def committed(self) -> dict[int, Path]:
        """Directory of each step that has a commit."""
        return {step: path for step, path in self._step_dirs() if (path / "commit.json").exists()}

    def _live(self, ranks: int, kill: int | None) -> Life:
        """One life: to the last step, or until a save of step `kill` or later is under way."""
        before, newest = len(self.rows), max(self.committed(), default=0)
        options = {"root": self.root, "losses": self._losses, "steps": self.steps, "every": max(1, self.steps // 10)}
        options |= {"dropout": self.plan.dropout, "seq": 32}  # short samples: there are 200 steps to make, and 2 cores
        args = [f"--{name}={value}" for name, value in options.items()]
        start = f"from step {newest}" if newest else "from the beginning"
        end = f"to be killed in the first save from step {kill} on" if kill else "to the end"
        self._screen.say(f"phase {self.plan.phase}: {ranks} ranks, {start}, {end}")
        log = self.dir / f"life-{len(self.lives) + 1}.log"
        with Job("launch.train_fsdp", *args, ranks=ranks, log=log) as job:
            under_way = self._watch(job, kill)
            job.kill()
            self._read()
            cut = under_way if under_way not in self.committed() else None
            made = self.rows[before:]
            began = made[0]["step"] - 1 if made else -1
            # a step after the newest committed one is right too: a resume commits a save that only lacked its commit
            if began < newest or (began and began not in self.committed()):
                raise Broken(f"phase {self.plan.phase} did not go on from step {newest}, but {began}\n{job.tail()}")
            if kill is None and made[-1]["step"] != self.steps:
                raise Broken(
                    f"phase {self.plan.phase} ended at step {made[-1]['step']}, not {self.steps}\n{job.tail()}"
                )
        if cut:
            self._screen.say(f"phase {self.plan.phase}: SIGKILL to all in the middle of the save of step {cut}")
        startup = made[0]["time"] - job.started
        return Life(
            phase=self.plan.phase, ranks=ranks, first=made[0]["step"], last=made[-1]["step"], startup=startup, cut=cut
        )

    def _watch(self, job: Job, kill: int | None) -> int | None:
        """Wait for a save of step `kill` or later to be under way, and return its step; or for the end: None."""
        deadline, looked = time.monotonic() + LIFE_TIMEOUT, 0.0
        while job.poll() is None:
            time.sleep(0.001)  # a save of this model takes tens of milliseconds
            self._read()
            if kill is not None and self.rows and self.rows[-1]["step"] >= kill:
                if step := self._half_written(kill, job.started):
                    return step
            elif time.monotonic() - looked > 0.5:
                looked = time.monotonic()
                job.look()
            if time.monotonic() > deadline:
                raise Broken(f"phase {self.plan.phase} took more than {LIFE_TIMEOUT:g} s\n{job.tail()}")
        if job.poll() != 0:
            raise Broken(f"phase {self.plan.phase}: torchrun exited with status {job.poll()}\n{job.tail()}")
        if kill is not None:
            raise Broken(f"phase {self.plan.phase} ended before a save from step {kill} on could be cut\n{job.tail()}")
        return None

    def _read(self) -> None:
        """Take in the steps made since the last call."""
        if self._losses.stat().st_size == self._read_to:
            return
        with self._losses.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if line.endswith(b"\n"):  # else rank 0 is writing it
                    self._read_to += len(line)
                    row = json.loads(line)
                    new = all(row["step"] != other["step"] for other in self.rows)
                    self.rows.append(row)
                    self._screen.step(self.plan.phase, row, new=new)

    def _step_dirs(self) -> Iterator[tuple[int, Path]]:
        for path in self.root.iterdir():
            if match := _STEP_DIR.fullmatch(path.name):
                yield int(match[1]), path

    def _half_written(self, first: int, since: float) -> int | None:
        """A step from `first` on of which data lies there, written since that time, but no commit."""
        for step, path in self._step_dirs():
            if step < first or (path / "commit.json").exists():
                continue
            with contextlib.suppress(FileNotFoundError):  # a temp file got its name meanwhile: it is seen next time
                for file in path.iterdir():
                    if file.name.startswith(("rank-", ".tmp-")) and file.stat().st_mtime >= since:
                        return step
        return None
