"""Which checkpoints of a run there are, and which of them count. Listing is the truth; pointers and meta.json are not.

Whatever `meta.json` and `last.json` (run/publish.py) say, a commit must bear it out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, KeyMissing, NewerFormat, NotACheckpoint, RunConflict
from distckpt.format.layout import COMMIT, StepDir, attempt_of
from distckpt.loading.open import Checkpoint, open_checkpoint
from distckpt.run.launches import counts, read_launches
from distckpt.run.lease import being_removed
from distckpt.saving.commit import (
    Attempt,
    acked_ranks,
    commit,
    complete,
    found_attempt,
    is_committed,
    remove_acks,
)
from distckpt.store.base import Copied, each
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from distckpt.errors import DistckptError
    from distckpt.format.manifest import Manifest, TensorInfo
    from distckpt.run.launches import Launch
    from distckpt.store.base import Store


@dataclass(frozen=True, slots=True)
class Found:
    """A committed step directory: its checkpoint, or why it cannot be opened; whether a later launch superseded it."""

    directory: StepDir
    checkpoint: Checkpoint | None
    problem: str = ""
    superseded: bool = False


class History:
    """Checkpoints of one run. Commits never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._opened: dict[StepDir, Checkpoint] = {}
        self._launches: dict[int, Launch | None] = {}
        self._tensors: Mapping[str, TensorInfo] = {}
        self.epochs: dict[str, int | None] = {}
        """Epoch of each attempt, as far as it was asked for: it takes a read."""

    def directories(self) -> list[StepDir]:
        """Every step directory, committed or not, newest first."""
        found = (StepDir.parse(entry.name) for entry in self.store.list("") if entry.size is None)
        return sorted((d for d in found if d), reverse=True)

    def committed(self) -> Iterator[Found]:
        """Every committed checkpoint, newest first, read one at a time. NewerFormat is raised, not skipped."""
        launches = read_launches(self.store, self._launches)
        for directory, found in self._looked_at():
            if isinstance(found, NewerFormat):
                raise found
            if found is None:
                self._opened.pop(directory, None)  # removed, or half of it
            elif isinstance(found, Checkpoint):
                if directory not in self._opened:
                    self.add(found)
                superseded = not counts(directory, found.manifest.launch, launches)
                if superseded and (other := self._other_copy(directory)):
                    self.add(other)
                    superseded = not counts(directory, other.manifest.launch, launches)
                yield Found(directory, self._opened[directory], superseded=superseded)
            else:
                yield Found(directory, None, str(found))

    def _looked_at(self) -> Iterator[tuple[StepDir, Checkpoint | DistckptError | None]]:
        """Yield what each directory holds. The newest is often all that is asked for; others are looked at together."""
        directories = self.directories()
        together = self.store.pace.in_flight if self.store.pace.gap else 1
        batches = [directories[:1], *(directories[i : i + together] for i in range(1, len(directories), together))]
        for batch in batches:
            yield from zip(batch, each(self.store.pace, self._look, batch), strict=True)

    def _look(self, directory: StepDir) -> Checkpoint | DistckptError | None:
        """What a directory holds: a checkpoint, what is wrong with it, or (None) nothing that is committed."""
        if known := self._opened.get(directory):
            return known if is_committed(self.store, directory) else None
        try:
            return open_checkpoint(self.store, directory)
        except NotACheckpoint:
            return None
        except (Corrupt, FormatError) as e:  # NewerFormat is one
            return e

    def _other_copy(self, directory: StepDir) -> Checkpoint | None:
        """Open what another machine has committed under the same name, where the store has a copy of that, too."""
        if not (isinstance(self.store, Copied) and self.store.distrust(f"{directory}/{COMMIT}")):
            return None
        try:
            return open_checkpoint(self.store, directory)
        except (Corrupt, FormatError, NotACheckpoint):
            return None  # then the superseded one is all there is

    def open(self, directory: StepDir) -> Checkpoint:
        """Open a committed checkpoint for a load: its counts begin at nothing. See open_checkpoint."""
        known = self._opened.get(directory)
        return Checkpoint(self.store, directory, known.manifest) if known else open_checkpoint(self.store, directory)

    def valid(self) -> Iterator[Checkpoint]:
        """Checkpoints that count and can be opened, newest first."""
        return (f.checkpoint for f in self.committed() if f.checkpoint and not f.superseded)

    def superseded(self) -> list[StepDir]:
        """Committed checkpoints that no longer count, newest first."""
        return [found.directory for found in self.committed() if found.superseded]

    def refuse_checkpoint(self) -> None:
        """RunConflict where the store is the directory of one checkpoint, to which nothing must be added."""
        if self.is_checkpoint():
            raise RunConflict(f"{self.store}: {_ONE_CHECKPOINT}")

    def is_checkpoint(self) -> bool:
        """Whether the store is the directory of one checkpoint, not of a run."""
        return any(entry.name == COMMIT for entry in self.store.list(""))

    def why_nothing(self) -> str:
        """Why there is no checkpoint that counts, for a message."""
        names = [entry.name for entry in self.store.list("")]
        if COMMIT in names:
            return _ONE_CHECKPOINT
        known = {f.directory: "superseded" if f.superseded else f.problem or "whole" for f in self.committed()}
        told = [
            f"{directory} is {known.get(directory, 'a save that did not finish')}" for directory in self.directories()
        ]
        if told:
            return ", ".join(told[:5])
        return f"it has no step directory, but {', '.join(names[:5])}" if names else "there is nothing"

    def next_generation(self, step: int) -> int:
        """Return a generation of this step that no directory, finished or not, has taken; nor one being removed.

        Whoever removes that, and has stood still, would remove the new one in its place.
        """
        looks: tuple[Callable[[], Collection[StepDir]], ...] = (self.directories, lambda: being_removed(self.store))
        taken = set().union(*each(self.store.pace, lambda look: look(), looks))  # at once, for training waits
        free = max((d.generation for d in taken if d.step == step), default=0) + 1
        self._opened.pop(StepDir(step, free), None)  # one of that name has been removed, and is to be another
        return free

    def add(self, made: Checkpoint) -> None:
        """Take note of a checkpoint, as of one just committed.

        Its tensors are most of it, and are those of the one before as a rule: held once, a run of any length fits.
        """
        if made.manifest.tensors == self._tensors:
            made.manifest = replace(made.manifest, tensors=self._tensors)
        self._tensors = made.manifest.tensors
        self._opened[made.directory] = made

    # -- attempts that a lost job left behind ------------------------------------------------------------------------

    def settle(self, *, quiet: float, limit: float) -> list[str]:
        """Wait for attempts newer than the newest commit whose files are still arriving; commit the complete ones.

        Returns at once where there are none; else when nobody writes and nothing has changed for `quiet` seconds (a
        writer process has up to two saves to finish, one after the other), after `limit` seconds at the latest.
        Returns notes.
        """
        notes: list[str] = []
        started = changed = time.monotonic()
        seen: Any = None
        awaited = False
        while True:
            pending = self._pending()
            notes += self.roll_forward(pending)
            arriving = self._arriving()
            awaited = awaited or bool(pending or arriving)
            now = time.monotonic()
            state = [self.store.list(str(directory)) for directory in self.unfinished()], arriving
            if state != seen:
                seen, changed = state, now
            if not awaited or (not arriving and now - changed >= quiet):
                return notes
            if now - started >= limit:
                return [
                    *notes,
                    *(f"{key}: still being written after {limit:.0f} s, and left behind" for key in arriving),
                ]
            time.sleep(min(0.1, quiet / 4))

    def _pending(self) -> list[Attempt]:
        """Attempts of which there are files in unfinished directories."""
        found = []
        for directory in self.unfinished():
            names = (attempt_of(entry.name) for entry in self.store.list(str(directory)))
            found += [found_attempt(self.store, directory, a) for a in sorted({n for n in names if n})]
        return found

    def unfinished(self) -> list[StepDir]:
        """Directories without a commit that are newer than the newest checkpoint that counts."""
        newest = next(self.valid(), None)
        newer = (d for d in self.directories() if not newest or d > newest.directory)
        return [d for d in newer if not is_committed(self.store, d)]

    def _arriving(self) -> list[str]:
        """Keys in unfinished directories that living processes are writing."""
        if not isinstance(self.store, LocalStore):
            return []
        return [f"{d}/{name}" for d in self.unfinished() for name in sorted(self.store.arriving(str(d)))]

    def roll_forward(self, attempts: list[Attempt] | None = None, *, apart: bool = False) -> list[str]:
        """Commit attempts that every rank has acked. apart: of which files may lie on other nodes. Returns notes."""
        return [
            f"{attempt.directory}: all ranks had acked; committed for the job that died"
            for attempt in (self._pending() if attempts is None else attempts)
            if self._roll_forward(attempt, apart=apart)
        ]

    def _has_all(self, attempt: Attempt, whole: Manifest, *, apart: bool) -> bool:
        here = {entry.name: entry.size for entry in self.store.list(str(attempt.directory))}
        own = whole.files[: whole.world_size]  # those of earlier checkpoints were committed before it began
        return all(here.get(f.name, f.size if apart else None) == f.size for f in own)

    def _roll_forward(self, attempt: Attempt, *, apart: bool) -> bool:
        """Commit an attempt whose every rank has acked, and whose files are all there."""
        if not attempt.world_size or not acked_ranks(self.store, attempt) >= set(range(attempt.world_size)):
            return False
        try:
            whole = complete(self.store, attempt)
            if not counts(attempt.directory, whole.launch, read_launches(self.store, self._launches)):
                return False  # of a superseded launch: committed, it would not count
            if not self._has_all(attempt, whole, apart=apart):
                return False
            commit(self.store, attempt, whole)
        except (KeyMissing, RunConflict):
            return False  # the job is alive after all, and was quicker
        except (Corrupt, FormatError):
            return False  # a damaged ack: what it acked cannot be trusted, and was never committed
        remove_acks(self.store, attempt)
        return True


_ONE_CHECKPOINT = "it is the directory of one checkpoint; give its parent, that of the run"
