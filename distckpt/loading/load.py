"""One load, from an opened checkpoint into live state.

The path, top to bottom: read the objects -> targets -> plan (one error with every problem, before a byte moves) ->
verified reads -> restore. Each part is agreed on by all ranks before the next begins.
"""

from __future__ import annotations

import json
import time
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.comm import exchange, together
from distckpt.errors import Mismatch
from distckpt.garbage import uncollected
from distckpt.loading.deal import Amount, pays
from distckpt.loading.once import read_once
from distckpt.loading.plan import Options, Plan, listed, plan, refuse_unexpected
from distckpt.loading.read import equal, fill, runs
from distckpt.loading.report import LoadReport
from distckpt.loading.shared import refuse_shared
from distckpt.state import Saved
from distckpt.statedict import references
from distckpt.store.base import each

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.comm import Comm
    from distckpt.loading.open import Checkpoint
    from distckpt.loading.plan import Item
    from distckpt.loading.read import Run
    from distckpt.state import State, Stateful


@uncollected()
def load(
    comm: Comm, checkpoint: Checkpoint, live: Stateful, options: Options, *, about_to_change: Callable[[], None]
) -> LoadReport:
    """Load a checkpoint into live state, in place, on every rank. Collective.

    Raises on every rank what fails on any. Up to the call of `about_to_change` nothing live has changed; an error
    after it leaves a mix.
    """
    started = time.monotonic()
    step = checkpoint.manifest.step
    saved: Saved | None = None
    made: Plan | None = None
    targets: State | None = None
    reads: list[Run] = []

    def prepare() -> bytes:
        nonlocal saved, made, targets
        saved, names, aliases = _offered(checkpoint, comm, options)
        targets = live.targets(saved)
        made = plan(saved, names, aliases, targets, options, unreadable=checkpoint.unreadable)
        made.unexpected = [n for n in made.unexpected if not _is_tied(checkpoint, n, names, targets)]
        reads.extend(runs(checkpoint, made.items))
        refuse_shared(checkpoint, made.items)
        return bytes([bool(made.unexpected)]) + _amount(reads, made.items).encode()

    told = together(comm, f"planning the load of {checkpoint.name}", prepare)
    assert saved is not None
    assert made is not None
    assert targets is not None
    items, offered = made.items, saved
    if any(said[0] for said in told):
        made.unexpected = _taken_by_none(comm, made.unexpected)
        refuse_unexpected(filter(options.strict_about, made.unexpected), targets)
    if options.verify:
        together(comm, f"verifying {checkpoint.name}", lambda: checkpoint.verify((i.file, i.name) for i in items))
    about_to_change()
    if not checkpoint.foreign and pays([Amount.decode(said[1:]) for said in told]):
        read_once(comm, checkpoint, reads)
    else:
        together(comm, f"reading {checkpoint.name}", lambda: fill(checkpoint, reads))
    report = LoadReport(step, made.loaded, made.missing, made.unexpected, made.cast, [*checkpoint.notes, *made.notes])
    report.unverified = checkpoint.unverified(items)
    report.metrics, report.world_size = checkpoint.manifest.metrics, checkpoint.manifest.world_size

    def restore() -> None:
        report.notes += live.restore(offered)

    together(comm, f"restoring {checkpoint.name}", restore)
    report.bytes_read = checkpoint.bytes_read
    report.seconds = time.monotonic() - started
    return report


def _amount(reads: list[Run], items: list[Item]) -> Amount:
    whole = {item.fqn: prod(item.shape) * item.dtype.itemsize for item in items}
    pieces = (piece for run in reads for piece in run.pieces)
    needed = sum(p.stop - p.start if p.memory is not None else p.pattern.nbytes for p in pieces)
    return Amount(sum(run.stop - run.start for run in reads), needed, sum(whole.values()))


def _is_tied(checkpoint: Checkpoint, name: str, names: dict[str, str], targets: State) -> bool:
    """Whether a saved tensor that nobody takes is, bit for bit, the one that its name is tied to here."""
    first = targets.aliases.get(name)
    if first not in names or name not in names:
        return False
    same = checkpoint.same(names[name], names[first])
    return same or (not checkpoint.foreign and equal(checkpoint, names[name], names[first]))


def _taken_by_none(comm: Comm, unexpected: list[str]) -> list[str]:
    """Saved names that no rank takes: what one pipeline stage has no place for, another has."""
    told = exchange(comm, "comparing what is left over", json.dumps(unexpected).encode())
    return sorted(set.intersection(*(set(json.loads(names)) for names in told)))


def _offered(checkpoint: Checkpoint, comm: Comm, options: Options) -> tuple[Saved, dict[str, str], dict[str, str]]:
    """(what the checkpoint offers under live names, live name -> saved name, aliases under live names)."""
    content = checkpoint.manifest
    resharded = content.world_size != comm.world_size
    aliases = {options.renamed(alias): options.renamed(fqn) for alias, fqn in content.aliases.items()}
    wanted = [name for name in content.objects if options.wants(name)]
    objects: dict[str, Any] = dict(zip(wanted, each(checkpoint.pace, checkpoint.object, wanted), strict=True))
    of_rank: dict[int, dict[str, Any]] = {}

    def rank_object(name: str, rank: int) -> Any:
        if rank not in of_rank:
            of_rank[rank] = checkpoint.rank_objects(rank)
        return of_rank[rank].get(name)

    refused = []
    for name, policy in content.rank_objects.items():
        if options.wants(name):
            chosen = options.per_rank.get(name, policy) if resharded else policy
            holder = 0 if resharded and chosen == "first" else comm.rank % content.world_size
            value = rank_object(name, holder)
            if name in of_rank[holder]:  # some ranks only may have had one
                objects[name] = value
            if resharded and chosen == "refuse":
                refused.append(
                    f"{name}: each of the {content.world_size} ranks saved its own; {comm.world_size} ranks cannot "
                    f"share them out (per_rank={{{name!r}: 'first'}} gives every rank that of rank 0)"
                )
    if refused:
        raise Mismatch(listed("per-rank values cannot be carried to another world size; nothing was changed", refused))
    referred = set(references([*objects.values()]))  # by their saved names
    names = {name if name in referred else options.renamed(name): name for name in content.tensors}
    if len(names) < len(content.tensors):
        raise Mismatch("rename gives two saved tensors the same name")
    tensors = {live: content.tensors[name] for live, name in names.items()}
    rename = options.rename or (lambda fqn: fqn)
    saved = Saved(
        tensors, objects, content.world_size, comm.rank, comm.world_size, rank_object, rename, options.per_rank
    )
    return saved, names, aliases
