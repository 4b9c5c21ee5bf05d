"""The runs below a directory or URI, and where each stands: told from its files alone, at once. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import DistckptError, KeyMissing
from distckpt.run.events import newest
from distckpt.run.heartbeat import has_ended, seen_alive
from distckpt.run.history import History
from distckpt.run.launches import launch_numbers
from distckpt.run.place import followed
from distckpt.run.retention import listed
from distckpt.store.base import Dated, each
from distckpt.store.local import LocalStore
from distckpt.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.run.retention import Listed
    from distckpt.store.base import Store

DEPTH = 2
"""Levels below a directory that runs are looked for at: `runs/first`, and `runs/first/checkpoints`."""

FINISHED, RUNNING, ENDED, RESUMABLE, DEAD = "finished", "running", "ended", "resumable", "dead"
"""finished: its job said so. running: its heart beats. ended: its job has closed it, well or not (a URI keeps no
events, which tell). resumable: none of these, and it holds a checkpoint that counts. dead: it holds none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run. checkpoints: that count; bytes: of all that are committed. problem: why nothing can be told of it."""

    run: str
    state: str
    step: int | None = None
    date: str | None = None
    checkpoints: int = 0
    bytes: int = 0
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        """Members, `problem` only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "problem" or value}


def runs_below(root: str) -> list[Row]:
    """Runs at most DEPTH levels below, by name; empty where there are none."""
    whole = followed(root)
    return [] if isinstance(whole, Path) and not whole.is_dir() else _below(whole, "", DEPTH)


def _below(root: str | Path, lead: str, depth: int) -> list[Row]:
    store = open_store(root)
    names = [entry.name for entry in store.list("") if entry.size is None]
    found = each(store.pace, lambda name: _row_or_below(root, f"{lead}{name}", name, depth), names)
    return [row for rows in found for row in rows]


def _row_or_below(root: str | Path, name: str, last: str, depth: int) -> list[Row]:
    where = root / last if isinstance(root, Path) else f"{root}/{last}"
    try:
        history = History(open_store(where))
        if history.is_checkpoint():
            return []
        if history.directories() or launch_numbers(history.store):
            return [_row(name, history)]
        return _below(where, f"{name}/", depth - 1) if depth > 1 else []
    except (DistckptError, OSError) as e:  # the others are wanted all the same
        return [Row(name, "unreadable", problem=str(e))]


def _row(name: str, history: History) -> Row:
    checkpoints = listed(history)
    counting = next((c.found.checkpoint for c in checkpoints if c.candidate.state == "committed"), None)
    return Row(
        name,
        state_of(history.store, checkpoints),
        counting.manifest.step if counting else None,
        counting.manifest.date if counting else None,
        sum(c.candidate.state == "committed" for c in checkpoints),
        sum(c.candidate.nbytes for c in checkpoints),
    )


def state_of(store: Store, checkpoints: Sequence[Listed]) -> str:
    """Where a run stands, given its committed checkpoints. Waits for nothing."""
    if _lives(store):
        return RUNNING
    if all(c.candidate.state != "committed" for c in checkpoints):
        return DEAD
    if isinstance(store, LocalStore):
        return FINISHED if _finished(store.root) else RESUMABLE
    return ENDED if has_ended(store) else RESUMABLE


def _lives(store: Store) -> bool:
    try:
        return isinstance(store, Dated) and seen_alive(store)
    except KeyMissing:
        return False  # its beat has been removed meanwhile


def _finished(root: Path) -> bool:
    """Whether the last life of its job ended well, and not because it was told to stop."""
    closed = False
    for event in reversed(newest(root)):
        match event:
            case {"event": "exited"}:  # of the queue, which knows how the whole command ended
                return bool(event.get("code") == 0)
            case {"event": "stopping"}:
                return False
            case {"event": "closed"}:
                if event.get("failed"):
                    return False
                closed = True
            case {"event": "launched" | "started"}:
                break
    return closed
