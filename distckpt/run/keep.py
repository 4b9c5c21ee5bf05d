"""What is kept of a run: rules, and the decision they make. Pure: it is given what there is, and touches nothing.

Rule 1. The two newest checkpoints that count stay, and what they refer to; so does what a reader has a lease on.
Rule 2. Any other that counts stays if any rule keeps it. Without a rule all stay.
Rule 3. `bytes` is a limit on what the rules keep: over it the oldest go first, the best one last, and never those of
rule 1. What a checkpoint that stays refers to stays.
Rule 4. A superseded checkpoint counts for no rule, and goes. A damaged one counts for no rule, and stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from distckpt.errors import Unsupported
from distckpt.run.triggers import duration
from distckpt.units import as_bytes, duration_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from distckpt.format.layout import StepDir

NEWEST = 2
"""Checkpoints that no rule can remove (promise P6): one to resume from, one in case that one is damaged."""


class Best(NamedTuple):
    """Keep the `most` checkpoints with the least ("min") or greatest ("max") value of a metric."""

    metric: str
    mode: str = "min"
    most: int = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A committed checkpoint, as far as rules ask. nbytes: of its own files. refers_to: whose files it shares.

    asked: why it is to stay, by whoever saved it. metrics: numbers only. state: "committed", "superseded", "damaged".
    """

    directory: StepDir
    nbytes: int = 0
    date: str = ""
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    asked: str = ""
    refers_to: frozenset[StepDir] = frozenset()
    state: Literal["committed", "superseded", "damaged"] = "committed"
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """Why each checkpoint stays, or goes. `best` and `epochs`: what the pointers of those names should point at."""

    stays: Mapping[StepDir, Sequence[str]]
    goes: Mapping[StepDir, str]
    best: StepDir | None
    epochs: Mapping[int, StepDir]
    notes: Sequence[str]

    def why(self, directory: StepDir) -> str:
        """What is to become of a checkpoint, in words."""
        return ", ".join(self.stays[directory]) if directory in self.stays else self.goes[directory]


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Rules, of which any one keeps a checkpoint; without any, all are kept.

    last: so many of the newest. every_steps: the first checkpoint at or after each multiple of so many steps.
    per_epoch: the newest of each epoch (metrics["epoch"], else what Progress says). best: (metric, "min" or "max",
    how many), or a list of such; the first of them is what `best.json` goes by. newest_for: those saved within so long
    before the newest, such as "2 h". fn: called on rank 0 with (step, metrics) when a checkpoint is saved; what it
    returns, True or a text that says why, is recorded in the checkpoint and keeps it for good.
    bytes: most bytes that all of these may take, such as "2 TB".
    """

    last: int | None = None
    every_steps: int | None = None
    per_epoch: bool = False
    best: Best | tuple[str, str, int] | tuple[str, str] | Sequence[tuple[str, str, int]] = ()
    newest_for: str | float | None = None
    bytes: str | int | None = None
    fn: Callable[[int, Mapping[str, Any]], str | bool | None] | None = None

    def __post_init__(self) -> None:
        for name in ("last", "every_steps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"Keep: {name}={value!r}: an int of at least 1 is expected")
        if type(self.per_epoch) is not bool:
            raise ValueError(f"Keep: per_epoch={self.per_epoch!r}: True or False is expected")
        if self.fn is not None and not callable(self.fn):
            raise ValueError(f"Keep: fn={self.fn!r} cannot be called: a function of (step, metrics) is expected")
        try:
            _ = self.bests, self.limit, self.seconds
        except ValueError as e:
            raise ValueError(f"Keep: {e}") from None

    @property
    def bests(self) -> tuple[Best, ...]:
        """`best`, as rules."""
        return _best(self.best)

    @property
    def limit(self) -> int | None:
        """`bytes`, as a number."""
        return None if self.bytes is None else as_bytes(self.bytes)

    @property
    def seconds(self) -> float | None:
        """`newest_for`, as a number."""
        return None if self.newest_for is None else duration(self.newest_for, "newest_for")

    def to_json(self) -> dict[str, Any]:
        """Rules that are set, for the writer process and the registry. What `fn` said stands in the checkpoints."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "fn"}
        return {name: value for name, value in found.items() if value not in (None, False, ())}

    @classmethod
    def from_json(cls, rules: Mapping[str, Any]) -> Keep:
        """Rules that `to_json` gave. ValueError for others."""
        if unknown := set(rules) - ({f.name for f in fields(cls)} - {"fn"}):
            raise ValueError(f"Keep: no such rule: {', '.join(sorted(unknown))}")
        return cls(**rules)

    def asked(self, step: int, metrics: Mapping[str, Any]) -> str:
        """Why `fn` wants this checkpoint kept, "" where it does not. Unsupported if it says neither."""
        said = self.fn(step, metrics) if self.fn else None
        if said is not None and not isinstance(said, (str, bool)):
            raise Unsupported(f"Keep: fn returned {said!r} for step {step}; a bool, a text or None is expected")
        return said if isinstance(said, str) else "fn" if said else ""


def decide(keep: Keep, found: Sequence[Candidate], held: Mapping[StepDir, str]) -> Decision:
    """Which of a run's committed checkpoints stay, and which go. held: must stay, and why."""
    counting = sorted((c for c in found if c.state == "committed"), key=lambda c: c.directory, reverse=True)
    firm = {c.directory: [f"one of the {NEWEST} newest"] for c in counting[:NEWEST]}
    for c in found:
        if c.directory in held:
            firm.setdefault(c.directory, []).append(held[c.directory])
        if c.state == "damaged":
            firm.setdefault(c.directory, []).append(f"damaged, and set aside: {c.problem}")
    wanted, notes = _wanted(keep, counting)
    best = _ranked(keep.bests[0], counting)[:1] if keep.bests else []
    by_name = {c.directory: c for c in found}
    dropped: dict[StepDir, str] = {}
    if keep.limit is not None:
        dropped = _over(keep.limit, by_name, firm, wanted, best)
        left = sum(by_name[d].nbytes for d in _referred({*firm, *wanted} - dropped.keys(), by_name))
        if left > keep.limit:
            notes.append(f"what must stay takes {size_text(left)}, more than bytes={size_text(keep.limit)}")
    stays = {d: [*firm.get(d, ()), *(() if d in dropped else wanted.get(d, ()))] for d in {*firm, *wanted}}
    stays = {d: why for d, why in stays.items() if why}
    for directory, by in _referred(set(stays), by_name).items():
        if directory not in stays:
            stays[directory] = [f"{by} refers to its files"]
    goes = {c.directory: _why_not(c, dropped) for c in found if c.directory not in stays}
    epochs = {c.epoch: c.directory for c in reversed(counting) if c.epoch is not None}
    return Decision(
        dict(sorted(stays.items(), reverse=True)),
        dict(sorted(goes.items(), reverse=True)),
        next((d for d in best if d in stays), None),
        {e: d for e, d in sorted(epochs.items()) if d in stays} if keep.per_epoch else {},
        notes,
    )


def _why_not(c: Candidate, dropped: Mapping[StepDir, str]) -> str:
    if c.state == "superseded":
        return "superseded: a later launch resumed from before it"
    return dropped.get(c.directory, "no rule keeps it")


def _wanted(keep: Keep, counting: Sequence[Candidate]) -> tuple[dict[StepDir, list[str]], list[str]]:
    """What each rule keeps (newest first was given), and notes on rules that can say nothing."""
    found: dict[StepDir, list[str]] = {}
    notes: list[str] = []

    def add(directories: Collection[StepDir], why: str) -> None:
        for directory in directories:
            found.setdefault(directory, []).append(why)

    if not any((keep.last, keep.every_steps, keep.per_epoch, keep.bests, keep.newest_for is not None, keep.fn)):
        add([c.directory for c in counting], "no rule says otherwise")
    add([c.directory for c in counting[: keep.last or 0]], f"one of the last {keep.last}")
    if keep.every_steps:
        firsts: dict[int, StepDir] = {}
        for c in counting:  # falling, and of one step the highest generation first
            multiple, known = c.directory.step // keep.every_steps, firsts.get(c.directory.step // keep.every_steps)
            if multiple and (known is None or c.directory.step < known.step):
                firsts[multiple] = c.directory
        add(firsts.values(), f"the first at or after a multiple of {keep.every_steps} steps")
    if keep.per_epoch:
        newest = {c.epoch: c.directory for c in reversed(counting) if c.epoch is not None}
        for epoch, directory in newest.items():
            add([directory], f"the newest of epoch {epoch}")
        if counting and not newest:
            notes.append("per_epoch: no checkpoint says which epoch it is of (metrics={'epoch': ...}, or a Progress)")
    for rule in keep.bests:
        ranked = _ranked(rule, counting)
        add(ranked[: rule.most], f"one of the {rule.most} best by {rule.metric} ({rule.mode})")
        if counting and not ranked:
            known_metrics = ", ".join(sorted({name for c in counting for name in c.metrics})) or "none"
            notes.append(f"best: no checkpoint has a number {rule.metric!r} among its metrics; known: {known_metrics}")
    if keep.seconds is not None:
        add(_recent(counting, keep.seconds), f"of the last {duration_text(keep.seconds)}")
    for c in counting:
        if c.asked:
            add([c.directory], f"asked for when it was saved: {c.asked}")
    return found, notes


def _ranked(rule: Best, counting: Sequence[Candidate]) -> list[StepDir]:
    """Checkpoints that have the metric, the best first; of equal ones the newest."""
    sign = 1 if rule.mode == "min" else -1
    having = [c for c in counting if rule.metric in c.metrics]
    return [c.directory for c in sorted(having, key=lambda c: sign * c.metrics[rule.metric])]  # stable: newest first


def _recent(counting: Sequence[Candidate], seconds: float) -> list[StepDir]:
    """Saved at most so long before the newest: however long the run then stood still."""
    dated = {c.directory: at for c in counting if (at := moment(c.date))}
    latest = max(dated.values(), default=None)
    return [d for d, at in dated.items() if latest and (latest - at).total_seconds() <= seconds]


def moment(date: str) -> datetime | None:
    """Time in a manifest, None where it is not one."""
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _over(
    limit: int,
    found: Mapping[StepDir, Candidate],
    firm: Collection[StepDir],
    wanted: Collection[StepDir],
    best: Collection[StepDir],
) -> dict[StepDir, str]:
    """What the limit takes of what rules keep: the oldest first, the best one last."""
    dropped: dict[StepDir, str] = {}
    for directory in sorted((d for d in wanted if d not in firm), key=lambda d: (d in best, d)):
        left = _referred({*firm, *wanted} - dropped.keys(), found)
        if sum(found[d].nbytes for d in left) <= limit:
            break
        dropped[directory] = f"over the limit of {size_text(limit)}"
    return dropped


def _referred(staying: Collection[StepDir], found: Mapping[StepDir, Candidate]) -> dict[StepDir, StepDir]:
    """What stays, and whatever it refers to, and so on: each with one that refers to it (itself, at first)."""
    reached = {d: d for d in staying}
    ahead = list(reached)
    while ahead:
        by = ahead.pop()
        for directory in found[by].refers_to:
            if directory in found and directory not in reached:
                reached[directory] = by
                ahead.append(directory)
    return reached


def _best(given: Any) -> tuple[Best, ...]:
    """Rules in what `best` was given. ValueError."""
    if isinstance(given, str) or not isinstance(given, (tuple, list)):
        raise ValueError(f"best={given!r}: (metric, 'min' or 'max', how many) is expected")  # noqa: TRY004  # noqa: TRY004
    rules = tuple(given) if all(isinstance(rule, (tuple, list)) for rule in given) else (given,)
    for rule in rules:
        match tuple(rule):
            case (str(metric), "min" | "max") | (str(metric), "min" | "max", int()) if metric and all(
                type(count) is int and count >= 1 for count in rule[2:]
            ):
                continue
        raise ValueError(f"best={tuple(rule)!r}: (metric, 'min' or 'max', how many) is expected")
    return tuple(Best(*rule) for rule in rules)
