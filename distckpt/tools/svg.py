"""SVG, as far as the pictures here need it: text is escaped, and what is made is well-formed XML, whatever it names."""

from __future__ import annotations

import colorsys
import re
from html import escape
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

Place: TypeAlias = tuple[float, float, float, float]
"""x, y, width, height in pixels."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LETTER = 6.3
"""Width of a letter of 11 pixels in height, about."""
STYLE = (
    "text{font:11px ui-sans-serif,system-ui,sans-serif;fill:#1b1f24}"
    ".b{font-weight:600;font-size:13px}.m{fill:#59636e}.o{fill:none;stroke:#fff;stroke-width:1.5}"
    ".l{paint-order:stroke;stroke:#fff;stroke-opacity:.65;stroke-width:3px;stroke-linejoin:round}"
)


def safe(text: object) -> str:
    """Text as it may stand in XML and HTML, in an attribute too."""
    return escape(_NOT_XML.sub("\ufffd", str(text)))


def number(value: float) -> str:
    """Shortest text of a coordinate."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


class Svg:
    """A picture that grows downwards."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._bottom = 0.0
        self._made: list[str] = []

    def take(self, height: float) -> float:
        """Take so many pixels at the bottom; where they begin."""
        top, self._bottom = self._bottom, self._bottom + height
        return top

    def line(self, text: str, *, bold: bool = False) -> None:
        """Add a line of text."""
        top = self.take(22)
        most = int(self.width / (_LETTER + bold))
        self._made.append(
            f'<text class="{"b" if bold else "m"}" x="0" y="{number(top + 15)}">{safe(text[:most])}</text>'
        )

    def fill(self, colour: str, places: Sequence[Place]) -> None:
        """Add rectangles of one colour."""
        path = "".join(f"M{number(x)} {number(y)}h{number(w)}v{number(h)}h{number(-w)}z" for x, y, w, h in places)
        self._made.append(f'<path fill="{colour}" d="{path}"/>')

    def area(self, place: Place, label: str, told: Sequence[str]) -> None:
        """Outline an area, with its label as far as there is room; all is told to who points at it."""
        x, y, w, h = place
        title = safe("\n".join(told))
        box = f'x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}"'
        room = int((w - 8) / _LETTER)
        lines = wrapped(label, room, int((h - 4) / 13)) if room >= 4 else []
        text = "".join(
            f'<text class="l" x="{number(x + 4)}" y="{number(y + 13 + 13 * i)}">{safe(line)}</text>'
            for i, line in enumerate(lines)
        )
        self._made.append(f'<g><title>{title}</title><rect class="o" pointer-events="all" {box}/>{text}</g>')

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        """Add colours and what they mean, in columns."""
        widest = max((len(name) for _, name in entries), default=0) * _LETTER + 26
        columns = max(1, int(self.width / widest))
        top = self.take(18 * -(-len(entries) // columns) + 6)
        for i, (colour, name) in enumerate(entries):
            x, y = i % columns * widest, top + 18 * (i // columns)
            self._made.append(
                f'<rect x="{number(x)}" y="{number(y + 3)}" width="12" height="12" rx="2" fill="{colour}"/>'
                f'<text x="{number(x + 17)}" y="{number(y + 13)}">{safe(name)}</text>'
            )

    def text(self, title: str, *, style: str = STYLE) -> str:
        """Return the picture as SVG. style: "" where it is part of a page that has one, and a background."""
        lead = f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>' if style else ""
        height = number(max(1.0, self._bottom))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height}" width="{self.width}" '
            f'height="{height}" role="img"><title>{safe(title)}</title>'
            f"{lead}{''.join(self._made)}</svg>"
        )


def wrapped(label: str, room: int, most: int) -> list[str]:
    """Lines of a dotted name, of at most `room` letters, cut where a dot is; of too many the last ones."""
    lines: list[str] = []
    for part in label.split("."):
        if lines and len(lines[-1]) + 1 + len(part) <= room:
            lines[-1] += f".{part}"
        else:
            lines.append(part)
    kept = lines[-most:] if most > 0 else []
    return [line if len(line) <= room else f"{line[: room - 1]}…" for line in kept]


def spread(count: int) -> list[str]:
    """So many colours that neighbours among them differ, light enough for dark letters."""
    found = []
    for i in range(count):
        lightness = 0.72 if count <= 12 else (0.64, 0.8)[i % 2]
        r, g, b = colorsys.hls_to_rgb((0.58 + i / max(2, count) * (0.92 if count > 2 else 1)) % 1, lightness, 0.62)
        found.append("#" + "".join(f"{round(255 * part):02x}" for part in (r, g, b)))
    return found


def squares(sizes: Sequence[float], within: Place) -> list[Place]:
    """Rectangles of these areas (falling) that fill a place, each as square as can be: a squarified treemap."""
    x, y, w, h = within
    scale = w * h / (sum(sizes) or 1)
    left = [size * scale for size in sizes]
    found: list[Place] = []
    while left:
        side = min(w, h)
        count = 1
        while count < len(left) and _worst(left[: count + 1], side) <= _worst(left[:count], side):
            count += 1
        row, left = left[:count], left[count:]
        thick = sum(row) / side if side else 0.0
        at = 0.0
        for area in row:
            long = area / thick if thick else 0.0
            found.append((x, y + at, thick, long) if w >= h else (x + at, y, long, thick))
            at += long
        if w >= h:
            x, w = x + thick, max(0.0, w - thick)
        else:
            y, h = y + thick, max(0.0, h - thick)
    return found


def _worst(row: Sequence[float], side: float) -> float:
    """How far from a square the longest of a row is."""
    total = sum(row)
    return max(side * side * max(row) / (total * total), total * total / (side * side * min(row))) if side else 0.0
