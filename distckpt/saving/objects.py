"""Objects that the ranks agree on: one for all, one of which each rank knows a part, or one of each rank.

Only digests travel while all ranks say the same.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distckpt.comm import exchange
from distckpt.format import objects
from distckpt.format.checksum import digest
from distckpt.saving.description import dump
from distckpt.state import JoinedObject, RankObject, State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.comm import Comm


def of_rank(state: State) -> set[str]:
    """Names of the objects that each rank has its own of."""
    return {name for name, value in state.objects.items() if isinstance(value, RankObject)}


def encoded(state: State) -> dict[str, bytes]:
    """Every object as tagged JSON. Unsupported, with the path, for a value that the format has not."""
    return {
        name: objects.encode(value.value if isinstance(value, (RankObject, JoinedObject)) else value, name)
        for name, value in state.objects.items()
    }


def share(
    comm: Comm, state: State, mine: Mapping[str, bytes], policies: dict[str, str], notes: list[str]
) -> dict[str, bytes]:
    """Objects that are one for all ranks, where not all ranks say the same: collective.

    What ranks cannot agree on each keeps: it is entered in `policies`, with a note.
    """
    shared = {n: v for n, v in mine.items() if n not in policies}
    digests = dump({name: digest(v) for name, v in shared.items()})
    told = [json.loads(reply) for reply in exchange(comm, "comparing objects", digests)]
    differing = sorted(name for name in set().union(*told) if len({said.get(name) for said in told}) > 1)
    joined, contradicted = _joined(comm, state, mine, differing)
    for name in differing:
        if name not in joined:
            policies[name] = contradicted.get(name, "refuse")
            notes.append(f"object {name} differs between ranks: each keeps its own")
    return {n: v for n, v in (shared | joined).items() if n not in policies}


def _joined(
    comm: Comm, state: State, mine: Mapping[str, bytes], names: list[str]
) -> tuple[dict[str, bytes], dict[str, str]]:
    """(objects of which each rank knows a part, put together; the policies of those on which ranks disagree)."""
    known = {n: v for n, v in state.objects.items() if n in names and isinstance(v, JoinedObject)}
    parts = dump({n: [v.joins, v.on_reshard, json.loads(mine[n])] for n, v in known.items()})
    found: dict[str, Any] = {}
    contradicted = dict[str, str]()
    for reply in exchange(comm, "joining objects", parts):
        for name, (joins, policy, value) in json.loads(reply).items():
            try:
                found[name] = objects.join(found[name], value, joins) if name in found else value
            except ValueError:  # noqa: PERF203  of what ranks contradict each other on, each keeps its own
                contradicted[name] = policy
    whole = {n: json.dumps(v, separators=(",", ":")).encode() for n, v in found.items() if n not in contradicted}
    return whole, contradicted
