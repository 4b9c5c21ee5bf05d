"""Sweeping: what no commit names, once nobody can commit it any more. What killed saves and deletions leave behind.

Rule 1. Nothing that a commit names, or shares from another directory, is touched; nor anything in a directory whose
commit cannot be read, nor a file whose name is not one that distckpt gives.
Rule 2. An attempt may still commit while its launch lives. It is over if its launch was superseded (its ack says which
launch; or it has not changed since before the newest launch began), or if the caller knows that every launch but its
own, which has saved nothing yet, is; or if no job lives (run/heartbeat.py) and nothing has changed for long. Dates say
nothing of a job that lives, and of what is locked by who writes it.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.errors import DistckptError, KeyMissing, StateWarning
from distckpt.format.layout import ACK, COMMIT, LAUNCHES, LEASES, StepDir, attempt_of, launch_file
from distckpt.run.launches import launch_numbers
from distckpt.run.lease import leased, leases
from distckpt.saving.commit import is_committed, launch_of
from distckpt.store.base import Dated
from distckpt.store.local import LocalStore, Temporary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from distckpt.format.manifest import Manifest
    from distckpt.run.history import History
    from distckpt.store.base import Store

SKEW = 60.0
"""Seconds by which clocks of the nodes that write to one file system are trusted to agree."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A file that no commit names. over: whether it may be removed; why: what it is of."""

    prefix: str
    name: str
    nbytes: int
    over: bool
    why: str
    temporary: bool = False
    uncommitted: StepDir | None = None
    """Its directory, if that had no commit."""

    @property
    def key(self) -> str:
        """Its path in the run."""
        return f"{self.prefix}/{self.name}" if self.prefix else self.name


def leftovers(
    history: History,
    *,
    alone: bool = False,
    alive: bool = False,
    idle: float | None = None,
    among: Callable[[StepDir], bool] = lambda _: True,
) -> list[Leftover]:
    """Every file of a run that no commit names.

    alone: no launch but the caller's lives, and it has nothing in flight: then all of them are over. alive: a job
    lives; then dates tell nothing, for its clocks may be wrong. idle: no job lives; then what is in a directory where
    nothing has changed for so many seconds is. among: step directories to look in; other places only if all are.
    """
    store = history.store
    ended = _Ended(store, alone=alone, alive=alive, idle=idle)
    manifests = {f.directory: f.checkpoint.manifest if f.checkpoint else None for f in history.committed()}
    shared = {f.name for m in manifests.values() if m for f in m.files if "/" in f.name}
    held = leased(store)
    found: list[Leftover] = []
    for directory in filter(among, history.directories()):
        if directory not in manifests and (directory in held or is_committed(store, directory)):
            found += _temporary(store, str(directory), ended)
            continue  # removed, or about to be sent here, while a reader has it; or committed since it was listed
        if directory in manifests and manifests[directory] is None:
            continue  # damaged: it is not known what it names
        found += [left for left in _of(store, directory, manifests.get(directory), ended) if left.key not in shared]
    if all(map(among, history.directories())):
        for prefix in ("", LAUNCHES, LEASES):
            found += _temporary(store, prefix, ended)
        found += [
            Leftover(LEASES, gone.key.partition("/")[2], gone.nbytes, over=True, why="a lease that has expired")
            for gone in leases(store)
            if gone.expired
        ]
    return found


class _Ended:
    """Whether what wrote a file has ended."""

    def __init__(self, store: Store, *, alone: bool, alive: bool, idle: float | None) -> None:
        self._store, self._alone, self._alive, self._idle = store, alone, alive, idle
        self._idle_prefixes: dict[str, bool] = {}
        self._newest = max(launch_numbers(store), default=0)
        self._began = self._changed(launch_file(self._newest)) if self._newest else None

    def _changed(self, key: str) -> float | None:
        """When a file was written, where the store tells."""
        try:
            return self._store.changed(key) if isinstance(self._store, Dated) else None
        except KeyMissing:
            return None

    def attempt(self, directory: StepDir, attempt: str) -> bool:
        """Of an attempt."""
        if self._alone:
            return True
        launch = launch_of(self._store, directory, attempt)
        return launch is not None and launch < self._newest

    def written(self, prefix: str, changed: float | None) -> bool:
        """Of what was last written below a prefix then."""
        if self._alone or self._alive or self._in_use(prefix):
            return self._alone
        superseded = changed is not None and self._began is not None and changed < self._began - SKEW
        return superseded or self._is_idle(prefix)

    def file(self, directory: StepDir, name: str) -> bool:
        """Of a file."""
        return self.written(str(directory), self._changed(f"{directory}/{name}"))

    def _in_use(self, prefix: str) -> bool:
        """Whether somebody who lives is writing there, whatever the dates say."""
        return isinstance(self._store, LocalStore) and bool(self._store.arriving(prefix))

    def _is_idle(self, prefix: str) -> bool:
        """Whether no job lives, and the last one's writer process is done, too."""
        if prefix not in self._idle_prefixes:
            self._idle_prefixes[prefix] = self._looks_idle(prefix)
        return self._idle_prefixes[prefix]

    def _looks_idle(self, prefix: str) -> bool:
        store = self._store
        if self._idle is None or not isinstance(store, Dated):
            return False
        lead = f"{prefix}/" if prefix else ""
        files = (self._changed(lead + entry.name) for entry in store.list(prefix) if entry.size is not None)
        changes = [*filter(None, files), *(changed for _, changed, _ in _unfinished(store, prefix))]
        return time.time() - max(changes, default=0.0) > self._idle


def _of(store: Store, directory: StepDir, content: Manifest | None, ended: _Ended) -> Iterator[Leftover]:
    """Files of a step directory that its commit, if it has one, does not name."""
    named = {COMMIT}
    if content:
        named |= {f.name for f in content.files} | {o.name for o in content.objects.values()}
    over: dict[str, bool] = {}
    uncommitted = None if content else directory
    for entry in store.list(str(directory)):
        attempt = attempt_of(entry.name)
        if entry.name in named or attempt is None or entry.size is None:
            continue
        if attempt not in over:
            over[attempt] = ended.attempt(directory, attempt)
        if content and attempt == content.attempt:
            yield Leftover(str(directory), entry.name, entry.size, over=True, why="an ack of a committed save")
        else:
            may_go = over[attempt] or ended.file(directory, entry.name)
            why = f"attempt {attempt}, which did not commit"
            yield Leftover(str(directory), entry.name, entry.size, may_go, why, uncommitted=uncommitted)
    yield from _temporary(store, str(directory), ended)


def _temporary(store: Store, prefix: str, ended: _Ended) -> Iterator[Leftover]:
    for name, changed, nbytes in _unfinished(store, prefix):
        yield Leftover(
            prefix, name, nbytes, ended.written(prefix, changed), "a write that did not finish", temporary=True
        )


def _unfinished(store: Store, prefix: str) -> Temporary:
    return store.unfinished(prefix) if isinstance(store, LocalStore) else []


def sweep(history: History, found: Iterable[Leftover]) -> tuple[list[Leftover], list[str]]:
    """Remove leftovers that are over, acks first. Returns those removed, and problems with the others."""
    store = history.store
    removed: list[Leftover] = []
    over = sorted((left for left in found if left.over), key=lambda left: not left.name.startswith(ACK))
    try:
        for left in over:
            if left.uncommitted and is_committed(store, left.uncommitted):
                continue  # somebody was quicker after all
            if left.temporary and isinstance(store, LocalStore):
                store.discard(left.prefix, left.name)
            else:
                store.delete(left.key)
            removed.append(left)
    except DistckptError as e:
        return removed, [str(e)]
    return removed, []


def clear_up(history: History, launch: int, *, alone: bool = True) -> None:
    """Remove what earlier launches left behind, by a launch that has saved nothing yet. Failing at it is warned of.

    alone: nobody else writes there. Else what an earlier launch sent stays, and writes that it did not finish go.
    """
    try:
        found = [left for left in leftovers(history, alone=alone) if alone or left.temporary]
        if max(launch_numbers(history.store), default=0) > launch:
            return  # of what was found, some may be of a later one: that clears up itself
        problems = sweep(history, found)[1]
    except DistckptError as e:
        problems = [str(e)]
    for problem in problems:
        warnings.warn(f"what earlier saves left behind could not be removed: {problem}", StateWarning, stacklevel=4)
