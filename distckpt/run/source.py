"""Loading from somewhere else: another run, one of its step directories, or what another tool saved. Collective.

Rank 0 says what the path holds, and all follow. Of another tool's files only model and optimizers are certain: other
values of the state that they lack, or that they have besides, are told, and are no errors.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from distckpt.comm import together
from distckpt.errors import Mismatch, NotACheckpoint, StateWarning
from distckpt.foreign.deepspeed import LATEST, tag_of
from distckpt.foreign.open import KINDS, holds_foreign, open_foreign
from distckpt.format.layout import StepDir
from distckpt.format.objects import decode
from distckpt.loading.load import load
from distckpt.loading.open import Checkpoint, open_checkpoint
from distckpt.run.choose import Search, load_newest, loaded_whole, mark
from distckpt.run.history import History
from distckpt.run.place import followed
from distckpt.saving.commit import is_committed
from distckpt.saving.objects import encoded, share
from distckpt.signing import refuse_unsigned
from distckpt.state import JoinedObject, State
from distckpt.store.local import LocalStore
from distckpt.store.open import is_uri, located, open_store, parted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from distckpt.comm import Comm
    from distckpt.loading.plan import Options
    from distckpt.loading.report import LoadReport
    from distckpt.run.choose import Loadable
    from distckpt.store.base import Store

Where = Union[str, "Path"]
"""A URI, or a path."""

_RUN, _STEP, _FOREIGN = b"run", b"step", b"foreign"


def load_source(
    comm: Comm,
    source: str | os.PathLike[str],
    state: Loadable,
    options: Options,
    *,
    step: int | None = None,
    names: Mapping[str, str] | None = None,
    like: Mapping[Any, Any] | None = None,
) -> LoadReport:
    """Load what lies at `source` into the state, and leave the source alone.

    step: of a run. names: of another tool's state dict, entry -> lead (`{"ema.model": "model"}`), where they are not
    the usual ones. like: the state dict that the state is, whose entries another tool's are called like: what
    that asks for must all be there. NotACheckpoint where nothing is there that can be read.
    """
    path = _followed(source)
    kind = together(comm, f"looking at {path}", lambda: _kind(path) if comm.rank == 0 else b"")[0]
    if names and kind != _FOREIGN:
        raise Mismatch(f"names={dict(names)!r}: {path} is distckpt's own; rename= is what changes names there")
    if kind == _RUN:
        loaded = load_newest(Search(comm, History(open_store(path)), step), state, options)
        if loaded is None:
            raise NotACheckpoint(f"{path} holds no committed checkpoint: {History(open_store(path)).why_nothing()}")
        return loaded[0]
    if step is not None:
        raise NotACheckpoint(f"step={step}: {path} is no run of several steps")
    order = _order(comm, state) if kind == _FOREIGN else None
    opened = _opened_by_all(comm, path, lambda: _opened(path, kind, names, order, like))
    return _load(comm, opened, state, replace(options, foreign=kind == _FOREIGN, complete=like is not None), path)


def load_foreign(comm: Comm, path: Path, state: Loadable, options: Options, *, rest: str) -> LoadReport:
    """Load what another tool saved at `path`, whatever else is there. Collective.

    rest: lead of its values that are of no part of the training state.
    """
    order = _order(comm, state)
    opened = _opened_by_all(comm, path, lambda: _opened(path, _FOREIGN, None, order, rest=rest))
    return _load(comm, opened, state, replace(options, foreign=True), path)


def _order(comm: Comm, state: Loadable) -> list[list[str]] | None:
    """Names by group of the parameters that any rank's optimizer has: a stage of a pipeline has some. Collective."""
    found: list[dict[str, Any]] | None = None
    mine: dict[str, bytes] = {}

    def attempt() -> None:
        nonlocal found, mine
        found = state.parameter_groups()
        mine = encoded(_named(found))

    together(comm, "naming parameters", attempt)
    whole = share(comm, _named(found), mine, {}, []) if comm.world_size > 1 else {}
    found = decode(whole["optim"])["groups"] if "optim" in whole else found
    return None if found is None else [group["params"] for group in found]


def _named(groups: list[dict[str, Any]] | None) -> State:
    return State(objects={"optim": JoinedObject({"groups": groups}, joins="params")})


def _opened_by_all(comm: Comm, path: Where, attempt: Callable[[], Checkpoint]) -> Checkpoint:
    """What each rank opens, once all have."""
    found: list[Checkpoint] = []
    together(comm, f"opening {path}", lambda: found.append(attempt()))
    return found[0]


def open_source(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    names: Mapping[str, str] | None = None,
    order: Sequence[Sequence[str]] | None = None,
    ours: bool = False,
) -> Checkpoint:
    """Open what lies at `source`, by one process: of a run the newest checkpoint that counts, or that of `step`.

    order: see `open_foreign`. ours: it is what this program has just written, so that nobody need have signed it.
    """
    path = _followed(source)
    kind = _kind(path)
    if names and kind != _FOREIGN:
        raise Mismatch(f"names={dict(names)!r}: {path} is distckpt's own, whose parts have their names")
    if kind != _RUN:
        opened = _opened(path, kind, names, order, ours=ours)
        if kind == _STEP and step not in {None, opened.manifest.step}:
            raise NotACheckpoint(f"{path}: is not step {step}; give the run's directory with --step")
        return opened
    history = History(open_store(path))
    found = next((c for c in history.valid() if step in {None, c.directory.step}), None)
    if found is None:
        raise NotACheckpoint(f"{path} holds no such checkpoint: {history.why_nothing()}")
    return found


def foreign_root(comm: Comm, store: Store) -> Path | None:
    """Directory of the store if another tool saved there, too: what a run begins from that has no checkpoint yet."""
    root = store.root if isinstance(store, LocalStore) else None
    found = together(comm, "looking for another tool's checkpoint", lambda: _is_foreign(root) if not comm.rank else b"")
    return root if found[0] else None


def _is_foreign(root: Path | None) -> bytes:
    return _FOREIGN if root and not History(LocalStore(root)).is_checkpoint() and holds_foreign(root) else b""


def _followed(source: str | os.PathLike[str]) -> Where:
    """Path or URI of a source.

    Of what leads to a step directory, such as `last`, that directory's; of a directory whose `latest` names a tag that
    `distckpt.adapters.deepspeed` saved, the tag's.
    """
    where = located(source)
    if not isinstance(where, Path):
        return followed(where)
    path = where if is_uri(source) else Path(source)
    if (path / LATEST[0]).is_file() and History(LocalStore(tag := tag_of(path))).directories():
        return tag
    real = Path(os.path.realpath(path))  # resolve() raises where links lead in a circle
    return real if path.is_symlink() and StepDir.parse(real.name) else path


def _kind(path: Where) -> bytes:
    """What a path or URI holds. Asked on rank 0."""
    run, name = parted(path)
    if (directory := StepDir.parse(name)) and is_committed(open_store(run), directory):
        return _STEP
    if isinstance(path, Path) and not path.exists():
        raise NotACheckpoint(f"{path}: does not exist")
    if not (isinstance(path, Path) and path.is_file()) and History(open_store(path)).directories():
        return _RUN
    if not isinstance(path, Path):
        raise NotACheckpoint(f"{path}: neither a run of distckpt nor one of its steps; of others, bring the files here")
    if holds_foreign(path):
        return _FOREIGN
    raise NotACheckpoint(f"{path}: neither a run of distckpt nor one of its steps, nor {KINDS}")


def _opened(  # noqa: PLR0917
    path: Where,
    kind: bytes,
    names: Mapping[str, str] | None,
    order: Sequence[Sequence[str]] | None,
    like: Mapping[Any, Any] | None = None,
    rest: str | None = None,
    *,
    ours: bool = False,
) -> Checkpoint:
    if kind == _STEP:
        run, name = parted(path)
        directory = StepDir.parse(name)
        assert directory is not None
        return open_checkpoint(open_store(run), directory)
    assert isinstance(path, Path)
    if not ours:
        refuse_unsigned(str(path))
    found = open_foreign(path, names, order, like, rest=rest)
    if found is None:
        raise NotACheckpoint(f"{path}: nothing is there that this rank can see; every rank must see the same files")
    return found


def _load(comm: Comm, checkpoint: Checkpoint, state: Loadable, options: Options, path: Where) -> LoadReport:
    before = state.unusable
    try:
        report = load(comm, checkpoint, state, options, about_to_change=lambda: mark(state))
    except Mismatch as e:
        if not options.foreign or options.complete:
            raise
        notes = "".join(f"\n{note}" for note in checkpoint.notes)
        raise Mismatch(
            f"{e}{notes}\n{path} is another tool's: only=('model',) loads its model alone, names={{'ENTRY': 'model'}} "
            "says which of its entries is what, rename= changes the names of tensors"
        ) from e
    state.unusable = None if loaded_whole(report, options) else before
    for note in checkpoint.notes:
        warnings.warn(note, StateWarning, stacklevel=4)
    if options.foreign and (report.missing or report.unexpected):
        lacking = f"; it has no {_some(report.missing)}, which stay as they were" if report.missing else ""
        beside = f"; nothing takes its {_some(report.unexpected)}" if report.unexpected else ""
        warnings.warn(f"loaded from {path}, which another tool saved{lacking}{beside}", StateWarning, stacklevel=4)
    return report


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
