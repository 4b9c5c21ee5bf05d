"""What `Checkpointer.step` costs a training loop while nothing is due: triggers by step and time, and preemption."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from benchmarks.report import Report, Table
from benchmarks.rounds import Ratio
from distckpt import Checkpointer, Progress, TrainState

if TYPE_CHECKING:
    from benchmarks.options import Options
    from benchmarks.ranks import World

EVERY = ("1000000 steps", "10 h", "1000 epochs")
STEPS = 4000


def step(world: World, options: Options) -> Report:
    """Time the call in a loop of nothing else, where it meets the other ranks every 64 steps, and in one of 2 ms."""
    report = Report("step")
    rows = [["loop", "microseconds a step"]]
    with options.media(world) as media:
        for work in (0.0, 0.002):
            found = [_pace(world, str(media["disk"] / f"{work}.{n}"), work) for n in range(options.rounds)]
            what = f"{work * 1e3:.0f} ms a step" if work else "nothing else"
            rows.append([what, str(Ratio.of(found))])
            if work:
                report.ratios["step_us"] = Ratio.of(found)
            else:
                report.ratios["step_us_alone"] = Ratio.of(found)
    report.tables.append(Table(f"Checkpointer.step while nothing is due, {world.size} ranks", rows))
    return report


def _pace(world: World, root: str, work: float) -> float:
    """Microseconds that a step spends in the call, on the slowest rank."""
    progress = Progress()
    state = TrainState(model=torch.nn.Linear(64, 64), progress=progress, rng=False)
    spent = 0.0
    steps = STEPS if not work else STEPS // 8
    with Checkpointer(root, every=EVERY, preemption=True) as checkpointer:
        checkpointer.step(0, state)  # the first makes an arena and starts the writer
        for number in range(1, steps + 1):
            progress.advance(1)
            if work:
                time.sleep(work)
            started = time.perf_counter()
            checkpointer.step(number, state)
            spent += time.perf_counter() - started
    slowest: float = max(world.gather(spent))
    return slowest / steps * 1e6
