"""After a commit: events, pointers, registry; then what is not kept goes. Done by rank 0's writer; imports no torch.

Pointers switch before anything is removed, and only to what stays: so none leads to what is not committed, wherever
the process ends in between. All of it is a hint or a clean-up: failing at it is warned of, and unmakes no checkpoint.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from distckpt.errors import DistckptError, FormatError, KeyMissing, StateWarning
from distckpt.format.layout import REGISTRY, epoch_link, is_epoch_link, pointer_file
from distckpt.format.text import read_json
from distckpt.run.after import After, start
from distckpt.run.events import note
from distckpt.run.keep import Keep
from distckpt.run.launches import launch_numbers
from distckpt.run.retention import decided, is_number, listed, newest, remove_all
from distckpt.run.sweep import leftovers, sweep
from distckpt.saving.commit import is_committed
from distckpt.store.base import each, read_all, write_all
from distckpt.store.local import LocalStore
from distckpt.store.open import open_store, parted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from distckpt.format.layout import StepDir
    from distckpt.loading.open import Checkpoint
    from distckpt.run.history import History
    from distckpt.run.keep import Decision
    from distckpt.run.retention import Listed
    from distckpt.store.base import Store

_MOST_BYTES = 1 << 28
POINTERS = ("last", "best")


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules of a run; or of one step alone, whose older generations may go."""

    keep: Keep
    step: int | None = None
    lasting: bool = True
    """Whether these are the run's own rules, by which `best` and the epochs are named."""


@dataclass(frozen=True, slots=True)
class Then:
    """What follows a commit besides `last` and the registry. Whoever commits does it, and is told of it in JSON.

    apart: nobody sees the acks of all ranks, so it is for run/replicate.py to commit. after: see run/after.py.
    named_by: a file, and what it is to say: DeepSpeed's `latest`. noted: whether the run keeps events.
    """

    retention: Retention | None = None
    after: tuple[After, ...] = ()
    named_by: tuple[str, str] | None = None
    noted: bool = True
    apart: bool = False

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
        kept = self.retention
        return {
            "keep": [kept.keep.to_json(), kept.step, kept.lasting] if kept else None,
            "after": [after.to_json() for after in self.after],
            "named_by": self.named_by,
            "noted": self.noted,
            "apart": self.apart,
        }

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Then:
        """What to_json described."""
        rules, *rest = said["keep"] or [None]
        named = said["named_by"]
        return Then(
            Retention(Keep.from_json(rules), *rest) if rules is not None else None,
            tuple(After.from_json(after) for after in said["after"]),
            (named[0], named[1]) if named else None,
            said["noted"],
            said["apart"],
        )


def publish(history: History, checkpoint: Checkpoint, then: Then, seconds: float | None = None) -> None:
    """Make a checkpoint known that was just committed, and do what follows. Failing at any of it is warned of.

    But not at `named_by`, by which the checkpoint is found: StoreError. seconds: that the save took.
    """
    for problem in published(history, checkpoint, then, seconds):
        warnings.warn(problem, StateWarning, stacklevel=4)


def published(history: History, checkpoint: Checkpoint, then: Then, seconds: float | None = None) -> list[str]:
    """Do what `publish` does, and return what has failed."""
    history.add(checkpoint)
    if then.named_by:
        folder, name = parted(then.named_by[0])
        write_all(open_store(folder), name, then.named_by[1].encode())
    problems: list[str] = []
    try:
        if then.noted:
            _note(history.store, checkpoint, seconds)
        if then.retention:
            problems = retain(history, then.retention, noted=then.noted)[1]
        else:
            make_known(history, None)
    except DistckptError as e:
        problems = [f"last.json or meta.json could not be written: {e}"]
    if then.after and isinstance(history.store, LocalStore):
        try:
            start(history.store.root, checkpoint.directory, then.after)
        except OSError as e:
            problems.append(f"what is to run after it cannot be started: {e}")
    return [f"{checkpoint.directory} is committed, but {problem}" for problem in problems]


def _note(store: Store, checkpoint: Checkpoint, seconds: float | None) -> None:
    content = checkpoint.manifest
    note(
        store,
        "committed",
        launch=content.launch,
        step=content.step,
        directory=str(checkpoint.directory),
        bytes=content.own_bytes,
        seconds=None if seconds is None else round(seconds, 3),
        metrics=_plain(content.metrics),
    )


def retain(history: History, retention: Retention, *, noted: bool = True) -> tuple[list[StepDir], list[str]]:
    """Make what stays known, then remove the rest. Returns what was removed, and what was in the way of the others."""
    launches = launch_numbers(history.store)
    checkpoints, decision = make_known(history, retention)
    assert decision is not None
    removed, problems = remove_all(history, decision.goes, launches)
    try:
        if removed:
            if noted:
                note(history.store, "removed", checkpoints=[str(directory) for directory in removed])
            if {str(directory) for directory in removed} & set(pointing(history.store).values()):
                make_known(history, retention)  # somebody slower has pointed there since
            else:
                left = [c for c in checkpoints if c.directory not in removed]
                write_registry(history.store, left, decision, retention)
        if retention.step is not None:
            problems += _sweep_older(history, retention.step, min(decision.stays))
    except DistckptError as e:
        problems.append(str(e))
    return removed, [f"what is not kept could not be removed: {problem}" for problem in problems]


def _sweep_older(history: History, step: int, oldest: StepDir) -> list[str]:
    """Remove what saves of a step that never committed have left in generations older than all that stay."""

    def older(directory: StepDir) -> bool:
        return directory.step == step and directory < oldest

    if not any(map(older, history.directories())):
        return []
    return sweep(history, leftovers(history, alone=True, among=older))[1]


def make_known(history: History, retention: Retention | None) -> tuple[list[Listed], Decision | None]:
    """Write pointers and registry anew from the commits. Returns what there is, and what is to become of it."""
    checkpoints = listed(history)
    decision = decided(history, checkpoints, retention.keep, retention.step) if retention else None
    whole = decision if retention and retention.step is None and retention.lasting else None
    wanted: dict[str, StepDir | None] = {"last": newest(checkpoints)}
    if whole:
        wanted |= {"best": whole.best, **{epoch_link(epoch): d for epoch, d in whole.epochs.items()}}
    here = {str(c.directory) for c in checkpoints} - {str(d) for d in (decision.goes if decision else ())}
    pointers, hints = _pointers(history.store), _hints(history.store)
    for name, target in (hints | pointers).items():
        if name not in wanted and (target not in here or (whole and is_epoch_link(name))):
            wanted[name] = None
    pointed = [d for name, d in wanted.items() if _point(history.store, name, d, pointers.get(name)) and d]
    if not all(is_committed(history.store, directory) for directory in set(pointed)):
        return make_known(history, retention)  # removed since it was looked up: by a later launch, for we were slow
    write_registry(history.store, checkpoints, decision, retention)
    return checkpoints, decision


def now() -> str:
    """Time of day, as manifests and launch records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# -- pointers --------------------------------------------------------------------------------------------------------


def pointing(store: Store) -> dict[str, str]:
    """Pointers and symlinks that there are, and the names that they point at."""
    return _hints(store) | _pointers(store)


def _pointers(store: Store) -> dict[str, str]:
    targets = each(store.pace, lambda name: target_of(store, name), POINTERS)
    return {name: target for name, target in zip(POINTERS, targets, strict=True) if target is not None}


def _hints(store: Store) -> dict[str, str]:
    if not isinstance(store, LocalStore):
        return {}
    return {name: t for name, t in store.hints().items() if name in POINTERS or is_epoch_link(name)}


def target_of(store: Store, name: str) -> str | None:
    """Name that a pointer holds, "" where it cannot be read; None where there is no pointer."""
    try:
        said = read_json(read_all(store, pointer_file(name), limit=_MOST_BYTES))
    except KeyMissing:
        return None
    except FormatError:
        return ""
    return str(said.get("checkpoint", "")) if isinstance(said, dict) else ""


def _point(store: Store, name: str, directory: StepDir | None, before: str | None) -> bool:
    """Point a name at a checkpoint, or (None) at nothing; where it points there already, nothing is written.

    before: what the pointer holds. Whether it was another.
    """
    moved = name in POINTERS and before != (str(directory) if directory else None)
    if moved:
        if directory:
            write_all(store, pointer_file(name), _json({"checkpoint": str(directory), "step": directory.step}))
        else:
            store.delete(pointer_file(name))
    if isinstance(store, LocalStore):
        if directory is None:
            store.unlink_hint(name)
        elif store.hint(name) != str(directory):
            store.link_hint(name, str(directory))
    return moved


# -- registry --------------------------------------------------------------------------------------------------------


def write_registry(
    store: Store, checkpoints: Collection[Listed], decision: Decision | None, retention: Retention | None
) -> None:
    """Write meta.json: what there is, and why it is kept; and the rules, for whoever looks after the run later."""
    content: dict[str, Any] = {"checkpoints": [_entry(c, decision) for c in checkpoints]}
    own = retention and retention.step is None and retention.lasting
    rules = retention.keep.to_json() if retention and own else recorded_rules(store)
    if rules is not None:
        content["keep"] = rules
    write_all(store, REGISTRY, _json(content))


def recorded_rules(store: Store) -> dict[str, Any] | None:
    """Rules that the run was last kept by, as meta.json has them."""
    try:
        said = read_json(read_all(store, REGISTRY, limit=_MOST_BYTES))
    except (KeyMissing, FormatError):
        return None
    rules = said.get("keep") if isinstance(said, dict) else None
    return rules if isinstance(rules, dict) else None


def _entry(listed: Listed, decision: Decision | None) -> dict[str, Any]:
    found, candidate = listed.found, listed.candidate
    why = {"kept": list(decision.stays[found.directory])} if decision and found.directory in decision.stays else {}
    if not found.checkpoint:
        return {"path": str(found.directory), "status": "corrupt", "problem": found.problem, **why}
    content = found.checkpoint.manifest
    return {
        "path": str(found.directory),
        "step": content.step,
        **({"epoch": candidate.epoch} if candidate.epoch is not None else {}),
        "date": content.date,
        "launch": content.launch,
        "world_size": content.world_size,
        "bytes": content.own_bytes,
        "metrics": _plain(content.metrics),
        "status": "superseded" if found.superseded else "committed",
        **why,
    }


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as strict JSON has them: what is not finite as text."""
    return {k: v if is_number(v) or isinstance(v, bool) else str(v) for k, v in metrics.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
