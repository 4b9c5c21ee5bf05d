"""State that every rank holds alike (DDP): saved once, needed by all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from benchmarks import rounds
from benchmarks.cache import can_evict, evict
from benchmarks.meter import Sample, measure
from benchmarks.peers import Dcp, Distckpt, Safetensors, TorchSave, sync
from benchmarks.report import Report
from benchmarks.rounds import Ratio
from benchmarks.workload import Sharded

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.peers import Peer
    from benchmarks.ranks import World


class Replicated(Sharded):
    """Tensors of which every rank holds the whole."""

    def __init__(self, world: World, count: int, each: int) -> None:
        super().__init__(world, count, each)
        torch.manual_seed(0)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for name, t in self.local.items():
            t.copy_(torch.rand(t.shape))
            self._truth[name].copy_(t)
        self.whole = {name: DTensor.from_local(t, mesh, [Replicate()]) for name, t in self.local.items()}
        self.nbytes = count * each


class FirstRank(TorchSave):
    """torch.save by rank 0, torch.load by all."""

    def save(self, folder: Path) -> None:
        path = folder / "all.pt"
        if self.world.rank == 0:
            folder.mkdir(parents=True)
            torch.save(self.tensors.local, path)
            sync([path])
        self.world.barrier()

    def load(self, folder: Path) -> None:
        found = torch.load(folder / "all.pt", weights_only=True)
        for name, t in self.tensors.local.items():
            t.copy_(found[name])


class FirstSafetensors(Safetensors):
    """safetensors, saved by rank 0, loaded by all."""

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        path = folder / "all.safetensors"
        if self.world.rank == 0:
            folder.mkdir(parents=True)
            save_file(self.tensors.local, path)
            sync([path])
        self.world.barrier()

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        found = load_file(folder / "all.safetensors")
        for name, t in self.tensors.local.items():
            t.copy_(found[name])


PEERS = (Distckpt, Dcp, FirstRank, FirstSafetensors)


def replicated(world: World, options: Options) -> Report:
    """Save and load what every rank holds alike; cold from the disk, warm from tmpfs."""
    report = Report("replicated")
    tensors = Replicated.large(world, options.nbytes * world.size)

    with options.media(world) as media:
        for medium, base in media.items():
            cold = can_evict(base)

            def once(peer: Peer, folder: Path, *, cold: bool = cold) -> dict[str, Sample]:
                saved = measure(world, lambda: peer.save(folder))
                peer.open(folder)
                measure(world, lambda: evict(folder) if cold and world.leads else None)
                return {"save": saved, "load": rounds.load_once(peer, folder)}

            found = rounds.run(world, tensors, base, PEERS, once=once, count=options.rounds)
            for act, lead in (("save", "save_"), ("load", "")):
                title = f"{act}, {medium}: {world.size} ranks that hold the same {tensors.nbytes / 1e6:.0f} MB"
                report.add(title, found, act, tensors.nbytes)
                report.ratios |= rounds.ratios(found, act, f"{medium}.{lead}")
            read = [each["load"].read_called / tensors.nbytes for each in found[0].rounds]
            report.ratios[f"{medium}.bytes_over_needed"] = Ratio.of(read)
    return report
