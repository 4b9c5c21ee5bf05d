"""A picture of which rank wrote which part of a checkpoint, as SVG. Pure: made of a manifest alone.

Each part of the state (model, optimizer) is a treemap: a tensor's area is its bytes, and inside it lies what each rank
wrote, where that lies in the tensor: its first dimension runs down, its last cut one to the right. Where there are too
many tensors to see, those with a common beginning of their names are one area, and show only how much each rank wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, prod
from typing import TYPE_CHECKING, NamedTuple

from distckpt.format.box import Box, Run
from distckpt.format.dtype import item_size
from distckpt.format.partition import Copies
from distckpt.tools.svg import STYLE, Svg, spread, squares
from distckpt.units import size_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.format.box import Region
    from distckpt.format.manifest import Manifest, TensorInfo
    from distckpt.tools.svg import Place

MOST_COLOURS, _MOST_PIECES = 64, 256
_FEW = 12
"""Areas that are too few to tell anything."""
_EARLIER = -1
"""Stands for what lies in files of earlier steps."""
_GREY = "#b8bcc4"


class Piece(NamedTuple):
    """What one colour covers of an area, each side as a fraction of the area's."""

    colour: int
    place: Place


@dataclass(slots=True)
class Area:
    """One tensor; or several, of a common beginning of their names."""

    name: str
    nbytes: int = 0
    count: int = 0
    detail: str = ""
    by_colour: dict[int, int] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def add(self, nbytes: int, held: Mapping[int, int]) -> None:
        """Add a tensor, and the bytes of it that each colour holds."""
        self.nbytes += nbytes
        self.count += 1
        for colour, n in held.items():
            self.by_colour[colour] = self.by_colour.get(colour, 0) + n


class Colours:
    """Which colour a file has: that of its rank, or of some ranks where there are more than can be told apart."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.each = world_size, ceil(world_size / MOST_COLOURS)
        self._hues = spread(ceil(world_size / self.each))

    def of_file(self, file: int) -> int:
        """Colour of the rank that wrote a file."""
        return file // self.each if file < self.world_size else _EARLIER

    def fill(self, colour: int) -> str:
        """Colour as SVG has it."""
        return _GREY if colour == _EARLIER else self._hues[colour]

    def name(self, colour: int) -> str:
        """Name in the legend."""
        if colour == _EARLIER:
            return "earlier step"
        first, last = colour * self.each, min((colour + 1) * self.each, self.world_size) - 1
        return f"rank {first}" if first == last else f"ranks {first}-{last}"


def shard_map(content: Manifest, *, width: int = 1200, style: str = STYLE) -> str:
    """SVG of so many pixels in width. style: "" in a page that has one."""
    colours = Colours(content.world_size)
    parts: dict[str, dict[str, TensorInfo]] = {}
    for fqn, info in content.tensors.items():
        parts.setdefault(fqn.partition(".")[0], {})[fqn] = info
    held = _Held(colours)
    areas = {name: _areas(tensors, held, width // 10) for name, tensors in parts.items()}
    sizes = {name: sum(a.nbytes for a in of_part) for name, of_part in areas.items()}
    total = sum(sizes.values())
    svg = Svg(width)
    ranks = "1 rank" if content.world_size == 1 else f"{content.world_size} ranks"
    svg.line(f"{len(content.tensors)} tensors, {size_text(total)}, written by {ranks}", bold=True)
    _legend(svg, colours, areas.values())
    room = 560 if width > 600 else 640
    for name, of_part in areas.items():
        height = max(90.0, room * sizes[name] / max(1, total))
        alike = len(of_part) < len(parts[name])
        more = ", grouped by name" if alike else ""
        svg.line(f"{name or '(no name)'}: {len(parts[name])} tensors, {size_text(sizes[name])}{more}")
        _treemap(svg, of_part, height, colours)
    return svg.text(f"Which rank wrote which part of step {content.step}", style=style)


class _Held:
    """What each colour holds of a tensor; tensors that are alike, of which there are many, are worked out once."""

    def __init__(self, colours: Colours) -> None:
        self._colours = colours
        self._known: dict[TensorInfo, tuple[list[tuple[int, Region]], dict[int, int]]] = {}

    def of(self, info: TensorInfo) -> tuple[list[tuple[int, Region]], dict[int, int]]:
        """(colour, region) of each chunk; and bytes of each colour."""
        if info not in self._known:
            chunks = [(self._colours.of_file(file), region) for file, region in _chunks(info)]
            sums: dict[int, int] = {}
            for colour, region in chunks:
                sums[colour] = sums.get(colour, 0) + region.numel * item_size(info.dtype)
            self._known[info] = chunks, sums
        return self._known[info]


def _chunks(info: TensorInfo) -> Iterable[tuple[int, Region]]:
    partition, whole = info.partition, Box.whole(info.shape)
    if isinstance(partition, Copies):
        return [(partition.first + i * partition.stride, whole) for i in range(partition.count)]
    return partition.overlapping(whole)


def _areas(tensors: Mapping[str, TensorInfo], held: _Held, most: int) -> list[Area]:
    """At most so many areas and one more, the largest first."""
    names = _names(list(tensors), most)
    found: dict[str, Area] = {}
    for fqn, info in tensors.items():
        area = found.setdefault(names[fqn], Area(names[fqn]))
        chunks, sums = held.of(info)
        area.add(sum(sums.values()), sums)
        area.detail = f"{list(info.shape)} {info.dtype}"
        area.pieces = [] if area.count > 1 or len(chunks) > _MOST_PIECES else _pieces(info, chunks)
    largest = sorted((a for a in found.values() if a.nbytes), key=lambda a: -a.nbytes)
    rest = largest[most:]
    if rest:
        largest[most:] = [joined := Area(f"{sum(a.count for a in rest)} others")]
        for area in rest:
            joined.add(area.nbytes, area.by_colour)
        joined.count = sum(a.count for a in rest)
    for area in largest:
        area.detail = area.detail if area.count == 1 else f"{area.count} tensors"
    return sorted(largest, key=lambda a: (-a.nbytes, _natural(a.name)))


def _names(fqns: list[str], most: int) -> dict[str, str]:
    """What each tensor's area is called: itself, or a beginning that it has in common with others."""
    deepest = max((fqn.count(".") for fqn in fqns), default=0) + 1
    for depth in range(deepest, 0, -1):
        names = {fqn: ".".join(fqn.split(".")[:depth]) for fqn in fqns}
        if len(known := set(names.values())) <= most:
            deeper = {fqn: ".".join(fqn.split(".")[: depth + 1]) for fqn in fqns}
            return names if len(known) > _FEW or depth == deepest else _neighbours(names, deeper, most)
    return names


def _neighbours(names: Mapping[str, str], deeper: Mapping[str, str], most: int) -> dict[str, str]:
    """Names where few areas would be left: as many neighbours of those one level deeper as make not too many."""
    children: dict[str, dict[str, None]] = {}
    for fqn, name in deeper.items():
        children.setdefault(names[fqn], {})[name] = None
    step = ceil(len(set(deeper.values())) / most)
    found: dict[str, str] = {}
    for lead, several in children.items():
        ordered = sorted(several, key=_natural)
        for i in range(0, len(ordered), step):
            joined = ordered[i : i + step]
            last = joined[-1].removeprefix(f"{lead}.")
            found |= dict.fromkeys(joined, joined[0] if len(joined) == 1 else f"{joined[0]}-{last}")
    return {fqn: found[name] for fqn, name in deeper.items()}


def _natural(name: str) -> list[tuple[int, str]]:
    """Order of names in which 10 follows 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _pieces(info: TensorInfo, chunks: list[tuple[int, Region]]) -> list[Piece]:
    """Where chunks lie in the unit square."""
    shape = info.shape
    if isinstance(info.partition, Copies):
        part = 1 / len(chunks)
        return [Piece(c, (i * part, 0.0, part, 1.0)) for i, (c, _) in enumerate(chunks)]
    boxes = [region for _, region in chunks if isinstance(region, Box)]
    cut = [d for d in range(1, len(shape)) if any(box.sizes[d] != shape[d] for box in boxes)]
    across = cut[-1] if cut else None
    found = []
    for colour, region in chunks:
        if isinstance(region, Run):
            numel = max(1, prod(shape))
            low, size = region.start / numel, (region.stop - region.start) / numel
            found.append(Piece(colour, (low, 0.0, size, 1.0) if len(shape) < 2 else (0.0, low, 1.0, size)))
            continue
        first = _side(region, shape, 0) if shape else (0.0, 1.0)
        if len(shape) < 2:
            found.append(Piece(colour, (first[0], 0.0, first[1], 1.0)))
        else:
            x = (0.0, 1.0) if across is None else _side(region, shape, across)
            found.append(Piece(colour, (x[0], first[0], x[1], first[1])))
    return found


def _side(box: Box, shape: tuple[int, ...], d: int) -> tuple[float, float]:
    return box.offsets[d] / max(1, shape[d]), box.sizes[d] / max(1, shape[d])


def _stripes(area: Area) -> list[Piece]:
    """How much each colour holds, side by side."""
    held = sorted(area.by_colour.items())
    starts = accumulate((n for _, n in held), initial=0)
    return [
        Piece(c, (start / area.nbytes, 0.0, n / area.nbytes, 1.0)) for (c, n), start in zip(held, starts, strict=False)
    ]


def _treemap(svg: Svg, areas: list[Area], height: float, colours: Colours) -> None:
    top = svg.take(height)
    places = squares([a.nbytes for a in areas], (0.0, top, float(svg.width), height - 6))
    by_colour: dict[int, list[Place]] = {}
    for area, (x, y, w, h) in zip(areas, places, strict=True):
        for colour, (px, py, pw, ph) in area.pieces or _stripes(area):
            by_colour.setdefault(colour, []).append((x + px * w, y + py * h, pw * w, ph * h))
    for colour, covered in sorted(by_colour.items()):
        svg.fill(colours.fill(colour), covered)
    for area, place in zip(areas, places, strict=True):
        held = sorted(area.by_colour.items(), key=lambda item: -item[1])
        told = [f"{colours.name(c)}: {size_text(n)}" for c, n in held[:6]]
        told += [f"and {len(held) - 6} more"] if len(held) > 6 else []
        label = area.name.partition(".")[2].removesuffix(".weight") or area.name
        svg.area(place, label, [area.name, f"{area.detail}, {size_text(area.nbytes)}", *told])


def _legend(svg: Svg, colours: Colours, parts: Iterable[list[Area]]) -> None:
    """Each colour, and the bytes of it."""
    sums: dict[int, int] = {}
    for area in (area for of_part in parts for area in of_part):
        for colour, n in area.by_colour.items():
            sums[colour] = sums.get(colour, 0) + n
    sizes = set(sums.values())
    if len(sizes) == 1 and len(sums) > 1:
        svg.line(f"{size_text(sizes.pop())} each:")
        svg.legend([(colours.fill(c), colours.name(c)) for c in sorted(sums)])
        return
    svg.legend([(colours.fill(c), f"{colours.name(c)}: {size_text(n)}") for c, n in sorted(sums.items())])
