"""After a commit: pointers, registry, and then what is not kept goes. Done by rank 0's writer; imports no torch.

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
from distckpt.run.retention import decided, is_number, listed, newest, remove_all
from distckpt.run.sweep import leftovers, sweep
from distckpt.store.base import read_all, write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Collection

    from distckpt.format.layout import StepDir
    from distckpt.loading.open import Checkpoint
    from distckpt.run.history import History
    from distckpt.run.keep import Decision, Keep
    from distckpt.run.retention import Listed
    from distckpt.store.base import Store

_MOST_BYTES = 1 << 28
_POINTERS = ("last", "best")


@dataclass(frozen=True, slots=True)
class Retention:
    """Rules of a run; or of one step alone, whose older generations may go."""

    keep: Keep
    step: int | None = None
    lasting: bool = True
    """Whether these are the run's own rules, by which `best` and the epochs are named."""


def publish(history: History, checkpoint: Checkpoint, retention: Retention | None = None) -> list[StepDir]:
    """Point at a checkpoint just committed, enter it in the registry, and remove what is not kept: those are returned.

    Failing at any of it is warned of.
    """
    history.add(checkpoint)
    removed: list[StepDir] = []
    try:
        if retention:
            removed, problems = retain(history, retention)
        else:
            make_known(history, None)
            problems = []
    except DistckptError as e:
        problems = [f"last.json or meta.json could not be written: {e}"]
    for problem in problems:
        warnings.warn(f"{checkpoint.directory} is committed, but {problem}", StateWarning, stacklevel=4)
    return removed


def retain(history: History, retention: Retention) -> tuple[list[StepDir], list[str]]:
    """Make what stays known, then remove the rest. Returns what was removed, and what was in the way of the others."""
    checkpoints, decision = make_known(history, retention)
    assert decision is not None
    removed, problems = remove_all(history, decision.goes)
    try:
        if removed:
            write_registry(history.store, [c for c in checkpoints if c.directory not in removed], decision, retention)
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
    for name, target in pointing(history.store).items():
        if name not in wanted and (target not in here or (whole and is_epoch_link(name))):
            _point(history.store, name, None)
    for name, directory in wanted.items():
        _point(history.store, name, directory)
    write_registry(history.store, checkpoints, decision, retention)
    return checkpoints, decision


def now() -> str:
    """Time of day, as manifests and launch records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# -- pointers --------------------------------------------------------------------------------------------------------


def pointing(store: Store) -> dict[str, str]:
    """Pointers and symlinks that there are, and the names that they point at."""
    found = {name: target for name in _POINTERS if (target := _target(store, name)) is not None}
    if isinstance(store, LocalStore):
        ours = {name: t for name, t in store.hints().items() if name in _POINTERS or is_epoch_link(name)}
        found = {**ours, **found}
    return found


def _target(store: Store, name: str) -> str | None:
    """Name that a pointer holds, "" where it cannot be read; None where there is no pointer."""
    try:
        said = read_json(read_all(store, pointer_file(name), limit=_MOST_BYTES))
    except KeyMissing:
        return None
    except FormatError:
        return ""
    return str(said.get("checkpoint", "")) if isinstance(said, dict) else ""


def _point(store: Store, name: str, directory: StepDir | None) -> None:
    """Point a name at a checkpoint, or (None) at nothing; where it points there already, nothing is written."""
    if name in _POINTERS and _target(store, name) != (str(directory) if directory else None):
        if directory:
            write_all(store, pointer_file(name), _json({"checkpoint": str(directory), "step": directory.step}))
        else:
            store.delete(pointer_file(name))
    if isinstance(store, LocalStore):
        if directory is None:
            store.unlink_hint(name)
        elif store.hint(name) != str(directory):
            store.link_hint(name, str(directory))


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
        "bytes": sum(f.size for f in content.files),
        "metrics": {k: v if is_number(v) or isinstance(v, bool) else str(v) for k, v in content.metrics.items()},
        "status": "superseded" if found.superseded else "committed",
        **why,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
