"""Charts of a run's report, as SVG for a page whose style they share: saves in order, a metric over steps. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from distckpt.tools.svg import number, safe
from distckpt.units import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_LEFT, _PANEL, _GAP = 58.0, 74.0, 24.0
_LEAST_BAR = 3.0


@dataclass(frozen=True, slots=True)
class Save:
    """One save, as events tell it. at: when, in words. stall, seconds, nbytes: None where they are not known."""

    step: int
    launch: int
    at: str
    stall: float | None = None
    seconds: float | None = None
    nbytes: int | None = None
    failed: str = ""


@dataclass(frozen=True, slots=True)
class Point:
    """Value of a metric. counts: not of a save that a rewind left behind."""

    step: int
    launch: int
    value: float
    counts: bool = True


def seconds_text(seconds: float) -> str:
    """Give a duration as people read it, short: `1.2 ms`, `3.4 s`, `2 h 5 min`."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    days, hours, left = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (left, "min")]
    told = [f"{n} {unit}" for n, unit in parts if n]
    return " ".join(told[:2])


class _Panel(NamedTuple):
    """One quantity of saves: what it is called, its value, and that in words."""

    name: str
    value: Callable[[Save], float | None]
    text: Callable[[float], str]


_PANELS = (
    _Panel("training waited", lambda s: s.stall, seconds_text),
    _Panel("durable after", lambda s: s.seconds, seconds_text),
    _Panel("size", lambda s: s.nbytes, lambda n: size_text(int(n))),
)


def timeline(saves: Sequence[Save], width: int) -> str:
    """Saves in order: what each kept training waiting, when it was durable, and its size."""
    panels = [panel for panel in _PANELS if any(panel.value(s) is not None for s in saves)]
    groups = _grouped(saves, int((width - _LEFT) / _LEAST_BAR))
    step = (width - _LEFT) / max(1, len(groups))
    height = 22 + len(panels) * (_PANEL + _GAP) + 18
    made = [_bands(groups, step, height - 18)]
    made += [_bars(groups, step, 22 + i * (_PANEL + _GAP), panel) for i, panel in enumerate(panels)]
    if not panels:
        height = 40
    wanted = max(1, int(len(groups) * step / 110))
    every = max(1, -(-len(groups) // wanted))
    for i in range(0, len(groups), every):
        anchor = "end" if (i + 1) * step > width - _LEFT - 60 and i else "start"
        at = _LEFT + (i + (anchor == "end")) * step
        label = f"step {groups[i][0].step}"
        made.append(f'<text class="m" x="{number(at)}" y="{number(height - 4)}" text-anchor="{anchor}">{label}</text>')
    return _svg(width, height, "Saves in order", made)


def _grouped(saves: Sequence[Save], most: int) -> list[Sequence[Save]]:
    """Saves; of very many, neighbours together."""
    size = -(-len(saves) // most) or 1
    return [saves[i : i + size] for i in range(0, len(saves), size)]


def _bands(groups: Sequence[Sequence[Save]], step: float, height: float) -> str:
    """A band a launch, every other one shaded, with its number."""
    made, at, written = [], 0, -1e9
    for i, (launch, of_launch) in enumerate(groupby(groups, key=lambda group: group[0].launch)):
        count = len(list(of_launch))
        x, w = _LEFT + at * step, count * step
        made.append(f'<rect class="band{i % 2}" x="{number(x)}" y="0" width="{number(w)}" height="{number(height)}"/>')
        text = f"launch {launch}"
        if x - written > 6 and (w > 6.4 * len(text) or count == len(groups)):
            made.append(f'<text class="m" x="{number(x + 3)}" y="13">{text}</text>')
            written = x + 6.4 * len(text)
        at += count
    return "".join(made)


def _bars(groups: Sequence[Sequence[Save]], step: float, top: float, panel: _Panel) -> str:
    """Bars of one quantity; of neighbours that are one bar, the greatest."""
    values = [max((v for s in group if (v := panel.value(s)) is not None), default=None) for group in groups]
    most = max((v for v in values if v is not None), default=0.0) or 1.0
    base = top + 16 + _PANEL - 16
    made = [
        f'<text class="t" x="{_LEFT + 3:.0f}" y="{number(top + 8)}">{safe(panel.name)}</text>',
        _grid(_LEFT + step * len(groups), base - (_PANEL - 16), panel.text(most)),
        _grid(_LEFT + step * len(groups), base, "0"),
    ]
    wide = max(1.0, min(step * 0.72, 26.0))
    for i, (group, found) in enumerate(zip(groups, values, strict=True)):
        x = _LEFT + i * step + (step - wide) / 2
        failed = [s for s in group if s.failed]
        title = safe("\n".join(_told(s) for s in group[:3]))
        if found is not None:
            high = max(1.0, (_PANEL - 16) * found / most)
            box = f'x="{number(x)}" y="{number(base - high)}" width="{number(wide)}" height="{number(high)}"'
            made.append(f'<rect class="bar" {box}><title>{title}</title></rect>')
        if failed:
            dot = f'cx="{number(x + wide / 2)}" cy="{number(base - 5)}" r="4"'
            made.append(f'<circle class="bad" {dot}><title>{title}</title></circle>')
    return "".join(made)


def _told(save: Save) -> str:
    """What a save was like, for who points at its bar."""
    parts = [f"step {save.step}, {save.at}"]
    parts += [f"failed: {save.failed}"] if save.failed else []
    parts += [f"training waited {seconds_text(save.stall)}"] if save.stall is not None else []
    parts += [f"durable after {seconds_text(save.seconds)}"] if save.seconds is not None else []
    parts += [size_text(save.nbytes)] if save.nbytes is not None else []
    return ", ".join(parts)


def _grid(right: float, y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{_LEFT:.0f}" x2="{number(right)}" y1="{number(y)}" y2="{number(y)}"/>'
        f'<text class="m" x="{_LEFT - 5:.0f}" y="{number(y + 4)}" text-anchor="end">{safe(label)}</text>'
    )


def curve(points: Sequence[Point], width: int = 360, height: int = 170) -> str:
    """A metric over steps: a line of what counts; what a rewind left behind is grey."""
    left, right, top, bottom = 60.0, width - 8.0, 8.0, height - 20.0
    values = [p.value for p in points]
    low, high = min(values), max(values)
    logs = low > 0 and high / low > 100
    a, b = (math.log(low), math.log(high)) if logs else (low, high)
    first, last = min(p.step for p in points), max(p.step for p in points)

    def at(point: Point) -> tuple[float, float]:
        share = ((math.log(point.value) if logs else point.value) - a) / (b - a) if b > a else 0.5
        x = left + (right - left) * ((point.step - first) / (last - first) if last > first else 0.5)
        return x, bottom - (bottom - top) * share

    made = []
    for value in (high, low) if high > low else (high,):
        y = at(Point(first, 0, value))[1]
        made.append(f'<line class="grid" x1="{left:.0f}" x2="{number(right)}" y1="{number(y)}" y2="{number(y)}"/>')
        made.append(f'<text class="m" x="{left - 5:.0f}" y="{number(y + 4)}" text-anchor="end">{value:.3g}</text>')
    for counts in (False, True):
        made += [_line(list(line), at, counts=counts) for line in _lines(points, counts=counts)]
    made.append(f'<text class="m" x="{left:.0f}" y="{height - 4}">step {first}</text>')
    if logs:
        made.append(
            f'<text class="m" x="{number((left + right) / 2)}" y="{height - 4}" text-anchor="middle">log</text>'
        )
    if last > first:
        made.append(f'<text class="m" x="{number(right)}" y="{height - 4}" text-anchor="end">{last}</text>')
    return _svg(width, height, "over steps", made)


def _lines(points: Sequence[Point], *, counts: bool) -> list[Sequence[Point]]:
    """Lines to draw: one through all that counts, one a launch through what was left behind."""
    some = sorted((p for p in points if p.counts == counts), key=lambda p: (p.step, p.launch))
    if counts:
        return [some] if some else []
    return [list(line) for _, line in groupby(sorted(some, key=lambda p: p.launch), key=lambda p: p.launch)]


def _line(points: Sequence[Point], at: Callable[[Point], tuple[float, float]], *, counts: bool) -> str:
    kind = "on" if counts else "off"
    path = " ".join(f"{number(x)},{number(y)}" for x, y in map(at, points))
    dots, more = "", "" if counts else ", left behind"
    if len(points) <= 60:
        dots = "".join(
            f'<circle class="dot {kind}" cx="{number(x)}" cy="{number(y)}" r="2.4">'
            f"<title>step {p.step}, launch {p.launch}: {p.value:.6g}{more}</title></circle>"
            for p in points
            for x, y in [at(p)]
        )
    return f'<polyline class="line {kind}" points="{path}"/>{dots}'


def _svg(width: float, height: float, title: str, made: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-label="{safe(title)}">'
        f"{''.join(made)}</svg>"
    )
