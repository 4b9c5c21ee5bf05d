"""What a campaign has done: how many cases ended how, and what must never be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Verdicts by what was done, and problems as text; each says how it is made again."""

    counts: Counter = field(default_factory=Counter)
    """(what was done, verdict) -> how often."""
    problems: list = field(default_factory=list)
    figures: Counter = field(default_factory=Counter)
    """Other numbers worth telling, by name."""

    def add(self, what, verdict, problem=None):
        """Count a case. problem: what must not be, with seed and case."""
        self.counts[what, verdict] += 1
        if problem:
            self.problems.append(problem)

    @property
    def cases(self):
        return sum(self.counts.values())

    def __str__(self):
        lines = list(dict.fromkeys(self.problems))[:20]
        lines += [f"  {what:50} {verdict:24} {n:>9,}" for (what, verdict), n in sorted(self.counts.items())]
        lines += [f"  {name:75} {value:>9,}" for name, value in self.figures.items()]
        return "\n".join([*lines, f"  {self.cases:,} cases, {len(self.problems)} problems"])
