"""`distckpt cp SOURCE RUN`: checkpoints from one directory or object store to another, verified from end to end.

What comes out is the same checkpoint: step, metrics, objects, values of ranks. What is there already is left alone, so
the same command goes on after an interruption, and `--all` again brings what is new.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint, RunConflict
from distckpt.run.history import History
from distckpt.store.open import open_store
from distckpt.tools.answer import Answer, checkpoint_at, run_at
from distckpt.tools.copying import OF_ALL, copied, is_alone, is_first, lines_of, offer

if TYPE_CHECKING:
    import argparse

    from distckpt.format.manifest import FileInfo, Manifest
    from distckpt.loading.open import Checkpoint


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run (its newest checkpoint), a step, `best`, ...: a path or URI")
    add("destination", metavar="RUN", help="directory or URI of the run that it becomes a step of")
    add("--step", type=int, help="step of the run")
    add("--all", action="store_true", help="every checkpoint of the run that counts, oldest first")
    add("--quick", dest="verify", action="store_false", help="do not read the copy back")
    offer(parser, *OF_ALL)


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    from distckpt.tools.copy import Source
    from distckpt.tools.formats import Distckpt
    from distckpt.tools.view import Change

    lines: list[str] = []
    value: dict[str, list[Any]] = {"copied": [], "there": []}
    history = History(open_store(given.destination))
    for checkpoint in _wanted(given):
        step = checkpoint.directory.step
        if _is_there(checkpoint, history):
            value["there"].append(step)
            lines.append(f"step {step}: is there already")
            continue
        to = Distckpt(_files_before(step, history) if is_alone() and _names_others(checkpoint) else ())
        report = copied(given, Source(given.source, step), given.destination, to, Change())
        value["copied"].append(asdict(report))
        lines += lines_of(report, dry_run=given.dry_run)
    return Answer(lines, value) if is_first() else Answer((), None)


def _wanted(given: argparse.Namespace) -> list[Checkpoint]:
    """Checkpoints to copy, oldest first."""
    if not given.all:
        return [checkpoint_at(given.source, given.step)[1]]
    if given.step is not None:
        raise ValueError("--all and --step: one of them")
    history = run_at(given.source)
    found = {c.directory.step: c for c in reversed([*history.valid()])}  # of several generations the last
    if not found:
        raise NotACheckpoint(f"{given.source}: holds no checkpoint that counts: {history.why_nothing()}")
    return [*found.values()]


def _is_there(checkpoint: Checkpoint, history: History) -> bool:
    """Whether the destination has this very checkpoint. RunConflict if it has another of the same step."""
    step = checkpoint.directory.step
    for found in history.committed():
        if found.directory.step == step and found.checkpoint:
            if _told(found.checkpoint.manifest) == _told(checkpoint.manifest):
                return True
            raise RunConflict(f"{history.store}: holds another checkpoint of step {step}: copy into a new directory")
    return False


def _names_others(checkpoint: Checkpoint) -> bool:
    """Whether files of earlier checkpoints are a part of this one: frozen weights."""
    return any("/" in file.name for file in checkpoint.manifest.files)


def _files_before(step: int, history: History) -> tuple[FileInfo, ...]:
    """Files of a run's earlier checkpoints, by their names in the run."""
    earlier = (c for c in history.valid() if c.directory.step < step)
    files = ((c.directory, file) for c in earlier for file in c.manifest.files)
    return tuple(f if "/" in f.name else f._replace(name=f"{directory}/{f.name}") for directory, f in files)


def _told(content: Manifest) -> tuple[object, ...]:
    """What two checkpoints have in common of which one is a copy of the other."""
    tensors = {name: (info.shape, info.dtype) for name, info in content.tensors.items()}
    metrics = repr(sorted(content.metrics.items()))  # of which some may be NaN, equal to nothing
    return content.step, content.date, content.world_size, metrics, tensors, sorted(content.objects)
