"""What the path of a direct save means: a run's directory, or one step of a run; and how much of its past is kept.

A path whose last component is a step directory's name (`step-00001000`) is that step of the run above it. Any other is
a run of its own, whose checkpoint is step 0. Saved again, a path gets the next generation of its step: the one before
stays whole until the new one is committed, and one more is kept.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.errors import RunConflict, Unsupported
from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.keep import NEWEST, Keep
from distckpt.run.launches import launch_numbers
from distckpt.run.publish import POINTERS, Retention, Then, target_of
from distckpt.store.open import located, open_store, parted

if TYPE_CHECKING:
    from distckpt.store.base import Store


@dataclass(frozen=True, slots=True)
class Place:
    """A run, and the step of it that the path names (None: the path is the run's own)."""

    history: History
    step: int | None

    @property
    def store(self) -> Store:
        """Where the run lies."""
        return self.history.store

    def generation_to_save(self) -> int:
        """Generation that a save here makes. RunConflict where the path is that of a run with other steps.

        Loaded from the run's path, its newest step would come back, not what was saved.
        """
        self.history.refuse_checkpoint()
        if self.step is None and (others := [d for d in self.history.directories() if d.step]):
            raise RunConflict(
                f"{self.store} is the directory of a run with steps of its own, such as {others[0]}: give the path "
                f"of one step ({self.store}/{StepDir(others[0].step + 1)}), or another directory"
            )
        return self.history.next_generation(self.step or 0)

    def launch(self) -> int:
        """Number of the newest launch of the run, 0 where there is none: what saves here counts as its own."""
        return max(launch_numbers(self.store), default=0)

    def then(self, named_by: tuple[str, str] | None = None) -> Then:
        """What follows a commit: what is kept of the step when it is saved again. named_by: see Then."""
        return Then(Retention(Keep(last=NEWEST), self.step or 0), named_by=named_by, noted=False)


def place(path: str | os.PathLike[str] | Store) -> Place:
    """Place that a path (or a run's store) means. Unsupported for a path that names a generation.

    What leads to a step directory, such as `last`, means that step.
    """
    if not isinstance(path, (str, os.PathLike)):
        if not hasattr(path, "list"):
            raise Unsupported(f"a {type(path).__qualname__} is no path: the path comes first, then the state dict")
        return Place(History(path), None)
    whole = followed(path)
    run, name = parted(whole)
    named = StepDir.parse(name)
    if named is None:
        return Place(History(open_store(whole)), None)
    if named.generation > 1 and name == parted(path)[1]:
        raise Unsupported(
            f"{whole} names one generation of a step: give {StepDir(named.step)}; it means the newest that is whole"
        )
    return Place(History(open_store(run)), named.step)


def followed(path: str | os.PathLike[str]) -> str | Path:
    """What a path or URI means: of a symlink what it leads to, of a URI's `last` or `best` the step that it names."""
    whole = located(path)
    if isinstance(whole, Path):
        # resolve() raises where links lead in a circle
        return Path(os.path.realpath(whole)) if whole.is_symlink() else whole
    run, name = parted(whole)
    target = target_of(open_store(run), name) if name in POINTERS else None
    return f"{run}/{target}" if target and StepDir.parse(target) else whole
