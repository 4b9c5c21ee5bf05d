"""Loading the newest checkpoint that can be loaded, the same one on every rank. Collective.

Rank 0 looks and all follow. A damaged checkpoint makes every rank fall back to the same previous one; the report says
so.
"""

from __future__ import annotations

import json
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from distckpt.comm import exchange, together
from distckpt.errors import Corrupt, FormatError, NewerFormat, NotACheckpoint, StateWarning
from distckpt.format.layout import StepDir
from distckpt.loading.load import load
from distckpt.run.lease import being_removed, lease
from distckpt.saving.commit import is_committed
from distckpt.state import Stateful

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.errors import DistckptError
    from distckpt.loading.open import Checkpoint
    from distckpt.loading.plan import Options
    from distckpt.loading.report import LoadReport
    from distckpt.run.history import History

_STEP = 8  # bytes of a step in a message
_LOOKS = 10
"""Most looks for a checkpoint where there seems to be none."""


class Loadable(Stateful, Protocol):
    """A state that remembers whether a load has left it half-way."""

    unusable: str | None

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """Groups of the optimizer as they are saved, where there is one: they name what is saved by position."""
        ...


@dataclass(slots=True)
class Search:
    """Where a load looks: a run, at one step or (None) at any, and what it has passed over so far."""

    comm: Comm
    history: History
    step: int | None
    tried: set[StepDir] = field(default_factory=set)
    damaged: dict[int, str] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)
    """On rank 0: the lease on the checkpoint chosen."""
    unleased: str = ""
    """Why there is none."""

    def hold(self, directory: StepDir) -> bool:
        """Take a lease on it, so that it stays while every rank reads it. False: it is being removed."""
        store = self.history.store
        self.held.close()
        self.unleased = self.held.enter_context(lease(store, directory))
        return directory not in being_removed(store) and is_committed(store, directory)

    def passed_over(self, directory: StepDir, why: str) -> bool:
        """Note a damaged checkpoint. Whether it is news."""
        known = self.damaged.get(directory.step, "")
        if why in known:
            return False
        self.damaged[directory.step] = f"{known}; {why}" if known else why
        return True


def load_newest(
    search: Search, state: Loadable, options: Options, *, then: Callable[[StepDir], None] = lambda _: None
) -> tuple[LoadReport, Checkpoint] | None:
    """Load the newest checkpoint that counts and is whole; None where there is none at all.

    then: called once it is loaded, and while nobody removes it. What is damaged where nothing else is left;
    NotACheckpoint where there is none of the step asked for.
    """
    with search.held:
        loaded = _load_newest(search, state, options)
        if loaded:
            then(loaded[1].directory)
        return loaded


def _load_newest(search: Search, state: Loadable, options: Options) -> tuple[LoadReport, Checkpoint] | None:
    before = state.unusable
    damage: DistckptError | None = None
    while directory := choose(search):
        if damage:
            warnings.warn(f"falling back to {directory}: {damage}", StateWarning, stacklevel=3)
        search.tried.add(directory)
        try:
            opened = _open(search, directory)
            report = load(search.comm, opened, state, options, about_to_change=lambda: mark(state))
        except NewerFormat:
            raise
        except (Corrupt, FormatError, NotACheckpoint) as e:  # not one: removed since it was chosen
            search.passed_over(directory, str(e))
            damage = e
            continue
        state.unusable = None if loaded_whole(report, options) else before
        report.fell_back_from = search.damaged
        report.notes += filter(None, [search.unleased])
        return report, opened
    if damage:
        raise damage
    return None


def loaded_whole(report: LoadReport, options: Options) -> bool:
    """Whether a load left nothing as it was: a load of a part mends what it broke itself, and not what it found."""
    return not report.missing and not options.only


def mark(state: Loadable) -> None:
    """Mark a state as half-loaded, until a load succeeds."""
    state.unusable = "a load failed half-way"


def _open(search: Search, directory: StepDir) -> Checkpoint:
    opened: Checkpoint | None = None

    def attempt() -> None:
        nonlocal opened
        opened = search.history.open(directory)

    together(search.comm, f"opening {directory}", attempt)
    assert opened is not None
    return opened


def choose(search: Search) -> StepDir | None:
    """Step directory to load, the same on every rank: rank 0 looks, and tells what it passed over."""
    known = dict(search.damaged)

    def look() -> bytes:
        found = _held(search) if search.comm.rank == 0 else None
        chosen = found.step.to_bytes(_STEP, "little") + found.generation.to_bytes(4, "little") if found else b""
        return bytes([search.damaged != known]) + chosen

    said = together(search.comm, "choosing a checkpoint", look)[0]
    if said[0]:
        told = exchange(search.comm, "telling what is damaged", json.dumps(search.damaged).encode())[0]
        search.damaged.update({int(s): why for s, why in json.loads(told).items()})
    chosen = said[1:]
    return StepDir(*(int.from_bytes(n, "little") for n in (chosen[:_STEP], chosen[_STEP:]))) if chosen else None


def _held(search: Search) -> StepDir | None:
    """Newest that `look_for` finds and nobody removes, with a lease on it."""
    while found := look_for(search):
        if search.hold(found):
            return found
        if search.step is not None:
            steps = sorted({c.directory.step for c in search.history.valid()} - {search.step})
            raise NotACheckpoint(f"{search.history.store}: retention removes {found}; besides it has {steps}")
        search.tried.add(found)
        search.passed_over(found, "retention removes it")
    return None


def _look_through(search: Search) -> StepDir | None:
    for found in search.history.committed():
        if found.superseded or found.directory in search.tried:
            continue
        if search.step is not None and found.directory.step != search.step:
            continue
        if found.checkpoint:
            return found.directory
        if search.passed_over(found.directory, found.problem):
            warnings.warn(f"{found.directory} is damaged: {found.problem}", StateWarning, stacklevel=5)
    return None


def look_for(search: Search) -> StepDir | None:
    """Newest checkpoint that counts and has not been tried; damaged ones are noted, and warned of."""
    store = search.history.store
    there: list[StepDir] = []
    for _ in range(_LOOKS):
        if found := _look_through(search):
            return found
        if (now := search.history.directories()) == there:
            break
        there = now  # what was listed may have been removed, for something newer was saved: look again
    if search.step is not None and search.tried:
        return None
    if search.damaged:
        damage = "; ".join(f"step {s}: {why}" for s, why in sorted(search.damaged.items()))
        raise Corrupt(f"{store}: every checkpoint that could be loaded is damaged: {damage}")
    if search.step is not None:
        steps = sorted({c.directory.step for c in search.history.valid()})
        raise NotACheckpoint(
            f"{search.history.store} holds no committed checkpoint of step {search.step}; it has {steps}"
        )
    if left := search.history.superseded():
        warnings.warn(
            f"{store}: {', '.join(map(str, left[:5]))} will not be resumed: a later launch began from an "
            "earlier checkpoint, or from none, before they were committed (launches/ says which)",
            StateWarning,
            stacklevel=4,
        )
    return None
