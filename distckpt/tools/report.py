"""`distckpt report RUN -o report.html`: one page about a run, in one file that needs nothing else, to look at or send.

Saves over time, metrics, which checkpoints are good, what is kept and why, each launch, and who wrote what of the
newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.run import events
from distckpt.run.retention import listed
from distckpt.store.local import LocalStore
from distckpt.tools.answer import Answer, run_at, save_text
from distckpt.tools.told import Told, tell_of
from distckpt.tools.verify import Damage, damage_of
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse

    from distckpt.run.history import History

_CHECKS = ("quick", "full", "none")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="directory or URI of a run")
    add("-o", "--out", type=Path, default=Path("report.html"), metavar="FILE", help="where to write it (report.html)")
    add(
        "--verify",
        choices=_CHECKS,
        default="quick",
        help="of each checkpoint: sizes, headers and tables (quick); every byte (full); its commit alone (none)",
    )


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    from distckpt.tools.sections import whole_page

    if given.out.is_dir():
        raise IsADirectoryError(f"{given.out}: is a directory; --out names a file")
    history = run_at(given.run_path)
    told = tell_of(history, given.run_path, _problems(history, given.verify), given.verify, _events(history))
    text = whole_page(told)
    save_text(given.out, text)
    value: dict[str, Any] = {
        "report": str(given.out),
        "bytes": len(text.encode()),
        "state": told.state,
        "checkpoints": len(told.rows),
        "problems": {path: [d.problem for d in hit] for path, hit in told.problems.items() if hit},
    }
    return Answer([f"{given.out}: {size_text(value['bytes'])}", *_wrong(told)], value)


def _problems(history: History, how: str) -> dict[str, list[Damage]]:
    """What is wrong with each checkpoint that has a commit."""
    found = {}
    for c in listed(history):
        name = str(c.directory)
        found[name] = [Damage(f"{name}/commit.json", c.found.problem, [])] if c.found.problem else []
        if c.found.checkpoint and how != "none":
            found[name] += damage_of(history, c.found.checkpoint, quick=how == "quick") or []
    return found


def _events(history: History) -> list[dict[str, Any]]:
    return [e for e, _ in events.read(history.store.root)] if isinstance(history.store, LocalStore) else []


def _wrong(told: Told) -> list[str]:
    return [f"{told.health({'path': path})}: {path}: {hit[0].problem}" for path, hit in told.problems.items() if hit]
