"""`distckpt queue FILE run|status|stop|submit`: several runs in order, so many at a time, through crashes and reboots.

run      go on with the queue until all is finished: the same command after every reboot
status   where each run stands
stop     have the runs of a queue save and end, and the queue too
submit   the same as a SLURM array
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.queue.cluster import submit
from distckpt.queue.progress import rows
from distckpt.queue.runner import GRACE, Runner, runs_it
from distckpt.queue.spec import load
from distckpt.queue.standing import State, signal_run, standing
from distckpt.tools.answer import Answer, seconds, table, tell

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from distckpt.queue.progress import Row
    from distckpt.queue.spec import Queue


_LOOK = 0.2
"""Seconds between looks at whether all has stopped."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("file", metavar="FILE", help="TOML file of the queue (docs/queue.md)")
    add("what", choices=("run", "status", "stop", "submit"))
    add("--retry", action="store_true", help="run: start what has failed, or was stopped by hand, too")
    add("--every", type=seconds, metavar="SECONDS", help="status: again and again, until interrupted")
    add("--script", default="launch/slurm/array.sbatch", help="submit: the batch script")
    add(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="submit: an option of sbatch (--sbatch=--gres=gpu:1)",
    )


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    queue = load(given.file)
    if given.what == "run":
        return _run(queue, given)
    if given.what == "status":
        return _status(queue, given)
    if given.what == "stop":
        return _stop(queue)
    said = submit(queue, Path(given.script).absolute(), given.sbatch)
    return Answer([said], {"sbatch": said})


def _run(queue: Queue, given: argparse.Namespace) -> Answer:
    def say(text: str) -> None:
        tell(f"{time.strftime('%F %T')}  {text}", beside=given.json)

    stands = Runner(queue, retry=given.retry, say=say).run()
    wrong = [name for name, state in stands.items() if state is not State.FINISHED]
    return Answer(
        [f"{name}: {state.value}" for name, state in stands.items()],
        {name: state.value for name, state in stands.items()},
        int(bool(wrong)),
    )


def _status(queue: Queue, given: argparse.Namespace) -> Answer:
    while given.every:
        found = rows(queue)
        shown = json.dumps([asdict(row) for row in found]) if given.json else "\n".join(lines(found))
        tell(f"\033[H\033[2J{shown}" if sys.stdout.isatty() and not given.json else f"{shown}\n")
        time.sleep(given.every)
    found = rows(queue)
    return Answer(lines(found), [asdict(row) for row in found])


def _stop(queue: Queue) -> Answer:
    """Stop the runs; one that runs the queue is told, and starts none of them again."""
    told, deadline = set[int | None](), time.monotonic() + GRACE + 10.0
    while time.monotonic() < deadline:
        pid = runs_it(queue)
        left = [r for r in queue.runs if standing(r, queue.restarts).state is State.RUNNING]
        if pid is None and not left:
            return Answer(["nothing of the queue runs any more"], {"running": []})
        if pid and pid not in told:
            os.kill(pid, signal.SIGTERM)
        elif pid is None and None not in told:
            for run in left:
                signal_run(standing(run, queue.restarts).events, signal.SIGTERM)
        told.add(pid)
        time.sleep(_LOOK)
    names = [run.name for run in left]
    return Answer([f"still running: {', '.join(names)}"], {"running": names}, code=1)


def lines(found: Sequence[Row]) -> list[str]:
    """Rows for people."""
    head = ("run", "state", "step", "epoch", "metric", "best", "a second", "checkpoint", "ETA", "GPU")
    return [*table([head, *map(_text, found)]), *(f"{row.name}: {row.problem}" for row in found if row.problem)]


def _text(row: Row) -> tuple[str, ...]:
    step = "-" if row.step is None else str(row.step)
    return (
        row.name,
        row.state + (f" ({row.crashes} crashes)" if row.crashes else ""),
        f"{step}/{row.steps} {100 * (row.step or 0) // row.steps}%" if row.steps else step,
        "-" if row.epoch is None else str(row.epoch),
        _number(row.metric),
        _number(row.best),
        "-" if row.rate is None else f"{row.rate:.3g} {row.rate_of if row.rate_of == 'samples' else 'steps'}",
        "-" if row.age is None else f"{_time(row.age)} ago",
        "-" if row.eta is None else _time(row.eta),
        ", ".join(_gpu(gpu) for gpu in row.gpus) or "-",
    )


def _gpu(gpu: Mapping[str, Any]) -> str:
    busy = "" if gpu["busy"] is None else f" {gpu['busy']:.0f}%"
    memory = (
        "" if gpu["used"] is None or not gpu["total"] else f" {gpu['used'] / 1024:.1f}/{gpu['total'] / 1024:.0f} GiB"
    )
    return f"{gpu['index']}:{busy}{memory}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _time(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    clock = time.strftime("%H:%M:%S", time.gmtime(rest))
    return f"{days} d {clock}" if days else clock
