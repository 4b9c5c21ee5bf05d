"""`distckpt ls RUN`: its checkpoints, newest first, and saves that did not finish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.run.publish import pointing
from distckpt.run.retention import listed
from distckpt.tools.answer import Answer, run_at, table
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse

    from distckpt.run.retention import Listed


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run_path", metavar="RUN", help="directory or URI of a run")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    history = run_at(given.run_path)
    names: dict[str, list[str]] = {}
    for name, target in pointing(history.store).items():
        names.setdefault(target, []).append(name)
    checkpoints = {c.directory: _row(c) for c in listed(history)}
    rows = [
        {**checkpoints.get(d, {"path": str(d), "status": "incomplete"}), "names": sorted(names.get(str(d), []))}
        for d in history.directories()
    ]
    lines = table([("checkpoint", "date", "ranks", "size", "epoch", "status", "metrics"), *map(_text, rows)])
    return Answer(lines, rows)


def _row(listed: Listed) -> dict[str, Any]:
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
    }


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
    )
