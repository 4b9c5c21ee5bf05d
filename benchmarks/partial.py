"""Loads of the weights alone out of a checkpoint with moments twice their size: the commonest read in production."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from benchmarks import rounds
from benchmarks.cache import can_evict, evict
from benchmarks.meter import Sample, measure
from benchmarks.peers import Dcp, Distckpt, Safetensors, TorchSave, own_file, step_of
from benchmarks.report import Report
from benchmarks.rounds import Ratio
from benchmarks.workload import Holder, Sharded
from distckpt import TrainState

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.peers import Peer
    from benchmarks.ranks import World

WEIGHTS = ("w",)


class Weights(Sharded):
    """Weights (w0, w1, ...) and moments (m0, m1, ...) twice their size."""

    def __init__(self, world: World, count: int, each: int) -> None:
        super().__init__(world, count, each)
        names = {name: name if i % 3 == 0 else f"m{i}" for i, name in enumerate(self.local)}
        self.local = {names[n]: t for n, t in self.local.items()}
        self.whole = {names[n]: t for n, t in self.whole.items()}
        self._truth = {names[n]: t for n, t in self._truth.items()}
        self.needed = sum(t.nbytes for n, t in self.local.items() if n.startswith(WEIGHTS)) * world.size

    def state(self) -> TrainState:
        """Weights and moments as two models."""
        return TrainState(model={k: Holder(self.part((k,))) for k in ("w", "m")}, rng=False)


class OurWeights(Distckpt):
    """distckpt with only=."""

    def load(self, folder: Path) -> None:
        state = TrainState(model={"w": Holder(self.tensors.part(WEIGHTS))}, rng=False)
        self._loader.load(state, step=step_of(folder), only=("model.w",))


class DcpWeights(Dcp):
    """DCP, given the weights."""

    def load(self, folder: Path) -> None:
        dcp_load(self.tensors.part(WEIGHTS), checkpoint_id=folder)


class TorchWeights(TorchSave):
    """torch.load, mapping the file, of which the weights are copied."""

    def load(self, folder: Path) -> None:
        found = torch.load(own_file(folder, self.world, "pt"), weights_only=True, mmap=True)
        for name in self.tensors.part(WEIGHTS):
            self.tensors.local[name].copy_(found[name])


class SafetensorsWeights(Safetensors):
    """safetensors, asked for the weights."""

    def load(self, folder: Path) -> None:
        from safetensors import safe_open

        with safe_open(own_file(folder, self.world, "safetensors"), framework="pt") as file:
            for name in self.tensors.part(WEIGHTS):
                self.tensors.local[name].copy_(file.get_tensor(name))


PEERS = (OurWeights, DcpWeights, TorchWeights, SafetensorsWeights)


def partial(world: World, options: Options) -> Report:
    """Load the weights, cold from the disk and warm from tmpfs."""
    report, tensors = Report("partial"), Weights.large(world, options.nbytes)
    assert isinstance(tensors, Weights)
    with options.media(world) as media:
        for medium, base in media.items():
            cold = can_evict(base)

            def once(peer: Peer, folder: Path, *, cold: bool = cold) -> dict[str, Sample]:
                measure(world, lambda: peer.save(folder))
                peer.open(folder)
                measure(world, lambda: evict(folder) if cold and world.leads else None)
                tensors.scrub()
                sample = measure(world, lambda: peer.load(folder))
                measure(world, lambda: tensors.verify(WEIGHTS))
                return {"load": sample}

            found = rounds.run(world, tensors, base, PEERS, once=once, count=options.rounds)
            how = f"{'cold' if cold else 'warm'} from {medium}"
            title = f"weights alone, {how}: {tensors.needed / 1e6:.0f} of {tensors.nbytes / 1e6:.0f} MB"
            report.add(title, found, "load", tensors.needed)
            report.ratios |= rounds.ratios(found, "load", f"{medium}.")
            read = [each["load"].read_called / tensors.needed for each in found[0].rounds]
            report.ratios[f"{medium}.bytes_over_needed"] = Ratio.of(read)
    return report
