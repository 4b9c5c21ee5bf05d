"""How each run of a queue is doing: from its events, and nvidia-smi."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from distckpt.queue.gpus import gpus
from distckpt.queue.standing import State, age, newest_step, standing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distckpt.queue.gpus import Gpu
    from distckpt.queue.spec import Queue, Run
    from distckpt.queue.standing import Event, Standing


@dataclass(frozen=True, slots=True)
class Row:
    """One run. rate: samples a second (steps a second where no samples are counted). eta, age: seconds.

    problem: why nothing can be told of it.
    """

    name: str
    state: str
    step: int | None
    steps: int | None
    epoch: int | None
    metric: float | None
    best: float | None
    rate: float | None
    rate_of: str
    age: float | None
    eta: float | None
    crashes: int
    gpus: list[dict[str, Any]]
    problem: str


def rows(queue: Queue) -> list[Row]:
    """Where each run stands, now."""
    machine = {gpu.index: gpu for gpu in gpus()}
    return [_row(run, standing(run, queue.restarts), machine) for run in queue.runs]


def _row(run: Run, found: Standing, machine: Mapping[int, Gpu]) -> Row:
    commits = [e for e in found.events if e["event"] == "committed"]
    staged = [e for e in found.events if e["event"] == "staged"]
    values = [v for e in commits if isinstance(v := e.get("metrics", {}).get(run.metric), (int, float))]
    step = newest_step(found.events)
    speed, unit = _speed(_of_newest_launch(staged))
    steps_a_second, _ = _speed(_of_newest_launch(staged), "step")
    running = found.state is State.RUNNING
    left = run.steps - (step or 0) if run.steps is not None else None
    eta = left / steps_a_second if running and left is not None and steps_a_second else None
    if eta is not None and commits:
        eta = max(0.0, eta - age(commits[-1]))
    on = [asdict(machine[i]) for i in found.gpus if i in machine] if running else []
    best = (min if run.mode == "min" else max)(values, default=None)
    return Row(
        run.name,
        found.state.value,
        step,
        run.steps,
        next((e["epoch"] for e in reversed(staged) if "epoch" in e), None),
        values[-1] if values else None,
        best,
        speed if running else None,
        unit,
        age(commits[-1]) if commits else None,
        eta,
        found.crashes,
        on,
        found.problem,
    )


def _of_newest_launch(staged: Sequence[Event]) -> list[Event]:
    return [e for e in staged if e.get("launch") == staged[-1].get("launch")] if staged else []


def _speed(staged: Sequence[Event], unit: str = "") -> tuple[float | None, str]:
    """Rate between the first and last of some saves, and of what."""
    unit = unit or ("samples" if staged and all("samples" in e for e in staged) else "step")
    if len(staged) < 2 or staged[-1]["time"] <= staged[0]["time"]:
        return None, unit
    return (staged[-1][unit] - staged[0][unit]) / (staged[-1]["time"] - staged[0]["time"]), unit
