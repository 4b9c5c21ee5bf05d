"""What happens to a run, a JSON line each in its directory (`events.jsonl`): for people, tools, and the queue of runs.

Written where it happens: by rank 0, its writer process, whoever removes checkpoints, what runs after a commit, and the
queue. So a job that is killed misses nothing that was committed afterwards. Every line has `time` (seconds since the
epoch), `event`, and `launch` where it belongs to one; docs/events.md has the others. It is told, and never relied on
for what to load: a line that cannot be written is warned of. Imports no torch.
"""

from __future__ import annotations

import json
import time
import warnings
from typing import TYPE_CHECKING, Any

from distckpt.errors import StateWarning, StoreError
from distckpt.format.layout import EVENTS
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distckpt.store.base import Store

NAMES = (
    "launched",
    "resumed",
    "probe",
    "staged",
    "committed",
    "failed",
    "skipped",
    "removed",
    "stopping",
    "closed",
    "started",
    "exited",
    "after",
    "replicated",
    "behind",
)
_MOST_TEXT = 2000
_NEWEST = 1 << 16
_BEGINS = b'{"time": '


def record(store: LocalStore, event: str, **what: Any) -> None:
    """Add a line. What is None is left out. StoreError where it cannot be written."""
    assert event in NAMES, event
    said = {name: value[:_MOST_TEXT] if isinstance(value, str) else value for name, value in what.items()}
    line = {"time": round(time.time(), 3), "event": event, **{n: v for n, v in said.items() if v is not None}}
    store.append(EVENTS, json.dumps(line, default=str).encode() + b"\n")


def note(store: Store, event: str, **what: Any) -> None:
    """Add a line, or warn that it cannot be written. A store that is no directory keeps none."""
    if not isinstance(store, LocalStore):
        return
    try:
        record(store, event, **what)
    except StoreError as e:
        if event == "failed":
            return  # that is an error by itself, which a warning taken for one must not hide
        warnings.warn(f"{event} is not noted in {EVENTS}: {e}", StateWarning, stacklevel=3)


def read(root: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Events from byte `start` on, and where each ends. A line that a power cut has torn is left out."""
    try:
        file = (root / EVENTS).open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return  # it is being written
            start += len(line)
            if said := _event(line):
                yield said, start


def newest(root: Path) -> list[dict[str, Any]]:
    """Newest events, oldest first: those at the end of the file, however long it is."""
    try:
        size = (root / EVENTS).stat().st_size
    except FileNotFoundError:
        return []
    return [event for event, _ in read(root, max(0, size - _NEWEST))]


def _event(line: bytes) -> dict[str, Any] | None:
    """What a line says; or the end of it, which was added after one that was torn. None: nothing that is known."""
    begins = 0
    while begins >= 0:
        try:
            said = json.loads(line[begins:])
        except ValueError:
            begins = line.find(_BEGINS, begins + 1)
            continue
        known = isinstance(said, dict) and isinstance(said.get("time"), (int, float)) and said.get("event") in NAMES
        return said if known else None
    return None


class Following:
    """A run's events: those seen so far, and more with each look. From the first on, where the file is another now."""

    def __init__(self, root: Path) -> None:
        self._root, self._end, self._file = root, 0, -1
        self.seen: list[dict[str, Any]] = []

    def look(self) -> list[dict[str, Any]]:
        """Events since the last look."""
        try:
            status = (self._root / EVENTS).stat()
            file, size = status.st_ino, status.st_size
        except FileNotFoundError:
            file, size = -1, 0
        if file != self._file or size < self._end:
            self._file, self._end, self.seen = file, 0, []
        before = len(self.seen)
        for event, end in read(self._root, self._end):
            self.seen.append(event)
            self._end = end
        return self.seen[before:]
