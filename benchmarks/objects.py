"""Saves straight to an object store, loads from it, and a local directory in front of one.

Every program works on the same server, one after another in each round. The server runs on the same cores as what is
measured: its own work is in every time, ours and the peers'.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import rounds
from benchmarks.meter import Sample, descendants, measure
from benchmarks.object_server import SERVERS, Absent, served
from benchmarks.peers_object import OBJECTS, OnObjects, SlowDistckpt, WriterDistckpt, on
from benchmarks.peers_tiers import RATE, TIERS, Tiered
from benchmarks.report import Report, Table
from benchmarks.rounds import OURS, Ratio
from benchmarks.workload import SMALL, Sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.object_server import Served
    from benchmarks.options import Options
    from benchmarks.peers import Peer
    from benchmarks.ranks import World

LATENCY = 0.05
"""Seconds that the proxy adds to each request."""
_MANY = 1000
_MOST = {"moto": 64 << 20}
"""Bytes, of a server that is slow itself."""
_TIERED = 128 << 20
_LOOK = 0.005
"""Seconds between looks at the writer process's memory."""


def objects(world: World, options: Options) -> Report:
    """Throughput on each server there is; on the fastest latency, requests and tiers besides."""
    report, first = Report("object"), True
    for name in [options.server] if options.server else SERVERS:
        lead = "s3." if first else f"{name}."
        try:
            with served(world, name) as server, server.environment():
                _throughput(world, options, report, server, lead)
                if first:
                    _requests(world, report, server)
                    _latency(world, options, report, server)
                    _tiers(world, options, report, server)
        except Absent as e:
            report.notes.append(f"no figures on {name}: {e}")
        else:
            first = False
    return report


def _throughput(world: World, options: Options, report: Report, server: Served, lead: str) -> None:
    tensors = Sharded.large(world, min(options.nbytes, _MOST.get(server.name, options.nbytes)))
    found = rounds.run(world, tensors, Path("of"), on(server, OBJECTS), once=_both, count=options.rounds)
    for act in ("save", "load"):
        report.add(
            f"{act}, {server.name}: {world.size} ranks, {tensors.nbytes / 1e6:.0f} MB", found, act, tensors.nbytes
        )
        report.ratios |= rounds.ratios(found, act, f"{lead}{act}_")
    (writer,) = on(server, (WriterDistckpt,))
    grown = _writer_memory(world, writer, tensors)
    report.ratios[f"{lead}writer_memory_mib"] = Ratio.of([grown / 2**20])
    ours = next(s for s in found if s.program == OURS)
    report.ratios[f"{lead}save_memory_mib"] = Ratio.of([each["save"].memory / 2**20 for each in ours.rounds])


def _both(peer: Peer, folder: Path) -> dict[str, Sample]:
    assert isinstance(peer, OnObjects)
    saved = measure(peer.world, lambda: peer.save(folder))
    peer.open(folder)
    loaded = rounds.load_once(peer, folder)
    peer.world.barrier()
    peer.remove(folder)
    return {"save": saved, "load": loaded}


def _writer_memory(world: World, kind: type[Peer], tensors: Sharded) -> int:
    """Most resident bytes of a writer process while it saves, its arena not counted."""
    peer = kind(world, tensors, Path("of", "memory"))
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(_LOOK):
            peak.append(_private())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for step in range(2):
            peer.save(Path("of", "memory", f"step-{step:08d}"))
    finally:
        done.set()
        looking.join()
    peer.close()
    world.barrier()
    return int(max(world.gather(max(peak))))


def _private() -> int:
    """Resident bytes that this rank's writer process shares with nobody."""
    found = 0
    for pid in descendants():
        with suppress(OSError):
            if "distckpt.run.writer" in Path(f"/proc/{pid}/cmdline").read_text():
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                found += next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))
    return found


# -- by way of the proxy ---------------------------------------------------------------------------------------------


def _requests(world: World, report: Report, server: Served) -> None:
    """How many requests an async save makes before it returns, and in all; and a load."""
    (kind,) = on(server, (SlowDistckpt,))
    peer = kind(world, Sharded(world, 4, SMALL), Path("of", "requests"))
    assert isinstance(peer, SlowDistckpt)

    def count(act: Callable[[], object]) -> list[str]:
        server.ask("requests")
        measure(world, act)
        world.barrier()
        return server.ask("requests") or []

    for number in range(3):  # the first asks what later ones know
        folder = Path("of", "requests", f"step-{number:08d}")
        lines = count(lambda: peer.save(folder))  # noqa: B023  called at once
    peer.open(folder)
    # a save only asks until it returns: what is put comes from the writer process
    first = next((i for i, line in enumerate(lines) if line.startswith("PUT")), 0)
    found = {"save, before it returns": lines[:first], "save, behind": lines[first:]}
    found["load"] = count(lambda: peer.load(folder))
    peer.close()
    kinds = ("GET", "HEAD", "PUT", "POST", "DELETE")
    rows = [["requests", "all", *kinds]]
    for what, lines in found.items():
        rows.append([what, str(len(lines)), *(str(sum(s.startswith(k) for s in lines)) for k in kinds)])
    report.tables.append(Table(f"requests of a save and a load in a steady run, {world.size} ranks", rows))
    keys = {"save, before it returns": "blocking_requests", "save, behind": "save_requests", "load": "load_requests"}
    report.ratios |= {f"s3.{key}": Ratio.of([float(len(found[what]))]) for what, key in keys.items()}


def _latency(world: World, options: Options, report: Report, server: Served) -> None:
    """Loads of many small tensors, and of one large one of the same bytes, each request slowed down."""
    many = 100 if options.quick else _MANY
    small, large = Sharded(world, many, SMALL), Sharded(world, 1, many * SMALL)

    class Large(SlowDistckpt):
        """One tensor of the same bytes."""

        name = "one large tensor"

        def __init__(self, world: World, tensors: Sharded, home: Path) -> None:  # noqa: ARG002
            super().__init__(world, large, home)

    server.ask("slow", latency=LATENCY)
    try:
        kinds = on(server, (SlowDistckpt, Large))
        found = rounds.run(world, small, Path("of"), kinds, once=_both, count=options.rounds)
    finally:
        server.ask("slow")
    title = f"load, {LATENCY * 1e3:.0f} ms added to each request: {many} small tensors, or a large one"
    report.add(title, found, "load", small.nbytes)
    report.ratios["s3.latency_small_over_large"] = rounds.ratio(found[0], found[1], "load")


def _tiers(world: World, options: Options, report: Report, server: Served) -> None:
    """Async saves to a local directory, with and without a slow object store that they are replicated to."""
    tensors = Sharded.large(world, min(options.nbytes, _TIERED))

    def once(peer: Peer, folder: Path) -> dict[str, Sample]:
        assert isinstance(peer, Tiered)
        number = 2 * int(folder.name.removeprefix("step-"))
        before, measured = (folder.with_name(f"step-{number + i:08d}") for i in range(2))
        peer.save(before)  # which is on its way while the next is made
        world.barrier()
        stalled = measure(world, lambda: peer.stall(measured))
        finished = measure(world, lambda: peer.finish(measured))
        if not peer.behind(before):
            report.notes.append(f"{peer.name}: {before.name} had been replicated before the next save was committed")
        peer.drain(measured)
        return {"stall": stalled, "commit": finished}

    server.ask("slow", bandwidth=RATE)
    try:
        with options.media(world) as media:
            for medium, base in media.items():
                found = rounds.run(world, tensors, base, on(server, TIERS), once=once, count=options.rounds)
                lead = "tier." if medium == "disk" else f"{medium}.tier."
                for act in ("stall", "commit"):
                    title = f"{act} of an async save to {medium}, replicated at {RATE / 1e6:.0f} MB/s and alone"
                    report.add(title, found, act, tensors.nbytes)
                    report.ratios[f"{lead}{act}_ratio"] = rounds.ratio(found[0], found[1], act)
                server.ask("clear")
    finally:
        server.ask("slow")
