"""What the ranks hold, agreed on without a gather.

Each rank describes its state in values that are equal on every rank, and only digests of that travel: 75 bytes a rank
when all agree. Where digests differ (pipeline stages, experts, BatchNorm statistics, per-rank objects), only what is
distinct is exchanged.
"""

from __future__ import annotations

import itertools
import json
import secrets
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distckpt.comm import exchange, together
from distckpt.errors import Mismatch, Unsupported
from distckpt.format.checksum import DIGEST_SIZE, digest
from distckpt.format.partition import Copies
from distckpt.latest import Latest
from distckpt.saving.description import described, dump
from distckpt.saving.merge import Agreed, Distinct, Merged, merged, steps_of, uniform
from distckpt.saving.objects import encoded, of_rank, share
from distckpt.state import Everywhere, State, content_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from distckpt.comm import Comm

_NONCE = 6
_PLACE = struct.Struct("<QQIB")  # step, bytes free, rank 0's choice of its generation, the rank's flag
_UNKNOWN = (1 << 64) - 1


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
    rooms: tuple[int | None, int | None] = None, None
    """What rank 0 said of its room, and what this rank did."""
    key: bytes = b""
    """Same key, same tensors, aliases and policies. Empty where ranks hold unequal copies."""
    notes: list[str] = field(default_factory=list)


MERGED: Latest[Merged] = Latest()
"""What was put together for the latest descriptions: ranks hold the same from save to save."""


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
    flag: Callable[[State], int] = lambda _: 0,
    room: Callable[[], int | None] = lambda: None,
    check_replicas: bool = False,
) -> tuple[State, Agreement]:
    """Capture the state on every rank and agree on what it is, and that it is of this step.

    `generation` is asked on rank 0 only, `flag` on each rank after its capture: all learn all flags (0 to 255). `room`
    is asked on each rank before any learns of the others': all learn rank 0's. Raises on every rank what capture raises
    on any; Mismatch where ranks contradict each other, with the fqns.
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
        free = room()
        return nonce + digests + _PLACE.pack(step, _UNKNOWN if free is None else free, chosen, flag(state))

    replies = together(comm, "describing the state", describe)
    assert own is not None
    cuts = [(_NONCE + i * DIGEST_SIZE, _NONCE + (i + 1) * DIGEST_SIZE) for i in range(3)]
    different = {reply[_NONCE:] for reply in set(replies)}  # few, however many ranks there are
    same = [len({said[a - _NONCE : b - _NONCE] for said in different}) == 1 for a, b in cuts]
    if len({said[-_PLACE.size :][:8] for said in different}) > 1:
        raise _other_steps(replies)
    first, mine = (_PLACE.unpack(replies[rank][-_PLACE.size :]) for rank in (0, comm.rank))
    agreement = Agreement(replies[0][:_NONCE].hex(), {}, {}, generation=first[2])
    agreement.rooms = _room(first[1]), _room(mine[1])
    agreement.flags = [reply[-1] for reply in replies] if any(said[-1] for said in different) else []
    cut = slice(*cuts[0])
    distinct: Distinct = []
    if same[0]:
        key = replies[0][cut] + comm.world_size.to_bytes(4, "little")
        view = MERGED.get(key, lambda: uniform(own.state, comm.world_size))
    else:
        runs = _runs(replies, cut)
        distinct = _distinct(comm, runs, own.described)
        key = digest(b"".join(said + count.to_bytes(4, "little") for said, count in runs)).encode()
        view = MERGED.get(key, lambda: merged(distinct))
    agreement.key = key if same[2] else b""
    agreement.tensors = dict(view.tensors)  # its own: what ranks hold unequal copies of is changed below
    agreement.aliases, agreement.policies = view.aliases, view.policies
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


def _room(said: int) -> int | None:
    return None if said == _UNKNOWN else said


def _other_steps(replies: Sequence[bytes]) -> Mismatch:
    places = [_PLACE.unpack(reply[-_PLACE.size :]) for reply in replies[:16]]
    told = ", ".join(f"rank {rank}: {at}" for rank, (at, *_) in enumerate(places))
    return Mismatch(f"ranks save different steps ({told}): call save on every rank at the same step")


def _runs(replies: Sequence[bytes], cut: slice) -> list[tuple[bytes, int]]:
    """(what ranks say there, how many of them in a row): few, however many ranks there are."""
    return [(said[cut], len(list(run))) for said, run in itertools.groupby(replies)]


def _distinct(comm: Comm, runs: Sequence[tuple[bytes, int]], mine: bytes) -> Distinct:
    """(ranks, description) of each distinct description; the first rank that has one sends it."""
    ranks: dict[bytes, list[int]] = {}
    first = 0
    for said, count in runs:
        ranks.setdefault(said, []).extend(range(first, first + count))
        first += count
    speaks = any(comm.rank == holders[0] for holders in ranks.values())
    sent = exchange(comm, "exchanging distinct descriptions", mine if speaks else b"")
    return [(holders, json.loads(sent[holders[0]])) for holders in ranks.values()]


# -- replicas that are not equal by construction ------------------------------------------------------------------


def _contents(state: State) -> dict[str, int]:
    """CRC-32C of each tensor whose replicas are not equal by construction."""
    return {
        fqn: content_of(t.shards[0].tensor)
        for fqn, t in state.tensors.items()
        if not t.trusted and isinstance(t.layout, Everywhere)
    }


def _tell_copies(comm: Comm, agreement: Agreement, own: _Own, distinct: Distinct) -> None:
    told = [json.loads(reply) for reply in exchange(comm, "comparing buffers", dump(own.contents))]
    values: dict[str, set[int]] = {}
    for said in told:
        for fqn, value in said.items():
            values.setdefault(fqn, set()).add(value)
    for fqn in sorted(f for f, v in values.items() if len(v) > 1):
        ranks = sorted(r for holders, description in distinct if fqn in description["tensors"] for r in holders)
        steps = steps_of(ranks)
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
        f"{fqn} {shard.region}": content_of(shard.tensor)
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
