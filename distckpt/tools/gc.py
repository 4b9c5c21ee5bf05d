"""`distckpt gc RUN`: files that no commit names, of saves and copies that were killed.

What may still commit is told, and stays: run/sweep.py has the rules. Whether a job trains on the run is told by its
heartbeat, which takes some seconds.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import KeyExists
from distckpt.run.heartbeat import living
from distckpt.run.sweep import leftovers, sweep
from distckpt.run.triggers import duration
from distckpt.store.local import LocalStore
from distckpt.store.open import located
from distckpt.tools.answer import Answer, run_at, table
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

_PATIENCE = 60.0


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="directory or URI of a run")
    add(
        "--idle",
        default="1 h",
        metavar="TIME",
        help="where no job lives: what nothing has changed in for so long (1 h)",
    )
    add(
        "--copies", default="1 day", metavar="TIME", help="interrupted copies to the run, untouched for so long (1 day)"
    )
    add("--delete", action="store_true", help="remove it; without it, it is only said")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    idle, age = duration(given.idle, "--idle"), duration(given.copies, "--copies")
    history = run_at(given.run_path)
    where = located(given.run_path)
    alive = living(history.store, _PATIENCE)
    found = leftovers(history, alive=bool(alive), idle=None if alive else idle)
    copies = list(_copies(where, age)) if isinstance(where, Path) else []  # to a URI, they lie in the run
    removed, problems = sweep(history, found) if given.delete else ([], [])
    if given.delete:
        problems += [problem for path, _ in copies for problem in _remove(path)]
    rows = [("remove" if left.over else "stays", left.key, size_text(left.nbytes), left.why) for left in found]
    rows += [("remove", str(path), size_text(nbytes), "a copy that was interrupted") for path, nbytes in copies]
    freed = sum(left.nbytes for left in (removed if given.delete else found) if left.over) + sum(n for _, n in copies)
    lines = [*(table(rows) if rows else []), *(f"problem: {problem}" for problem in problems)]
    if alive:
        lines.append(f"a job trains on this run (process {alive['pid']} on {alive['host']}): its own saves stay")
    lines.append(f"{'removed' if given.delete else 'would remove (with --delete)'} {size_text(freed)}")
    value: dict[str, Any] = {
        "alive": bool(alive),
        "found": [{"key": x.key, "bytes": x.nbytes, "over": x.over, "why": x.why} for x in found],
        "copies": [str(path) for path, _ in copies],
        "bytes": freed,
        "problems": problems,
    }
    return Answer(lines, value, code=int(bool(problems)))


def _copies(root: Path, age: float) -> Iterator[tuple[Path, int]]:
    """Staging directories of copies to this run that nothing has changed in for long, and their bytes."""
    name = re.compile(re.escape(f".{root.name}.") + r"[0-9a-f]+\.partial")
    for path in sorted(root.parent.iterdir()):
        if name.fullmatch(path.name) and path.is_dir():
            inside = [status for file in path.rglob("*") if (status := _status(file))]
            if time.time() - max((s.st_mtime for s in inside), default=path.stat().st_mtime) > age:
                yield path, sum(s.st_size for s in inside)


def _status(path: Path) -> Any:
    with contextlib.suppress(FileNotFoundError):
        return path.lstat()
    return None


def _remove(path: Path) -> list[str]:
    """Remove a staging directory, unless its copy has gone on meanwhile."""
    from distckpt.tools.transfer import Staging  # brings torch along

    try:
        with LocalStore(path / Staging.DONE).locked(Staging.LOCK):
            shutil.rmtree(path)
    except KeyExists:
        return [f"{path}: the copy goes on"]
    except OSError as e:
        return [f"{path}: {e.strerror or e}"]
    return []
