"""What the checksums cost, and whether they find what they are for.

Ours runs beside itself without them: summing and comparing are switched off from outside, for this measurement alone,
and it is shown that they were off. A corrupted checkpoint must not load, whatever was done to whichever of its files.
"""

from __future__ import annotations

import random
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

import torch

from benchmarks import rounds
from benchmarks.cache import can_evict
from benchmarks.meter import Failed, Sample, measure
from benchmarks.peers import Distckpt
from benchmarks.report import Report, Table
from benchmarks.rounds import Ratio
from benchmarks.workload import Holder, Sharded
from distckpt import Checkpointer, TrainState
from distckpt.comm import SoloComm
from distckpt.errors import DistckptError
from distckpt.format import checksum
from distckpt.format.checksum import BLOCK, CRC32C
from distckpt.loading import open as opening

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.peers import Peer
    from benchmarks.ranks import World


class _NoSums:
    """In place of BlockSums: knows the blocks, and says 0 of each."""

    def __init__(self, _: object) -> None:
        self._fed = 0

    def feed(self, data: memoryview) -> None:
        self._fed += len(data)

    def finish(self) -> bytes:
        return bytes(CRC32C.size * -(-self._fed // BLOCK))


@contextmanager
def without_sums() -> Iterator[None]:
    """Neither sum what is saved nor compare what is loaded."""
    with mock.patch.object(checksum, "BlockSums", _NoSums), mock.patch.object(opening.DataFile, "verify"):
        yield


class Unsummed(Distckpt):
    """Ours without checksums."""

    name = "without checksums"

    def save(self, folder: Path) -> None:
        with without_sums():
            super().save(folder)

    def load(self, folder: Path) -> None:
        with without_sums():
            super().load(folder)

    def prove(self, folder: Path) -> None:
        """Failed if there are sums after all: then what was measured is not what it is called."""
        self.open(folder)
        try:
            measure(self.world, lambda: Distckpt.load(self, folder))
        except Failed:
            return
        raise Failed("the checksums could not be switched off, so their cost is not known")


def integrity(world: World, options: Options) -> Report:
    """Cost of the checksums of a save, a cold load and a warm one; corruptions found."""
    report, tensors = Report("integrity"), Sharded.large(world, options.nbytes)
    with options.media(world) as media:
        for medium, base in media.items():
            cold = can_evict(base)

            def once(peer: Peer, folder: Path, *, cold: bool = cold) -> dict[str, Sample]:
                found = {"save": measure(world, lambda: peer.save(folder))}
                if isinstance(peer, Unsummed):
                    peer.prove(folder)
                return found | rounds.loads(peer, folder, cold=cold)

            found = rounds.run(world, tensors, base, (Distckpt, Unsummed), once=once, count=options.rounds)
            ours, bare = found
            for act in ("save", "cold", "warm") if cold else ("save", "warm"):
                report.add(f"{act}, {medium}", found, act, tensors.nbytes)
                if bare.rounds:
                    cost = [o[act].seconds / b[act].seconds - 1 for o, b in zip(ours.rounds, bare.rounds, strict=True)]
                    report.ratios[f"{medium}.{'' if act == 'save' else act + '_'}checksum_cost"] = Ratio.of(cost)
        if world.rank == 0:
            _corrupt(report, media["disk"], 60 if options.quick else 600)
        world.barrier()
    return report


def _corrupt(report: Report, base: Path, count: int) -> None:
    """Damage one file of a small checkpoint after another, each time anew, and load it."""
    torch.manual_seed(0)
    tensors = {f"w{i}": torch.rand(400_000 + i) for i in range(4)}
    state = TrainState(model=Holder(tensors), rng=True, note=_Note())
    draw, tries, found = random.Random(0), dict[str, int](), dict[str, int]()
    with Checkpointer(base / "fuzz", comm=SoloComm()) as c:
        c.save(1, state, wait=True)
    files = sorted(p for p in (base / "fuzz" / "step-00000001").iterdir() if p.is_file())
    for i in range(count):
        path, (how, damage) = files[i % len(files)], draw.choice(DAMAGES)
        kept = path.with_name(".kept")
        shutil.copyfile(path, kept)
        damage(path, draw)
        what = f"{path.name.split('.')[0]}: {how}"
        tries[what] = tries.get(what, 0) + 1
        try:
            with Checkpointer(base / "fuzz", comm=SoloComm()) as c:
                c.load(state, step=1)
        except DistckptError:
            found[what] = found.get(what, 0) + 1
            state.unusable = None
        kept.replace(path)
    rows = [
        ["file and damage", "made", "found"],
        *([k, str(n), str(found.get(k, 0))] for k, n in sorted(tries.items())),
    ]
    report.tables.append(Table("corruptions: a load must refuse each", rows))
    report.ratios["corruptions_found"] = Ratio.of([sum(found.values()) / count])


class _Note:
    """A value with an object file of its own."""

    def state_dict(self) -> dict[str, str]:
        return {"text": "some words " * 100}

    def load_state_dict(self, state: dict[str, str]) -> None:
        assert state == self.state_dict()


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _blank(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at, length = draw.randrange(len(data)), draw.choice((1, 512, 4096, 65536))
    blank = bytes(byte ^ 0xFF for byte in data[at : at + length])
    data[at : at + length] = blank
    path.write_bytes(data)


def _shorten(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _lengthen(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 5000)))


def _remove(path: Path, draw: random.Random) -> None:  # noqa: ARG001
    path.unlink()


def _swap(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    a, b = draw.randrange(half), half + draw.randrange(half)
    data[a], data[b] = data[b], data[a] if data[a] != data[b] else data[a] ^ 1
    path.write_bytes(data)


DAMAGES: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    ("a bit flipped", _flip),
    ("a stretch inverted", _blank),
    ("cut short", _shorten),
    ("bytes added", _lengthen),
    ("removed", _remove),
    ("two bytes exchanged", _swap),
]
