"""When to save: every so many steps, so much time, so many epochs, or when a function says so. Pure.

Steps, epochs and functions give the same answer on every rank; of time only rank 0's counts, and the ranks meet for it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    Trigger = int | str | Callable[[int, int | None], bool]

_SECONDS = {
    "s": 1.0,
    "sec": 1.0,
    "second": 1.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "day": 86400.0,
}
_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+?)s?")
_EXPECTED = "a number of steps, or one of '500 steps', '20 min', '2 h', '1 epoch', or a function of (step, epoch)"


@dataclass(frozen=True, slots=True)
class Triggers:
    """When a save is due. Empty: never."""

    steps: tuple[int, ...] = ()
    seconds: float = math.inf
    epochs: int = 0
    functions: tuple[Callable[[int, int | None], bool], ...] = ()

    @staticmethod
    def of(every: Trigger | tuple[Trigger, ...] | list[Trigger] | None) -> Triggers:
        """Triggers that a user wrote, any of which makes a save due. ValueError."""
        given = list(every) if isinstance(every, (tuple, list)) else [] if every is None else [every]
        steps, seconds, epochs, functions = [], math.inf, 0, []
        for one in given:
            if callable(one):
                functions.append(one)
                continue
            number, unit = _parsed(one)
            if unit == "step":
                steps.append(int(number))
            elif unit == "epoch":
                epochs = min(epochs or int(number), int(number))
            else:
                seconds = min(seconds, number * _SECONDS[unit])
        return Triggers(tuple(steps), seconds, epochs, tuple(functions))

    def due(self, step: int, epoch: int | None, epoch_before: int | None) -> bool:
        """Whether what all ranks know makes a save due after `step`. epoch: now, and at the step before. ValueError."""
        if any(step % n == 0 for n in self.steps) or any(fn(step, epoch) for fn in self.functions):
            return True
        if not self.epochs:
            return False
        if epoch is None:
            raise ValueError(
                "every='... epochs': no part of the state counts epochs: give TrainState progress= or sampler="
            )
        return epoch_before is not None and epoch // self.epochs > epoch_before // self.epochs


def _parsed(one: Any) -> tuple[float, str]:
    if type(one) is int and one >= 1:
        return one, "step"
    found = _FORM.fullmatch(one.strip().lower()) if isinstance(one, str) else None
    unit = found[2] if found else ""
    number = float(found[1]) if found else 0.0
    if number > 0 and (unit in _SECONDS or (unit in {"step", "epoch"} and number == int(number))):
        return number, unit
    raise ValueError(f"every={one!r}: {_EXPECTED}")


def duration(text: str | float, what: str) -> float:
    """Seconds of `20 min`, `2 h`, or a number of seconds. ValueError."""
    if isinstance(text, (int, float)) and not isinstance(text, bool) and 0 < text < math.inf:
        return float(text)
    found = _FORM.fullmatch(text.strip().lower()) if isinstance(text, str) else None
    if found and found[2] in _SECONDS and float(found[1]) > 0:
        return float(found[1]) * _SECONDS[found[2]]
    raise ValueError(f"{what}={text!r}: a number of seconds, or a time such as '20 min' or '2 h'")


def best_interval(cost: float, between_failures: float) -> float:
    """Seconds between saves that lose least time, if each costs `cost` seconds of training (Young's formula).

    between_failures: mean seconds between failures of the job. Half an interval is lost with each, on average.
    """
    return math.sqrt(2 * cost * between_failures)
