"""Rounds: each runs every program once, in turn, so that what disturbs the machine disturbs them alike.

A ratio is taken within a round; what is told is the median over the rounds, with the least and the most. The first
round stands apart: imports, first touches, processes that are started once.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.cache import evict
from benchmarks.meter import Failed, Sample, measure
from benchmarks.peers import Distckpt, Raw, RawDirect
from benchmarks.peers_object import RawObstore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.peers import Peer
    from benchmarks.ranks import World
    from benchmarks.workload import Sharded

OURS = Distckpt.name
RAW = (Raw.name, RawDirect.name, RawObstore.name)


@dataclass(slots=True)
class Series:
    """What a program's rounds cost, by act; or why it was not run."""

    program: str
    first: dict[str, Sample] = field(default_factory=dict)
    rounds: list[dict[str, Sample]] = field(default_factory=list)
    why_not: str = ""

    def median(self, act: str, column: str = "seconds") -> float:
        """Median over the rounds of one column."""
        return float(statistics.median(getattr(each[act], column) for each in self.rounds))


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median over the rounds, the least and the most."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, found: Sequence[float]) -> Ratio:
        """Ratio of what was found in each round."""
        return cls(statistics.median(found), min(found), max(found), len(found))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(theirs: Series, ours: Series, act: str, column: str = "seconds", our_act: str | None = None) -> Ratio:
    """What theirs cost over what ours did, round by round: above 1 is better for ours."""
    pairs = zip(theirs.rounds, ours.rounds, strict=True)
    return Ratio.of([getattr(t[act], column) / max(1e-9, getattr(o[our_act or act], column)) for t, o in pairs])


def ratios(found: Sequence[Series], act: str, lead: str, column: str = "seconds") -> dict[str, Ratio]:
    """`{lead}vs_PROGRAM` -> ratio, for every program that ran. The raw limit is the faster of its two ways."""
    ran = {series.program: series for series in found if series.rounds}
    ours = ran[OURS]
    limit = min((ran[n] for n in RAW if n in ran), key=lambda s: s.median(act), default=None)
    others = [(slug(n), s) for n, s in ran.items() if n not in (OURS, *RAW)] + ([("raw", limit)] if limit else [])
    return {f"{lead}vs_{name}": ratio(series, ours, act, column) for name, series in others}


def slug(program: str) -> str:
    """Name of a program as a part of a key."""
    return "_".join("".join(c if c.isalnum() else " " for c in program.lower()).split())


def run(
    world: World,
    tensors: Sharded,
    base: Path,
    kinds: Sequence[type[Peer]],
    *,
    once: Callable[[Peer, Path], dict[str, Sample]],
    count: int,
) -> list[Series]:
    """Run `once` for every program in each of `count` rounds and one before them. Collective.

    What ours raises is raised; a peer that fails is not run again, and its series says why.
    """
    found = [Series(kind.name) for kind in kinds]
    peers = [_started(kind, world, tensors, base, series) for kind, series in zip(kinds, found, strict=True)]
    for number in range(count + 1):
        for turn in range(len(kinds)):
            peer, series = peers[(turn + number) % len(kinds)], found[(turn + number) % len(kinds)]
            if peer is None or series.why_not:
                continue
            folder = peer.home / f"step-{number:08d}"
            try:
                samples = once(peer, folder)
            except Failed as e:
                if peer.name == OURS:
                    raise
                series.why_not, series.rounds = str(e), []
            else:
                series.first = series.first or samples
                series.rounds += [samples] if number else []
            world.barrier()
            if world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
    for peer in filter(None, peers):
        peer.close()
    return found


def _started(kind: type[Peer], world: World, tensors: Sharded, base: Path, series: Series) -> Peer | None:
    """A program at its work; None, and the reason in its series, where some rank cannot start it. Collective."""
    made: list[Peer] = []
    try:
        measure(world, lambda: made.append(kind(world, tensors, base / slug(kind.name))))
    except Failed as e:
        series.why_not = str(e)
        return None
    return made[0]


def save_once(peer: Peer, folder: Path) -> dict[str, Sample]:
    """A durable save. What the first round saved is loaded and compared."""
    sample = measure(peer.world, lambda: peer.save(folder))
    if folder.name == f"step-{0:08d}":
        peer.open(folder)
        load_once(peer, folder)
    return {"save": sample}


def load_once(peer: Peer, folder: Path) -> Sample:
    """A load that must bring back every tensor."""
    peer.tensors.scrub()
    sample = measure(peer.world, lambda: peer.load(folder))
    peer.settle()
    measure(peer.world, peer.tensors.verify)
    return sample


def loads_once(peer: Peer, folder: Path, *, cold: bool) -> dict[str, Sample]:
    """A save that is not timed, a cold load where there is such a thing, and a warm one."""
    measure(peer.world, lambda: peer.save(folder))
    return loads(peer, folder, cold=cold)


def loads(peer: Peer, folder: Path, *, cold: bool) -> dict[str, Sample]:
    """A cold load where there is such a thing, and a warm one."""
    found = {}
    if cold:
        peer.open(folder)
        measure(peer.world, lambda: evict(folder) if peer.world.leads else None)
        found["cold"] = load_once(peer, folder)
    peer.open(folder)
    found["warm"] = load_once(peer, folder)
    return found
