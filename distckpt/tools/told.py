"""What a report tells of a run: its checkpoints, saves, metrics and launches as plain values. Reads no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from distckpt.format.layout import StepDir
from distckpt.run.goodput import goodput
from distckpt.run.keep import moment
from distckpt.run.launches import counts, read_launches
from distckpt.run.publish import recorded_rules
from distckpt.run.retention import is_number, listed
from distckpt.tools.charts import Point, Save, seconds_text
from distckpt.tools.ls import rows
from distckpt.tools.runs import RUNNING, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distckpt.format.manifest import Manifest
    from distckpt.run.goodput import Goodput
    from distckpt.run.history import History
    from distckpt.run.launches import Launch
    from distckpt.tools.verify import Damage

    Event = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Life:
    """One launch, in words. saves: that it committed."""

    number: int
    began: str
    lasted: str
    ranks: int
    host: str
    job: str
    resumed_from: str
    saves: int
    last_step: int | None
    ended: str
    wrong: bool = False


@dataclass(slots=True)
class Told:
    """All that a report says. rows: as `distckpt ls` has them, newest first; problems: of each that has a commit."""

    name: str
    where: str
    state: str
    rows: list[dict[str, Any]]
    problems: Mapping[str, list[Damage]]
    checked: str
    rules: Mapping[str, Any] | None
    notes: list[str]
    saves: list[Save] = field(default_factory=list)
    metrics: dict[str, list[Point]] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    newest: Manifest | None = None
    goodput: Goodput | None = None
    has_events: bool = False
    failures: list[str] = field(default_factory=list)

    def health(self, row: Mapping[str, Any]) -> str:
        """Status of a row: damage that was found in its files counts, too."""
        if hit := self.problems.get(row["path"]):
            return "not read" if all(d.unread for d in hit) else "damaged"
        return str(row["status"])


def tell_of(
    history: History, where: str, problems: Mapping[str, list[Damage]], checked: str, events: Sequence[Event]
) -> Told:
    """All that a report says of a run."""
    found = listed(history)
    shown, notes = rows(history)
    launches = read_launches(history.store)
    newest = next((c.found.checkpoint for c in found if c.candidate.state == "committed"), None)
    state = state_of(history.store, found)
    told = Told(
        where.rstrip("/").rpartition("/")[2] or where,
        where,
        state,
        shown,
        problems,
        checked,
        recorded_rules(history.store),
        notes,
        newest=newest.manifest if newest else None,
        has_events=bool(events),
        failures=_failures(events),
    )
    told.saves = _saves(events) if events else _saves_of_rows(shown)
    told.metrics = _metrics(events, shown, launches)
    told.lives = [_life(launch, launches, events, shown, state) for launch in launches]
    whole = goodput(events)
    told.goodput = whole if whole.share is not None and whole.wall > 0 else None
    return told


def clock(seconds: float) -> str:
    """Time of day for people, in local time."""
    return datetime.fromtimestamp(seconds).strftime("%F %T")  # noqa: DTZ006  local time, for people


def local(date: str) -> str:
    """Date of a manifest for people."""
    at = moment(date)
    return at.astimezone().strftime("%F %T") if at else date


def _saves(events: Sequence[Event]) -> list[Save]:
    """Saves in the order in which they began, as far as is known of each."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for e in events:
        if e["event"] not in {"staged", "committed", "failed"} or not isinstance(e.get("step"), int):
            continue
        said = found.setdefault((e.get("launch"), e["step"]), {"time": e["time"]})
        if e["event"] == "failed":
            said["failed"] = str(e.get("error", "no word why"))
        for name, known in (("stall", "stall"), ("seconds", "seconds"), ("bytes", "nbytes")):
            if is_number(e.get(name)):
                said[known] = e[name]
    return [
        Save(step, launch if isinstance(launch, int) else 0, clock(said.pop("time")), **said)
        for (launch, step), said in found.items()
    ]


def _saves_of_rows(shown: Sequence[Mapping[str, Any]]) -> list[Save]:
    """What commits alone tell."""
    return [
        Save(row["step"], row["launch"], local(row["date"]), nbytes=row["bytes"])
        for row in reversed(shown)
        if "step" in row
    ]


def _metrics(
    events: Sequence[Event], shown: Sequence[Mapping[str, Any]], launches: Sequence[Launch]
) -> dict[str, list[Point]]:
    """Points of each metric: of checkpoints that are gone as well, where events tell of them."""
    said: dict[tuple[str, int], Mapping[str, Any]] = {}
    for e in events:
        if e["event"] == "committed" and isinstance(e.get("launch"), int) and isinstance(e.get("metrics"), dict):
            said[str(e.get("directory")), e["launch"]] = e["metrics"]
    for row in shown:
        if "step" in row:
            said.setdefault((row["path"], row["launch"]), row["metrics"])
    found: dict[str, list[Point]] = {}
    for (path, launch), values in said.items():
        directory = StepDir.parse(path)
        if directory is None:
            continue
        good = counts(directory, launch, launches)
        for name, value in values.items():
            if is_number(value) and name != "epoch":
                found.setdefault(name, []).append(Point(directory.step, launch, float(value), good))
    return found


def _life(
    launch: Launch,
    launches: Sequence[Launch],
    events: Sequence[Event],
    shown: Sequence[Mapping[str, Any]],
    state: str,
) -> Life:
    own = [e for e in events if e.get("launch") == launch.number and e["event"] not in {"removed", "after"}]
    committed = {e["step"] for e in own if e["event"] == "committed" and "step" in e}
    committed |= {row["step"] for row in shown if row.get("launch") == launch.number}
    ended, wrong = _end(own, alive=state == RUNNING and launch is launches[-1])
    return Life(
        launch.number,
        local(launch.date),
        seconds_text(own[-1]["time"] - own[0]["time"]) if len(own) > 1 else "",
        launch.world_size,
        launch.host,
        launch.job,
        launch.resumed_from or "nothing",
        len(committed),
        max(committed, default=None),
        ended,
        wrong,
    )


def _end(own: Sequence[Event], *, alive: bool) -> tuple[str, bool]:
    """How a launch ended, and whether that is a fault."""
    if alive:
        return "it runs", False
    for e in reversed(own):
        if e["event"] == "closed" and e.get("failed"):
            return "an exception", True
        if e["event"] == "stopping":
            return f"told to stop ({e.get('reason', 'no word why')})", False
    if any(e["event"] == "closed" for e in own):
        return "closed", False
    return ("no word: killed, or lost", True) if own else ("not told", False)


def _failures(events: Sequence[Event]) -> list[str]:
    """What went wrong in a run's life, oldest first."""
    found = []
    for e in events:
        at = clock(e["time"])
        match e:
            case {"event": "failed"}:
                found.append(f"{at}: the save of step {e.get('step')} failed: {e.get('error')}")
            case {"event": "resumed", "fell_back_from": dict(passed)} if passed:
                why = "; ".join(f"step {step}: {problem}" for step, problem in passed.items())
                found.append(f"{at}: a resume fell back to step {e.get('step')}: {why}")
            case {"event": "behind"}:
                found.append(f"{at}: the root was behind: {e.get('why')}")
            case {"event": "after", "code": int(code), "name": str(name)} if code:
                found.append(f"{at}: {name} after step {e.get('step')} ended with {code}: {e.get('said', '')}")
    return found
