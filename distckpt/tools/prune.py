"""`distckpt prune RUN`: retention, offline: what rules keep, and what they let go of, each with the reason.

Without rules of its own it takes those that the run was last kept by. Safe beside a running job.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.run.keep import Keep
from distckpt.run.publish import Retention, recorded_rules, retain
from distckpt.run.retention import decided, listed
from distckpt.tools.answer import Answer, run_at
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse

    from distckpt.run.history import History


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="directory or URI of a run")
    add("--last", type=int, metavar="N", help="keep the N newest")
    add("--every-steps", type=int, metavar="N", help="keep the first at or after each multiple of N steps")
    add("--per-epoch", action="store_true", default=None, help="keep the newest of each epoch")
    add("--best", action="append", type=best_rule, metavar="METRIC:min[:N]", help="keep the N best (or :max)")
    add("--newest-for", metavar="TIME", help="keep those saved within so long before the newest, such as '2 h'")
    add("--bytes", metavar="SIZE", help="most bytes that all of these take, such as '2 TB'")
    add("--delete", action="store_true", help="remove what goes; without it, it is only said")


def best_rule(text: str) -> tuple[str, str, int]:
    """Rule in `val_loss:min:2`. ValueError."""
    metric, mode, most = (*text.split(":"), "1")[:3] if text.count(":") == 1 else text.split(":")
    return Keep(best=(metric, mode, int(most))).bests[0]


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    history = run_at(given.run_path)
    retention = Retention(*_rules(given, history))
    checkpoints = listed(history)
    decision = decided(history, checkpoints, retention.keep)
    sizes = {c.directory: c.candidate.nbytes for c in checkpoints}
    removed, problems = retain(history, retention) if given.delete else ([], [])
    freed = sum(sizes[d] for d in (removed if given.delete else decision.goes))
    lines = [f"{'keep  ' if d in decision.stays else 'remove'} {d}: {decision.why(d)}" for d in sizes]
    lines += [f"note: {note}" for note in decision.notes] + [f"problem: {problem}" for problem in problems]
    done = f"removed {len(removed)}" if given.delete else f"would remove {len(decision.goes)} (with --delete)"
    lines.append(f"{done}: {size_text(freed)}")
    value: dict[str, Any] = {
        "keeps": {str(d): list(why) for d, why in decision.stays.items()},
        "goes": {str(d): why for d, why in decision.goes.items()},
        "removed": [str(d) for d in removed],
        "bytes": freed,
        "notes": list(decision.notes),
        "problems": problems,
    }
    return Answer(lines, value, code=int(bool(problems)))


def _rules(given: argparse.Namespace, history: History) -> tuple[Keep, None, bool]:
    """Rules asked for, else the run's own; whether they are that."""
    names = ("last", "every_steps", "per_epoch", "best", "newest_for", "bytes")
    asked = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if asked:
        return Keep(**asked), None, False
    recorded = recorded_rules(history.store)
    if recorded is None:
        raise ValueError(f"{given.run_path}: the run was saved without rules (keep=); give some, such as --last 3")
    return Keep.from_json(recorded), None, True
