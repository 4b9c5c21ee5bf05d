"""Loads into another layout or another number of ranks than saved, beside the load into the same one, and DCP's."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from benchmarks import rounds
from benchmarks.cache import evict
from benchmarks.meter import Sample, measure
from benchmarks.peers import Distckpt, Peer
from benchmarks.report import Report
from benchmarks.rounds import Ratio
from benchmarks.workload import Holder, Sharded
from distckpt import Checkpointer, TrainState
from distckpt.format.partition import FlatEven
from distckpt.state import GlobalTensor, Layout, Saved, State
from distckpt.state import Shard as Held

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.ranks import Ranks, World

EACH = 16 << 20
"""Bytes of a global tensor."""


class Laid(Sharded):
    """The same global tensors in any layout.

    fsdp: cut along the first dimension; tp: every other one along the second; hsdp: two replicas of fsdp.
    """

    def __init__(self, world: World, nbytes: int, layout: str) -> None:
        each = min(EACH, max(64 << 10, nbytes // 4))
        self._shape = (each // 4 // 64, 64)
        shape = (2, world.size // 2) if layout == "hsdp" else (world.size,)
        mesh = init_device_mesh(world.device.type, shape)
        self.whole, self._truth, self.nbytes = {}, {}, max(1, nbytes // each) * each
        for i in range(max(1, nbytes // each)):
            placements: list[Placement] = [Shard(i % 2 if layout == "tp" else 0)]
            if layout == "hsdp":
                placements.insert(0, Replicate())
            whole = distribute_tensor(_values(i, self._shape).to(world.device), mesh, placements, src_data_rank=None)
            self.whole[f"w{i}"] = whole
        self.local = {name: t._local_tensor for name, t in self.whole.items()}
        self._truth = {name: t.cpu().clone() for name, t in self.local.items()}


def _values(i: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A global tensor whose every element tells where it belongs."""
    return (torch.arange(prod(shape), dtype=torch.int32) + i * 7_919).view(torch.float32).view(shape)


class Flat:
    """The same tensors as ZeRO keeps them: one after another in a buffer that is cut evenly over the ranks."""

    def __init__(self, world: World, nbytes: int) -> None:
        like = Laid(world, nbytes, "fsdp")
        shape = like._shape
        period = -(-len(like.whole) * prod(shape) // world.size)
        self._state = State()
        for i in range(len(like.whole)):
            layout = FlatEven(shape, period, i * prod(shape), 0)
            flat = _values(i, shape).view(-1)
            shards = tuple(
                Held(run, flat[run.start : run.stop].clone())  # type: ignore[union-attr]
                for run in layout.of_file(world.rank)
            )
            self._state.tensors[f"model.w{i}"] = GlobalTensor(shape, "float32", Layout(layout), shards)
        self.unusable = None

    def capture(self) -> State:
        """See Stateful.capture."""
        return self._state

    def targets(self, saved: Saved) -> State:  # noqa: ARG002
        """See Stateful.targets."""
        return self._state

    def restore(self, saved: Saved) -> list[str]:  # noqa: ARG002
        """See Stateful.restore."""
        return []


class Resharded(Distckpt):
    """Ours, from the checkpoint that another layout saved."""

    source = ""

    def save(self, folder: Path) -> None:
        """Nothing: what is loaded has been saved by other ranks."""

    def open(self, folder: Path) -> None:  # noqa: ARG002
        self._loader.close()
        self._loader = Checkpointer(self.home.parent / self.source)

    def load(self, folder: Path) -> None:  # noqa: ARG002
        self._loader.load(self._state, step=1)


class Same(Resharded):
    """Ours, from the checkpoint that these ranks saved in this layout."""

    name = "distckpt, same layout"
    source = "same"


class DcpResharded(Peer):
    """DCP, from what another layout saved."""

    name = "DCP"
    source = "source-dcp"

    def save(self, folder: Path) -> None:
        """Nothing: what is loaded has been saved by other ranks."""

    def load(self, folder: Path) -> None:  # noqa: ARG002
        dcp_load(dict(self.tensors.whole), checkpoint_id=self.home.parent / self.source)


Resharded.source = "source"
PEERS: tuple[type[Peer], ...] = (Resharded, Same, DcpResharded)


def reshard(ranks: Ranks, options: Options) -> Report:
    """Every change of layout, and of four ranks to three where there are that many."""
    report, n = Report("reshard"), ranks.size
    changes = {"fsdp_to_tp": ("fsdp", n, "tp", n), "zero_to_fsdp": ("zero", n, "fsdp", n)}
    if n > 2:
        changes[f"{n}_to_{n - 1}"] = ("fsdp", n, "fsdp", n - 1)
    else:
        report.notes.append("fewer ranks than saved: not measured, for that takes three ranks or more (--ranks 4)")
    if n > 3 and n % 2 == 0:
        changes["hsdp_to_fsdp"] = ("hsdp", n, "fsdp", n)
    else:
        report.notes.append("HSDP to FSDP: not measured, for that takes an even number of ranks from four on")
    for name, (source, count, wanted, readers) in changes.items():
        with ranks.world(count) as world:
            media = options.media(world) if world else None
            places = media.__enter__() if media else {}
            if world:
                _save(world, places["disk"], source, options.nbytes)
        with ranks.world(readers) as world:
            if world:
                _load(world, report, places["disk"], (name, wanted), options)
        with ranks.world(count) as world:
            if media:
                media.__exit__(None, None, None)
    _worst(report)
    return report


def _save(world: World, base: Path, layout: str, nbytes: int) -> None:
    laid = Laid(world, nbytes, "fsdp" if layout == "zero" else layout)
    state: Any = Flat(world, nbytes) if layout == "zero" else laid.state()
    with Checkpointer(base / "source") as checkpointer:
        checkpointer.save(1, state, wait=True)
    dcp_save(dict(laid.whole), checkpoint_id=base / "source-dcp")


def _load(world: World, report: Report, base: Path, change: tuple[str, str], options: Options) -> None:
    name, layout = change
    laid = Laid(world, options.nbytes, layout)
    with Checkpointer(base / "same") as checkpointer:
        checkpointer.save(1, TrainState(model=Holder(laid.whole), rng=False), wait=True)

    def once(peer: Peer, folder: Path) -> dict[str, Sample]:
        peer.open(folder)
        measure(world, lambda: evict(base) if world.leads else None)
        return {"load": rounds.load_once(peer, folder)}

    found = rounds.run(world, laid, base, PEERS, once=once, count=options.rounds)
    ours, same, dcp = found
    report.add(f"{name}: {world.size} ranks load {laid.nbytes / 1e6:.0f} MB, cold", found, "load", laid.nbytes)
    if dcp.rounds:
        report.ratios[f"disk.{name}_vs_dcp"] = rounds.ratio(dcp, ours, "load")
    report.ratios[f"{name}_over_same_layout"] = rounds.ratio(ours, same, "load")
    needed = laid.nbytes
    report.ratios[f"{name}_bytes_over_needed"] = Ratio.of([r["load"].read_called / needed for r in ours.rounds])
    report.ratios[f"{name}_memory_mib"] = Ratio.of([r["load"].memory / 2**20 for r in ours.rounds])


def _worst(report: Report) -> None:
    """The worst of the changes under the plain name."""
    for key in ("bytes_over_needed", "over_same_layout", "memory_mib"):
        report.ratios[key] = max((r for k, r in report.ratios.items() if k.endswith(key)), key=lambda r: r.median)
    speed = min((r for k, r in report.ratios.items() if k.endswith("_vs_dcp")), key=lambda r: r.median, default=None)
    if speed:
        report.ratios["disk.vs_dcp"] = speed
