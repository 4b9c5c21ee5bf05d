"""One view of all tensors, put together of what ranks describe: alike, or apart (pipeline stages, experts).

Pure: the same descriptions give the same on every rank. Tensors that are described alike are worked out once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.errors import Mismatch
from distckpt.format.box import Run
from distckpt.format.partition import Copies, FlatEven, Grid, Split
from distckpt.saving.description import dump, layout_from_json
from distckpt.state import Everywhere, Layout, Listed, RankObject, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distckpt.format.box import Shape

Distinct = list[tuple[list[int], dict[str, Any]]]
"""Ranks that describe the same, and what."""


@dataclass(frozen=True, slots=True)
class Agreed:
    """One global tensor as all ranks see it. Copies: the ranks' values differ, and each keeps its own.

    frozen: a parameter that no rank trains.
    """

    shape: Shape
    dtype: str
    layout: Layout | Listed | Copies
    frozen: bool = False


class Merged(NamedTuple):
    """What descriptions say, put together: tensors, aliases, policies of per-rank objects."""

    tensors: dict[str, Agreed]
    aliases: dict[str, str]
    policies: dict[str, str]


def uniform(state: State, world_size: int) -> Merged:
    """What is agreed on where every rank describes the same."""
    whole = (Split(world_size, 1),) if world_size > 1 else ()
    tensors = {
        fqn: Agreed(
            t.shape,
            t.dtype,
            Layout(Grid(t.shape, ((),) * len(t.shape), 0), whole) if isinstance(t.layout, Everywhere) else t.layout,
            t.frozen,
        )
        for fqn, t in sorted(state.tensors.items())
    }
    policies = {n: v.on_reshard for n, v in state.objects.items() if isinstance(v, RankObject)}
    return Merged(tensors, dict(state.aliases), policies)


def steps_of(ranks: Sequence[int]) -> Split | None:
    """Return sorted ranks as a stride, None where they are in no such order."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return Split(len(ranks), stride) if list(ranks) == [ranks[0] + i * stride for i in range(len(ranks))] else None


def merged(distinct: Distinct) -> Merged:
    """Union of the descriptions. Ranks that both describe a tensor must say the same, or be replicas of it."""
    tensors, aliases, policies = Merged({}, {}, {})
    holders: dict[str, list[tuple[int, list[Any]]]] = {}
    for group, (_, description) in enumerate(distinct):
        for fqn, said in description["tensors"].items():
            holders.setdefault(fqn, []).append((group, said))
        aliases.update(description["aliases"])
        policies.update({n: p for n, p in description["objects"].items() if p is not None})
    problems = []
    groups = _Groups(distinct)
    known: dict[str, Agreed | str | None] = {}  # a model has few kinds of tensors, each for many
    for fqn, said_by in sorted(holders.items()):
        if (kind := repr(said_by)) not in known:
            known[kind] = _agreed(said_by, groups)
        found = known[kind]
        if isinstance(found, str):
            problems.append(f"{fqn}: {found}")
        elif found:
            tensors[fqn] = found
    if taken := aliases.keys() & tensors.keys():
        problems.append(f"{min(taken)}: tied to another parameter on some ranks only")
    if problems:
        raise Mismatch("ranks hold states that contradict each other:\n" + "\n".join(problems))
    return Merged(tensors, aliases, policies)


class _Groups:
    """Groups of ranks that describe the same, and unions of them."""

    def __init__(self, distinct: Distinct) -> None:
        self.of = [ranks for ranks, _ in distinct]
        self.world_size = sum(map(len, self.of))
        self._unions: dict[tuple[int, ...], _Union] = {}

    def union(self, *groups: int) -> _Union:
        """Ranks of these groups."""
        if groups not in self._unions:
            ranks = sorted(itertools.chain.from_iterable(self.of[g] for g in groups))
            self._unions[groups] = _Union(ranks[0], frozenset(ranks), steps_of(ranks))
        return self._unions[groups]


class _Union(NamedTuple):
    """Some ranks: the first, all, and their stride if they are in such an order."""

    first: int
    ranks: frozenset[int]
    steps: Split | None


def _agreed(said_by: list[tuple[int, list[Any]]], groups: _Groups) -> Agreed | str | None:
    """One tensor as these groups describe it; what is wrong; None if no group holds a part of it."""
    versions = _opinions(said_by, groups)
    if not versions:
        return None
    shape, dtype, layout, *_ = versions[0][1]
    frozen = all(said[4] for _, said in versions)
    if len({dump(_placeless(said)) for _, said in versions}) > 1:
        told = "; ".join(
            f"rank {groups.of[group][0]}: {said[1]}{said[0]} {dump(said[2]).decode()}" for group, said in versions[:4]
        )
        return f"ranks describe it differently ({told[:600]})"
    union = groups.union(*(group for group, _ in versions))
    layouts = [layout_from_json(said[2], tuple(shape), union.first, union.steps) for _, said in versions]
    if len(union.ranks) < groups.world_size:
        layouts = [_held(found, union.ranks) for found in layouts]
    return Agreed(tuple(shape), dtype, min(layouts, key=_first_rank) if layout else layouts[0], frozen)


def _opinions(said_by: list[tuple[int, list[Any]]], groups: _Groups) -> list[tuple[int, list[Any]]]:
    """Descriptions of a tensor that count: by groups in which a rank, as they say, holds a part of it.

    The others can but guess, from other tensors, whether it is there at all, and in which dtype.
    """
    if len(said_by) == 1 and len(groups.of[said_by[0][0]]) == groups.world_size:
        return said_by
    return [
        (group, said)
        for group, said in said_by
        if said[2] is None
        or not prod(said[0])  # without elements nobody holds a part of it, and all have it
        or _one_of(groups.union(group), layout_from_json(said[2], tuple(said[0]), 0, None))
    ]


def _one_of(union: _Union, layout: Layout | Listed) -> bool:
    """Whether one of these ranks holds a part of a tensor."""
    return any(rank in union.ranks for rank in _ranks_of(layout))


def _ranks_of(layout: Layout | Listed) -> Iterator[int]:
    """Yield the ranks that hold a part of a tensor; some more than once."""
    if isinstance(layout, Listed):
        yield from (rank for rank, _ in layout.pieces.pieces)
    elif isinstance(layout.held, FlatEven):
        for rank, _ in layout.held.overlapping(Run(0, prod(layout.held.shape))):
            yield from _reached(rank, layout.replicas)
    else:
        splits = itertools.chain(*layout.held.splits, layout.replicas)
        yield from _reached(layout.held.first, tuple(splits))


def _reached(first: int, splits: tuple[Split, ...]) -> Iterator[int]:
    """Yield the ranks of every combination of chunks; one by one, for the first few often tell enough."""
    if not splits:
        yield first
        return
    for offset in _offsets(splits[0]):
        yield from _reached(first + offset, splits[1:])


def _held(layout: Layout | Listed, ranks: frozenset[int]) -> Layout | Listed:
    """Layout without the replicas that would lie on ranks which do not have the tensor at all.

    A mesh leaves out dimensions of its root mesh. Along some of them (data) ranks hold the same, along others
    (pipeline stages) different tensors: which it is, only the descriptions of all ranks together tell.
    """
    if not isinstance(layout, Layout) or not layout.replicas or isinstance(layout.held, FlatEven):
        return layout
    grid, replicas = layout.held, layout.replicas
    cells = list(_reached(0, tuple(itertools.chain(*grid.splits))))
    kept = {
        index
        for index in itertools.product(*(range(s.count) for s in replicas))
        if ranks.issuperset(
            grid.first + sum(i * s.stride for i, s in zip(index, replicas, strict=True)) + cell for cell in cells
        )
    }
    if not kept or len(kept) == prod(s.count for s in replicas):
        return layout
    first = min(kept)
    common: list[int] = []
    for d, split in enumerate(replicas):
        wanted = [range(s.count) if k in (*common, d) else [first[k]] for k, s in enumerate(replicas)]
        if split.count > 1 and kept.issuperset(itertools.product(*wanted)):
            common.append(d)
    start = grid.first + sum(i * s.stride for i, s in zip(first, replicas, strict=True))
    return Layout(Grid(grid.shape, grid.splits, start), tuple(replicas[d] for d in common))


def _offsets(split: Split) -> range:
    return range(0, split.count * max(1, split.stride), max(1, split.stride))


def _placeless(said: list[Any]) -> list[Any]:
    """Description of a tensor without where its first rank is: sub-meshes that hold replicas differ in that alone.

    And without whether it is frozen: it is where all say so.
    """
    shape, dtype, layout, trusted, _ = said
    if isinstance(layout, list):
        layout = [{k: v for k, v in layout[0].items() if k != "file"}, layout[1]]
    elif isinstance(layout, dict):
        layout = [piece[1:] for piece in layout["pieces"]]
    return [shape, dtype, layout, trusted]


def _first_rank(layout: Layout | Listed) -> int:
    return layout.held.first if isinstance(layout, Layout) else min((r for r, _ in layout.pieces.pieces), default=0)
