"""Goodput: the share of a run's wall time in which it trained for good. Pure: from its events alone.

Training counts from the end of a resume to the step that the next launch resumes from (of the newest launch: to its
last sign of life), less what saves kept it waiting. The rest was start-up, loading, saving, waiting for a machine, and
work that was lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True, slots=True)
class Goodput:
    """Seconds of a run, from its first launch to its last sign of life.

    lost: trained, and trained again. down: between one launch's last sign of life and the next one's first step.
    """

    wall: float = 0.0
    training: float = 0.0
    saving: float = 0.0
    lost: float = 0.0
    down: float = 0.0
    launches: int = 0

    @property
    def share(self) -> float | None:
        """Share of the wall time that was training; None where none has passed. At most 1, whatever clocks did."""
        return min(1.0, self.training / self.wall) if self.wall > 0 else None


@dataclass(slots=True)
class _Life:
    began: float
    resumed_from: int | None
    trains: float | None = None
    """Since when; None while it loads."""
    last: float = 0.0
    stalls: list[tuple[float, float]] | None = None
    steps: dict[int, float] | None = None


def goodput(events: Iterable[Mapping[str, Any]], alive_at: float | None = None) -> Goodput:
    """Goodput of a run, given its events in order. alive_at: when it was last seen alive, if later than all events."""
    lives = _lives(events)
    if not lives:
        return Goodput()
    if alive_at is not None:
        lives[-1].last = max(lives[-1].last, alive_at)
    training = saving = lost = down = 0.0
    for number, life in enumerate(lives):
        following = lives[number + 1] if number + 1 < len(lives) else None
        begin = life.trains if life.trains is not None else life.last
        end = life.last
        if following and following.resumed_from is None:
            end = begin
        elif following:
            end = min(end, max(begin, (life.steps or {}).get(following.resumed_from or 0, begin)))
        stalled = sum(seconds for at, seconds in life.stalls or [] if begin < at <= end)
        training += max(0.0, end - begin - stalled)
        saving += stalled
        lost += life.last - end
        down += begin - life.began + (max(0.0, following.began - life.last) if following else 0.0)
    return Goodput(lives[-1].last - lives[0].began, training, saving, lost, down, len(lives))


def _lives(events: Iterable[Mapping[str, Any]]) -> list[_Life]:
    lives: dict[int, _Life] = {}
    for said in events:
        launch, at = said.get("launch"), float(said["time"])
        if said["event"] == "launched" and isinstance(launch, int):
            lives[launch] = _Life(at - float(said.get("seconds", 0.0)), said.get("step"), at, at, [], {})
        if launch not in lives or said["event"] in {"removed", "after"}:
            continue
        life = lives[launch]
        life.last = max(life.last, at)
        if said["event"] == "staged":
            assert life.stalls is not None
            assert life.steps is not None
            life.stalls.append((at, float(said.get("stall", 0.0))))
            life.steps[int(said["step"])] = at
    return [lives[launch] for launch in sorted(lives)]
