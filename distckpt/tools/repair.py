"""`distckpt repair RUN`: pointers, symlinks and meta.json written anew from the commits. Removes no checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distckpt.errors import NotACheckpoint
from distckpt.run.keep import Keep
from distckpt.run.publish import Retention, make_known, pointing, recorded_rules
from distckpt.tools.answer import Answer, run_at
from distckpt.tools.prune import best_rule

if TYPE_CHECKING:
    import argparse


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_path", metavar="RUN", help="directory or URI of a run")
    parser.add_argument(
        "--best", type=best_rule, metavar="METRIC:min", help="what best.json goes by, where meta.json does not tell"
    )


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    history = run_at(given.run_path)
    if next(history.committed(), None) is None:
        raise NotACheckpoint(f"{given.run_path}: there is no commit to repair from: {history.why_nothing()}")
    rules = recorded_rules(history.store)
    if given.best:
        rules = {**(rules or {}), "best": [given.best]}
    before = pointing(history.store)
    checkpoints, _ = make_known(history, Retention(Keep.from_json(rules)) if rules is not None else None)
    after = pointing(history.store)
    lines = [f"meta.json: {len(checkpoints)} checkpoints"]
    for name in sorted({*before, *after}):
        was, now = before.get(name, "nothing"), after.get(name, "nothing")
        lines.append(f"{name}: {now}" if was == now else f"{name}: {now} (was {was or 'unreadable'})")
    problems = [f"{c.directory}: {c.candidate.problem}" for c in checkpoints if c.candidate.state == "damaged"]
    lines += [f"damaged: {problem}" for problem in problems]
    value = {"checkpoints": len(checkpoints), "before": before, "after": after, "damaged": problems}
    return Answer(lines, value, code=int(bool(problems)))
