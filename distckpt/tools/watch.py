"""`distckpt watch RUN`: its events as they come; for people, Prometheus, TensorBoard and OpenTelemetry.

A process of its own that follows RUN/events.jsonl: training pays nothing for it.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import KeyMissing, NotACheckpoint, Unsupported
from distckpt.format.layout import EVENTS, beat_file
from distckpt.run.events import Following
from distckpt.run.goodput import goodput
from distckpt.store.local import LocalStore
from distckpt.store.open import located, open_store
from distckpt.tools.answer import Answer, seconds, tell
from distckpt.tools.sinks import opened
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from distckpt.tools.sinks import Sink


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="directory of a run, which may be yet to begin")
    add("--once", action="store_true", help="say what there is, and end")
    add("--prometheus", metavar="FILE", help="textfile to write anew at each event (extra: prometheus)")
    add("--tensorboard", metavar="DIR", help="directory to write scalars to (extra: tensorboard)")
    add("--otel", action="store_true", help="export metrics over OTLP/HTTP; OTEL_* variables say where (extra: otel)")
    add("--interval", type=seconds, default=1.0, metavar="SECONDS", help="between looks at the file (1)")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command; without --once, print events until interrupted."""
    root = located(given.run_path)
    if not isinstance(root, Path):
        open_store(root)  # which refuses one that has credentials in it, and says them not
        raise Unsupported(
            f"{root}: no {EVENTS} is kept at a URI, so there is nothing to watch: `distckpt ls` looks there"
        )
    if root.exists() and not root.is_dir():
        raise NotACheckpoint(f"{root}: is a file, not a run's directory")
    with ExitStack() as stack:
        sinks = opened(stack, root.name, given.prometheus, given.tensorboard, otel=given.otel)
        following = Following(root)
        while True:
            new = following.look()
            _tell(sinks, root, new, following.seen)
            if given.once:
                return _summary(root, following.seen)
            for event in new:
                tell(json.dumps(event) if given.json else line(event))
            time.sleep(given.interval)


def _tell(sinks: Sequence[Sink], root: Path, new: Sequence[dict[str, Any]], seen: Sequence[dict[str, Any]]) -> None:
    """Hand new events to all sinks, and what all come to."""
    if not sinks or not (new or not seen):
        return
    values = figures(seen, alive_at(root, seen))
    for sink in sinks:
        for event in new:
            sink.take(event)
        sink.show(values)


def alive_at(root: Path, events: Sequence[Mapping[str, Any]]) -> float | None:
    """When the newest launch last gave a sign of life, by its heartbeat; None without one."""
    launch = max((e["launch"] for e in events if isinstance(e.get("launch"), int)), default=None)
    try:
        return LocalStore(root).changed(beat_file(launch)) if launch is not None else None
    except KeyMissing:
        return None


def figures(events: Sequence[Mapping[str, Any]], alive: float | None = None) -> dict[str, float]:
    """What a run's events come to. Names and units as Prometheus has them."""
    values: dict[str, float] = {}
    for name in ("launched", "committed", "failed", "skipped"):
        values[f"{name}_total"] = sum(e["event"] == name for e in events)
    values["stall_seconds_total"] = sum(float(e.get("stall", 0)) for e in events)
    for e in events:
        if e["event"] == "staged":
            values |= {"step": e["step"], "stall_seconds": e["stall"]}
            values |= {"samples": e["samples"]} if "samples" in e else {}
        elif e["event"] == "committed":
            values |= {"committed_step": e["step"], "committed_timestamp_seconds": e["time"], "save_bytes": e["bytes"]}
            values |= {"save_seconds": e["seconds"]} if "seconds" in e else {}
    found = goodput(events, alive)
    if found.share is not None:
        values["goodput_ratio"] = found.share
        values |= {f"{name}_seconds_total": getattr(found, name) for name in ("wall", "training", "lost", "down")}
    return values


def _summary(root: Path, events: Sequence[Mapping[str, Any]]) -> Answer:
    if not events:
        raise NotACheckpoint(f"{root}: no {EVENTS}: nothing has happened to a run here")
    values = figures(events, alive_at(root, events))
    lines = [f"{name}: {values[name]:.6g}" for name in sorted(values)]
    return Answer([*lines, *_goodput(root, events)], {"figures": values, "events": list(events)})


def _goodput(root: Path, events: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line on the goodput of a run; none where too little is known."""
    found = goodput(events, alive_at(root, events))
    if found.share is None:
        return []
    parts = {"saving": found.saving, "lost work": found.lost, "down, starting and loading": found.down}
    rest = ", ".join(f"{name} {seconds / found.wall:.1%}" for name, seconds in parts.items())
    return [f"goodput: {found.share:.1%} of {found.wall:.0f} s in {found.launches} launch(es); {rest}"]


def line(event: Mapping[str, Any]) -> str:
    """An event for people."""
    at = datetime.fromtimestamp(event["time"]).strftime("%F %T")  # noqa: DTZ006  local time, for people
    rest = {name: value for name, value in event.items() if name not in {"time", "event", "launch"}}
    if "bytes" in rest:
        rest["bytes"] = size_text(int(rest["bytes"]))
    said = " ".join(f"{name}={value}" for name, value in rest.items())
    return f"{at}  {event['event']:<9}  {said}"
