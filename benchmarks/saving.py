"""Durable saves, loads, and both of many small tensors, beside every peer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks import rounds
from benchmarks.cache import can_evict, evict
from benchmarks.meter import measure
from benchmarks.peers import SYNC, Distckpt
from benchmarks.peers_deepspeed import DeepSpeed
from benchmarks.report import Report
from benchmarks.workload import Sharded

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.meter import Sample
    from benchmarks.options import Options
    from benchmarks.peers import Peer
    from benchmarks.ranks import World


def save(world: World, options: Options) -> Report:
    """Durable saves of large tensors."""
    report, tensors = Report("save"), Sharded.large(world, options.nbytes)
    with options.media(world) as media:
        for medium, base in media.items():
            peers = (*SYNC, DeepSpeed)
            found = rounds.run(world, tensors, base, peers, once=rounds.save_once, count=options.rounds)
            report.add(f"save to {medium}: {_what(world, tensors)}", found, "save", tensors.nbytes)
            report.ratios |= rounds.ratios(found, "save", f"{medium}.")
    return report


def load(world: World, options: Options) -> Report:
    """Loads of large tensors in the layout that saved them: cold from the disk, warm from the page cache and tmpfs."""
    report, tensors = Report("load"), Sharded.large(world, options.nbytes)
    with options.media(world) as media:
        for medium, base in media.items():
            cold = medium == "disk" and _cold(report, base)
            found = rounds.run(
                world, tensors, base, SYNC, once=partial(rounds.loads_once, cold=cold), count=options.rounds
            )
            for act in ("cold", "warm")[not cold :]:
                report.add(f"{act} load from {medium}: {_what(world, tensors)}", found, act, tensors.nbytes)
                report.ratios |= rounds.ratios(found, act, f"{medium}." + "warm_" * (cold and act == "warm"))
    return report


def small(world: World, options: Options) -> Report:
    """Saves and loads of many tensors of 32 KiB a rank, and our own speed with large ones in the same rounds."""
    report, tensors, large = Report("small"), Sharded.small(world, options.nbytes), Sharded.large(world, options.nbytes)

    class Large(Distckpt):
        """distckpt with as many bytes in large tensors."""

        name = "large"

        def __init__(self, world: World, tensors: Sharded, home: Path) -> None:  # noqa: ARG002
            super().__init__(world, large, home)

    with options.media(world) as media:
        for medium, base in media.items():
            cold = medium == "disk" and _cold(report, base)
            once = partial(_both_once, cold=cold)
            found = rounds.run(world, tensors, base, (*SYNC, Large), once=once, count=options.rounds)
            for act, lead in (("save", ""), ("load", "load_")):
                how = "cold " * (cold and act == "load") + act
                report.add(f"{how}, {medium}: {_what(world, tensors)}", found, act, tensors.nbytes)
                report.ratios |= rounds.ratios(found, act, f"{medium}.{lead}")
                cpu = rounds.ratios(found, act, f"{medium}.{lead}cpu_", "cpu")
                report.ratios |= {key: x for key, x in cpu.items() if key.endswith("vs_dcp")}
    return report


def _both_once(peer: Peer, folder: Path, *, cold: bool) -> dict[str, Sample]:
    saved = measure(peer.world, lambda: peer.save(folder))
    if cold:
        measure(peer.world, lambda: evict(folder) if peer.world.leads else None)
    peer.open(folder)
    return {"save": saved, "load": rounds.load_once(peer, folder)}


def _what(world: World, tensors: Sharded) -> str:
    own = next(iter(tensors.local.values()))
    size = own.numel() * own.element_size()
    return f"{world.size} ranks, each {len(tensors.local)} tensors of {size >> 10} KiB"


def _cold(report: Report, base: Path) -> bool:
    """Whether loads can be cold here; the report says so where they cannot."""
    if can_evict(base):
        return True
    report.notes.append(f"{base.parent}: files cannot be put out of memory there, so no load from it is cold")
    return False
