"""Saving one checkpoint and making it known: what every way to save a run ends in. Collective."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import RunConflict, Unsupported
from distckpt.loading.open import Checkpoint
from distckpt.run.publish import publish
from distckpt.saving.save import Committed, Request, save

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.comm import Comm
    from distckpt.run.history import History
    from distckpt.run.publish import Then
    from distckpt.state import State


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did: directory in the run, bytes of all ranks together, wall seconds."""

    step: int
    directory: str
    nbytes: int
    seconds: float
    notes: list[str]


def save_and_publish(
    comm: Comm,
    history: History,
    capture: Callable[[], State],
    request: Request,
    then: Then,
) -> Committed:
    """Save a state, commit it, make it known, and do what follows.

    Raises on every rank what fails on any; nothing is committed then.
    """
    started = time.monotonic()
    try:
        made = save(comm, history.store, capture, request)
    except RunConflict:  # a zombie took the directory between our look and our commit; there is a next generation
        made = save(comm, history.store, capture, request)
    if made.manifest is not None:
        seconds = time.monotonic() - started
        publish(history, Checkpoint(history.store, made.directory, made.manifest), then, seconds)
    return made


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as Python numbers. Unsupported, with the name, for what is neither a number nor a text."""
    found = dict[str, Any]()
    for name, value in metrics.items():
        try:
            found[str(name)] = value.item() if hasattr(value, "item") else value
        except (RuntimeError, ValueError) as e:  # noqa: PERF203  a tensor or an array of several elements
            raise Unsupported(f"metric {name!r}: {e}; a number is expected") from e
    for name, value in found.items():
        if not isinstance(value, (bool, int, float, str)):
            raise Unsupported(f"metric {name!r} is a {type(value).__qualname__}; a number is expected")
    return found
