"""Retention: what the rules of run/keep.py are told of a run, and how what they let go of is removed.

The commit is deleted first, the data after: what is left half-way is no checkpoint. Only committed directories are
touched: a save in flight has no commit yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, NotACheckpoint
from distckpt.format.layout import ACK, COMMIT
from distckpt.format.manifest import owners
from distckpt.loading.open import open_checkpoint
from distckpt.run.keep import Candidate, decide
from distckpt.run.launches import launch_numbers
from distckpt.run.lease import leased, removing
from distckpt.saving.commit import is_committed
from distckpt.store.base import each
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Collection

    from distckpt.format.layout import StepDir
    from distckpt.loading.open import Checkpoint
    from distckpt.run.history import Found, History
    from distckpt.run.keep import Decision, Keep
    from distckpt.store.base import Store


_COUNT_EPOCHS = ("trainer_state", "sampler_state")
"""Objects of a TrainState that may have an `epoch`."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A committed checkpoint, and what rules ask of it."""

    found: Found
    candidate: Candidate

    @property
    def directory(self) -> StepDir:
        """Its directory."""
        return self.found.directory


def listed(history: History) -> list[Listed]:
    """Every committed checkpoint of a run, newest first."""
    return [Listed(found, _candidate(found, history.epochs)) for found in history.committed()]


def newest(checkpoints: list[Listed]) -> StepDir | None:
    """Newest checkpoint that counts."""
    return next((c.directory for c in checkpoints if c.candidate.state == "committed"), None)


def _candidate(found: Found, epochs: dict[str, int | None]) -> Candidate:
    if not found.checkpoint:
        return Candidate(found.directory, state="damaged", problem=found.problem)
    content = found.checkpoint.manifest
    if content.attempt not in epochs:
        epochs[content.attempt] = _epoch(found.checkpoint)
    own = content.own_bytes + sum(o.size for o in content.objects.values())
    return Candidate(
        found.directory,
        nbytes=own,
        date=content.date,
        epoch=epochs[content.attempt],
        metrics={k: v for k, v in content.metrics.items() if is_number(v)},
        asked=content.keep,
        refers_to=owners(content) - {found.directory},
        state="superseded" if found.superseded else "committed",
    )


def is_number(value: object) -> bool:
    """Whether a metric's value is a number that others can be compared with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value - value == 0


def _epoch(checkpoint: Checkpoint) -> int | None:
    """Epoch that the metrics name, else the furthest of the training program's Progress and sampler; None: neither."""
    said = checkpoint.manifest.metrics.get("epoch")
    if said is None:
        return max(filter(_is_count, (_counted(checkpoint, name) for name in _COUNT_EPOCHS)), default=None)
    said = int(said) if isinstance(said, float) and said.is_integer() else said
    return said if _is_count(said) else None


def _counted(checkpoint: Checkpoint, name: str) -> Any:
    if name not in checkpoint.manifest.objects:
        return None
    try:
        state = checkpoint.object(name)
    except Corrupt:
        return None  # a load says so; here it is only not known
    return state.get("epoch") if isinstance(state, dict) else None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def decided(history: History, checkpoints: list[Listed], keep: Keep, step: int | None = None) -> Decision:
    """What is to stay, and what goes. step: generations of this step alone may go, and are all that rules count."""
    held = dict.fromkeys(leased(history.store), "a reader has a lease on it")
    asked = [c.candidate for c in checkpoints if step in {None, c.directory.step}]
    for other in checkpoints:
        if step not in {None, other.directory.step}:
            held |= dict.fromkeys(other.candidate.refers_to, f"{other.directory} refers to its files")
    return decide(keep, asked, held)


def remove_all(
    history: History, goes: Collection[StepDir], launches: Collection[int]
) -> tuple[list[StepDir], list[str]]:
    """Remove checkpoints, newest first, for those refer to files of older ones. Returns those removed, and problems.

    launches: those there were before it was decided what goes. Stops where another has begun since: what counts may be
    another then. It is looked for once it is said what is being removed, so that no launch begins with that. What
    another has removed stays as it is, for its name may be that of a new one. One that has been leased since stays, and
    what it refers to.
    """
    store = history.store
    removed: list[StepDir] = []
    needed: set[StepDir] = set()
    try:
        for directory in sorted(goes, reverse=True):
            refers_to = owners(history.open(directory).manifest)
            with removing(store, directory):
                if launch_numbers(store) != launches:
                    return sorted(removed), ["a later launch has begun; what goes is for it to decide"]
                if not _is_still_there(history, directory):
                    continue
                if directory not in needed | leased(store) and remove(store, directory):
                    removed.append(directory)
                else:
                    needed |= refers_to
    except DistckptError as e:
        return sorted(removed), [str(e)]
    return sorted(removed), []


def _is_still_there(history: History, directory: StepDir) -> bool:
    """Whether a directory's commit is the one that was decided about."""
    try:
        return open_checkpoint(history.store, directory).manifest.attempt == history.open(directory).manifest.attempt
    except NotACheckpoint:
        return False


def remove(store: Store, directory: StepDir) -> bool:
    """Remove a step directory, its commit first. Whether all of it is gone: not where a reader was quicker."""
    if is_committed(store, directory):
        store.delete(f"{directory}/{COMMIT}")
    if directory in leased(store):
        return False  # it may have opened the commit; the rest is for gc
    names = [entry.name for entry in store.list(str(directory)) if entry.size is not None]
    for acks in (True, False):  # acks first: nobody finds an attempt complete
        some = [name for name in names if name.startswith(ACK) == acks]
        each(store.pace, lambda name: store.delete(f"{directory}/{name}"), some)
    if isinstance(store, LocalStore):
        for name, _, _ in store.unfinished(str(directory)):
            store.discard(str(directory), name)
    return True
