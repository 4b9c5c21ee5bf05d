"""`distckpt ls RUN|ROOT`: checkpoints of a run, newest first, and saves that did not finish; or the runs of a ROOT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint
from distckpt.run.keep import Keep
from distckpt.run.publish import pointing, recorded_rules
from distckpt.run.retention import decided, listed
from distckpt.tools.answer import Answer, fitted, run_at, table
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from distckpt.format.layout import StepDir
    from distckpt.run.history import History
    from distckpt.run.keep import Decision
    from distckpt.run.retention import Listed
    from distckpt.tools.runs import Row


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_path", metavar="RUN|ROOT", help="directory or URI of a run, or of what holds several")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    try:
        history = run_at(given.run_path)
    except NotACheckpoint:
        from distckpt.tools.runs import runs_below

        if runs := runs_below(given.run_path):
            return Answer(fitted(_runs_text(runs)), [row.to_json() for row in runs])
        raise
    found, notes = rows(history)
    head = ("checkpoint", "date", "ranks", "size", "epoch", "status", "metrics", "kept")
    return Answer(fitted([*table([head, *map(_text, found)]), *notes]), found)


def rows(history: History) -> tuple[list[dict[str, Any]], list[str]]:
    """Row of each step directory, newest first; and notes."""
    names: dict[str, list[str]] = {}
    for name, target in pointing(history.store).items():
        names.setdefault(target, []).append(name)
    found = listed(history)
    decision, notes = kept(history, found)
    checkpoints = {c.directory: _row(c, decision) for c in found}
    return [
        {**checkpoints.get(d, {"path": str(d), "status": "incomplete"}), "names": sorted(names.get(str(d), []))}
        for d in history.directories()
    ], notes


def kept(history: History, found: list[Listed]) -> tuple[Decision | None, list[str]]:
    """What the run's own rules say of each checkpoint (None: it has none); and notes."""
    recorded = recorded_rules(history.store)
    if recorded is None:
        return None, []
    try:
        decision = decided(history, found, Keep.from_json(recorded))
    except (TypeError, ValueError) as e:
        return None, [f"note: meta.json has rules that are none ({e}); `distckpt repair` writes it anew"]
    return decision, [f"note: {note}" for note in decision.notes]


def _row(listed: Listed, decision: Decision | None) -> dict[str, Any]:
    found, facts = listed.found, listed.candidate
    if not found.checkpoint:
        return {"path": str(found.directory), "status": "damaged", "problem": found.problem}
    content = found.checkpoint.manifest
    return {
        "path": str(found.directory),
        "step": content.step,
        "date": content.date,
        "launch": content.launch,
        "world_size": content.world_size,
        "bytes": facts.nbytes,
        "epoch": facts.epoch,
        "status": facts.state,
        "metrics": dict(facts.metrics),
        **_fate(found.directory, decision),
    }


def _fate(directory: StepDir, decision: Decision | None) -> dict[str, Any]:
    """Why a checkpoint is kept, or goes."""
    if decision is None:
        return {}
    goes = {"goes": decision.goes[directory]} if directory in decision.goes else {}
    return {"kept": list(decision.stays.get(directory, ())), **goes}


def _text(row: dict[str, Any]) -> tuple[str, ...]:
    metrics = " ".join(f"{name}={value:.6g}" for name, value in row.get("metrics", {}).items())
    return (
        row["path"] + "".join(f" ({name})" for name in row["names"]),
        row.get("date", "-"),
        str(row.get("world_size", "-")),
        size_text(row["bytes"]) if "bytes" in row else "-",
        "-" if row.get("epoch") is None else str(row["epoch"]),
        row["status"],
        metrics or row.get("problem", ""),
        f"goes: {row['goes']}" if "goes" in row else ", ".join(row.get("kept", ())),
    )


def _runs_text(runs: Sequence[Row]) -> list[str]:
    head = ("run", "state", "step", "date", "checkpoints", "size", "")
    return table([head, *((r.run, r.state, _or(r.step), _or(r.date), *_counts(r), r.problem) for r in runs)])


def _counts(row: Row) -> tuple[str, str]:
    return str(row.checkpoints), size_text(row.bytes) if row.checkpoints else "-"


def _or(value: object) -> str:
    return "-" if value is None else str(value)
