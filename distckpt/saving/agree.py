"""What the ranks hold, agreed on without a gather.

Each rank describes its state in values that are equal on every rank, and only digests of that travel: 66 bytes a rank
when all agree. Where digests differ (pipeline stages, experts, BatchNorm statistics, per-rank objects), only what is
distinct is exchanged.
"""

from __future__ import annotations

import itertools
import json
import secrets
import struct
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.comm import exchange, together
from distckpt.errors import Mismatch, Unsupported
from distckpt.format.box import Run
from distckpt.format.checksum import DIGEST_SIZE, crc_of, digest
from distckpt.format.partition import Copies, FlatEven, Grid, Split
from distckpt.latest import Latest
from distckpt.saving.description import described, dump, layout_from_json
from distckpt.saving.objects import encoded, of_rank, share
from distckpt.state import Everywhere, Layout, Listed, RankObject, State, as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import torch

    from distckpt.comm import Comm
    from distckpt.format.box import Shape

_Distinct = list[tuple[list[int], dict[str, Any]]]
"""Ranks that describe the same, and what."""
_NONCE = 6
_PLACE = struct.Struct("<QIB")  # step, rank 0's choice of its generation, the rank's flag


@dataclass(frozen=True, slots=True)
class Agreed:
    """One global tensor as all ranks see it. Copies: the ranks' values differ, and each keeps its own."""

    shape: Shape
    dtype: str
    layout: Layout | Listed | Copies


@dataclass(slots=True)
class Agreement:
    """What every rank knows after `agree`. Objects are encoded; `rank_objects` are this rank's own."""

    attempt: str
    tensors: dict[str, Agreed]
    aliases: dict[str, str]
    objects: dict[str, bytes] = field(default_factory=dict)
    rank_objects: dict[str, bytes] = field(default_factory=dict)
    policies: dict[str, str] = field(default_factory=dict)
    generation: int = 1
    flags: list[int] = field(default_factory=list)
    """Of all ranks, by rank; empty where all are 0."""
    key: bytes = b""
    """Same key, same tensors, aliases and policies. Empty where ranks hold unequal copies."""
    notes: list[str] = field(default_factory=list)


class _Merged(NamedTuple):
    """What descriptions say, put together: tensors, aliases, policies of per-rank objects."""

    tensors: dict[str, Agreed]
    aliases: dict[str, str]
    policies: dict[str, str]


_MERGED: Latest[_Merged] = Latest()


@dataclass(slots=True)
class _Own:
    """What this rank contributes. described: JSON."""

    state: State
    described: bytes
    encoded: dict[str, bytes]
    contents: dict[str, int]


def agree(
    comm: Comm,
    capture: Callable[[], State],
    *,
    step: int,
    generation: Callable[[], int],
    flag: Callable[[], int] = lambda: 0,
    check_replicas: bool = False,
) -> tuple[State, Agreement]:
    """Capture the state on every rank and agree on what it is, and that it is of this step.

    `generation` is asked on rank 0 only, `flag` on each rank after its capture: all learn all flags (0 to 255). Raises
    on every rank what capture raises on any; Mismatch where ranks contradict each other, with the fqns.
    """
    own: _Own | None = None

    def describe() -> bytes:
        nonlocal own
        state = capture()
        own = _Own(state, described(state), encoded(state), _contents(state) if comm.world_size > 1 else {})
        shared = dump({k: digest(v) for k, v in own.encoded.items() if k not in of_rank(state)})
        digests = b"".join(bytes.fromhex(digest(part)) for part in (own.described, shared, dump(own.contents)))
        first = comm.rank == 0  # it alone names the attempt: what the others say is the same, as a rule
        nonce, chosen = (secrets.token_bytes(_NONCE), generation()) if first else (bytes(_NONCE), 0)
        return nonce + digests + _PLACE.pack(step, chosen, flag())

    replies = together(comm, "describing the state", describe)
    assert own is not None
    cuts = [(_NONCE + i * DIGEST_SIZE, _NONCE + (i + 1) * DIGEST_SIZE) for i in range(3)]
    different = {reply[_NONCE:] for reply in set(replies)}  # few, however many ranks there are
    same = [len({said[a - _NONCE : b - _NONCE] for said in different}) == 1 for a, b in cuts]
    if len({said[-_PLACE.size :][:8] for said in different}) > 1:
        raise _other_steps(replies)
    (_, chosen, _) = _PLACE.unpack(replies[0][-_PLACE.size :])
    agreement = Agreement(replies[0][:_NONCE].hex(), {}, {}, generation=chosen)
    agreement.flags = [reply[-1] for reply in replies] if any(said[-1] for said in different) else []
    cut = slice(*cuts[0])
    distinct: _Distinct = []
    if same[0]:
        key = replies[0][cut] + comm.world_size.to_bytes(4, "little")
        merged = _MERGED.get(key, lambda: _uniform(own.state, comm.world_size))
    else:
        distinct = _distinct(comm, replies, cut, own.described)
        key = digest(b"".join(reply[cut] for reply in replies)).encode()
        merged = _MERGED.get(key, lambda: _merged(distinct))
    agreement.key = key if same[2] else b""
    agreement.tensors = dict(merged.tensors)  # its own: what ranks hold unequal copies of is changed below
    agreement.aliases, agreement.policies = merged.aliases, merged.policies
    if same[1]:
        agreement.objects = {n: v for n, v in own.encoded.items() if n not in agreement.policies}
    else:
        agreement.objects = share(comm, own.state, own.encoded, agreement.policies, agreement.notes)
    agreement.rank_objects = {n: v for n, v in own.encoded.items() if n in agreement.policies}
    if not same[2]:
        distinct = distinct or [(list(range(comm.world_size)), json.loads(own.described))]
        _tell_copies(comm, agreement, own, distinct)
    if check_replicas:
        _check_replicas(comm, own.state)
    return own.state, agreement


def _other_steps(replies: Sequence[bytes]) -> Mismatch:
    places = [_PLACE.unpack(reply[-_PLACE.size :]) for reply in replies[:16]]
    told = ", ".join(f"rank {rank}: {at}" for rank, (at, *_) in enumerate(places))
    return Mismatch(f"ranks save different steps ({told}): call save on every rank at the same step")


# -- descriptions ----------------------------------------------------------------------------------------------


def _uniform(state: State, world_size: int) -> _Merged:
    """What is agreed on where every rank describes the same."""
    whole = (Split(world_size, 1),) if world_size > 1 else ()
    tensors = {
        fqn: Agreed(
            t.shape,
            t.dtype,
            Layout(Grid(t.shape, ((),) * len(t.shape), 0), whole) if isinstance(t.layout, Everywhere) else t.layout,
        )
        for fqn, t in sorted(state.tensors.items())
    }
    policies = {n: v.on_reshard for n, v in state.objects.items() if isinstance(v, RankObject)}
    return _Merged(tensors, dict(state.aliases), policies)


def _steps(ranks: Sequence[int]) -> Split | None:
    """Return sorted ranks as a stride, None where they are in no such order."""
    stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    return Split(len(ranks), stride) if list(ranks) == [ranks[0] + i * stride for i in range(len(ranks))] else None


def _distinct(comm: Comm, replies: Sequence[bytes], cut: slice, mine: bytes) -> _Distinct:
    """(ranks, description) of each distinct description; the first rank that has one sends it."""
    ranks: dict[bytes, list[int]] = {}
    for rank, reply in enumerate(replies):
        ranks.setdefault(reply[cut], []).append(rank)
    speaks = any(comm.rank == holders[0] for holders in ranks.values())
    sent = exchange(comm, "exchanging distinct descriptions", mine if speaks else b"")
    return [(holders, json.loads(sent[holders[0]])) for holders in ranks.values()]


def _merged(distinct: _Distinct) -> _Merged:
    """Union of the descriptions. Ranks that both describe a tensor must say the same, or be replicas of it."""
    tensors, aliases, policies = _Merged({}, {}, {})
    holders: dict[str, list[tuple[list[int], list[Any]]]] = {}
    for ranks, description in distinct:
        for fqn, said in description["tensors"].items():
            holders.setdefault(fqn, []).append((ranks, said))
        aliases.update(description["aliases"])
        policies.update({n: p for n, p in description["objects"].items() if p is not None})
    problems = []
    world_size = sum(len(ranks) for ranks, _ in distinct)
    groups: dict[tuple[int, ...], list[int]] = {}
    steps: dict[tuple[int, ...], Split | None] = {}
    for fqn, said_by in sorted(holders.items()):
        versions = _opinions(said_by, world_size)
        if not versions:
            continue
        shape, dtype, layout, _ = versions[0][1]
        if len({dump(_placeless(said)) for _, said in versions}) > 1:
            told = "; ".join(
                f"rank {ranks[0]}: {said[1]}{said[0]} {dump(said[2]).decode()}" for ranks, said in versions[:4]
            )
            problems.append(f"{fqn}: ranks describe it differently ({told[:600]})")
            continue
        key = tuple(holding[0] for holding, _ in versions)
        if key not in groups:
            groups[key] = sorted(r for holding, _ in versions for r in holding)
            steps[key] = _steps(groups[key])
        ranks = groups[key]
        layouts = [layout_from_json(said[2], tuple(shape), ranks[0], steps[key]) for _, said in versions]
        if len(ranks) < world_size:
            layouts = [_held(found, frozenset(ranks)) for found in layouts]
        tensors[fqn] = Agreed(tuple(shape), dtype, min(layouts, key=_first_rank) if layout else layouts[0])
    if taken := aliases.keys() & tensors.keys():
        problems.append(f"{min(taken)}: tied to another parameter on some ranks only")
    if problems:
        raise Mismatch("ranks hold states that contradict each other:\n" + "\n".join(problems))
    return _Merged(tensors, aliases, policies)


def _opinions(said_by: list[tuple[list[int], list[Any]]], world_size: int) -> list[tuple[list[int], list[Any]]]:
    """Descriptions of a tensor that count: by groups in which a rank, as they say, holds a part of it.

    The others can but guess, from other tensors, whether it is there at all, and in which dtype.
    """
    if len(said_by) == 1 and len(said_by[0][0]) == world_size:
        return said_by
    return [
        (ranks, said)
        for ranks, said in said_by
        if said[2] is None
        or not prod(said[0])  # without elements nobody holds a part of it, and all have it
        or not _ranks_of(layout_from_json(said[2], tuple(said[0]), ranks[0], None)).isdisjoint(ranks)
    ]


def _ranks_of(layout: Layout | Listed) -> set[int]:
    """Ranks that hold a part of a tensor."""
    if isinstance(layout, Listed):
        return {rank for rank, _ in layout.pieces.pieces}
    held = layout.held
    if isinstance(held, FlatEven):
        cells = [rank for rank, _ in held.overlapping(Run(0, prod(held.shape)))]
    else:
        cells = [held.first + sum(at) for at in _combined(s for splits in held.splits for s in splits)]
    return {cell + sum(at) for cell in cells for at in _combined(layout.replicas)}


def _combined(splits: Iterable[Split]) -> Iterator[tuple[int, ...]]:
    """Rank offsets of every combination of chunks."""
    return itertools.product(*(_offsets(s) for s in splits))


def _held(layout: Layout | Listed, ranks: frozenset[int]) -> Layout | Listed:
    """Layout without the replicas that would lie on ranks which do not have the tensor at all.

    A mesh leaves out dimensions of its root mesh. Along some of them (data) ranks hold the same, along others
    (pipeline stages) different tensors: which it is, only the descriptions of all ranks together tell.
    """
    if not isinstance(layout, Layout) or not layout.replicas or isinstance(layout.held, FlatEven):
        return layout
    grid, replicas = layout.held, layout.replicas
    cells = [sum(at) for at in _combined(s for splits in grid.splits for s in splits)]
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
    """Description of a tensor without where its first rank is: sub-meshes that hold replicas differ in that alone."""
    shape, dtype, layout, trusted = said
    if isinstance(layout, list):
        layout = [{k: v for k, v in layout[0].items() if k != "file"}, layout[1]]
    elif isinstance(layout, dict):
        layout = [piece[1:] for piece in layout["pieces"]]
    return [shape, dtype, layout, trusted]


def _first_rank(layout: Layout | Listed) -> int:
    return layout.held.first if isinstance(layout, Layout) else min((r for r, _ in layout.pieces.pieces), default=0)


# -- replicas that are not equal by construction ------------------------------------------------------------------


def _content(tensor: torch.Tensor) -> int:
    return crc_of([as_bytes(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())])


def _contents(state: State) -> dict[str, int]:
    """CRC-32C of each tensor whose replicas are not equal by construction."""
    return {
        fqn: _content(t.shards[0].tensor)
        for fqn, t in state.tensors.items()
        if not t.trusted and isinstance(t.layout, Everywhere)
    }


def _tell_copies(comm: Comm, agreement: Agreement, own: _Own, distinct: _Distinct) -> None:
    told = [json.loads(reply) for reply in exchange(comm, "comparing buffers", dump(own.contents))]
    values: dict[str, set[int]] = {}
    for said in told:
        for fqn, value in said.items():
            values.setdefault(fqn, set()).add(value)
    for fqn in sorted(f for f, v in values.items() if len(v) > 1):
        ranks = sorted(r for holders, description in distinct if fqn in description["tensors"] for r in holders)
        steps = _steps(ranks)
        if steps is None:
            raise Unsupported(f"{fqn}: its copies on ranks {ranks} differ, and those ranks have no regular order")
        agreed = agreement.tensors[fqn]
        agreement.tensors[fqn] = Agreed(
            agreed.shape, agreed.dtype, Copies(agreed.shape, ranks[0], steps.count, steps.stride)
        )
        agreement.notes.append(f"{fqn} differs between ranks: each keeps its own")


def _check_replicas(comm: Comm, state: State) -> None:
    """Mismatch unless every region that several ranks hold has the same bytes on each."""
    mine = {
        f"{fqn} {shard.region}": _content(shard.tensor)
        for fqn, t in state.tensors.items()
        if t.trusted
        for shard in t.shards
    }
    seen: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    for rank, reply in enumerate(exchange(comm, "comparing replicas", dump(mine))):
        for region, value in json.loads(reply).items():
            first, known = seen.setdefault(region, (rank, value))
            if known != value:
                problems.append(f"{region}: rank {rank} differs from rank {first}")
    if problems:
        raise Mismatch(_listed("replicas that should be equal differ", problems))


def _listed(what: str, problems: Iterable[str]) -> str:
    lines = list(problems)
    return "\n".join([what + ":", *lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])])
