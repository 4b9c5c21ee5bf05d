"""Planning and index of large models at large world sizes, beside DCP's planner and metadata; and rank 0's commit.

Ranks are simulated (`agreed`). What is told is the CPU time of one rank.
"""

from __future__ import annotations

import io
import pickle
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.agreed import agreement_of
from benchmarks.covers import any_region, served, written_once
from benchmarks.meter import seconds
from benchmarks.report import Report, Table
from benchmarks.rounds import Ratio
from benchmarks.simulated import MODELS, PARALLELISMS, TP, index_of
from distckpt.format import manifest
from distckpt.format.layout import StepDir
from distckpt.format.partition import regions_of
from distckpt.loading.open import open_checkpoint
from distckpt.loading.plan import Options as LoadOptions
from distckpt.loading.plan import plan as plan_load
from distckpt.saving.commit import Attempt, acked_ranks, commit, complete, remove_acks, write_ack
from distckpt.saving.divide import divide
from distckpt.state import GlobalTensor, Saved, Shard, State
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.ranks import World
    from benchmarks.simulated import Model, Sharding
    from distckpt.format.manifest import Manifest
    from distckpt.format.partition import Partition

FULL = (8, 1024, 16384, 100_000)
QUICK = (8,)
READERS = ("FSDP", "TP x FSDP", "ZeRO-3")
"""Layouts that each checkpoint is planned to be loaded into, on half as many ranks."""


def plan(world: World, options: Options) -> Report:
    """Plan on rank 0, while the others wait."""
    report = Report("plan")
    with options.media(world) as media:
        if world.rank == 0:
            _tell(report, options, media.get("tmpfs", media["disk"]))
        world.barrier()
    return report


@dataclass(slots=True)
class Planned:
    """What planning one save and its loads took: CPU milliseconds of a rank, bytes."""

    tensors: int
    agree: float
    divide: float
    own: float
    sent: int
    load: float
    index: int
    files: int
    opened: float
    shards: int
    regions: int

    @property
    def save(self) -> float:
        """Milliseconds of a rank to plan a save."""
        return self.agree + self.divide + self.own

    def row(self) -> list[str]:
        """As a table has it."""
        times = [f"{x:.1f}" for x in (self.save, self.agree, self.divide, self.own)]
        counts = [f"{self.index / 1e6:.2f}", f"{self.opened:.0f}", str(self.shards), str(self.regions)]
        return [*times, str(self.sent), f"{self.load:.1f}", *counts]


COLUMNS = "model, layout|ranks|plan, ms|agree|divide|own chunks|bytes sent|load plan, ms|commit.json, MB|open, ms"
PROVEN = ["chunks proven", "regions found"]
TITLE = (
    "planning: CPU milliseconds of one rank; every chunk of each kind of cut proven written once; regions of FSDP, "
    "TP x FSDP and ZeRO-3 readers (all up to 64 ranks, else a sample of 7) and any others (a sample) found whole"
)
_REGIONS = 2
"""Boxes and runs, of any place and size, that are asked of each kind of cut."""


def _tell(report: Report, options: Options, place: Path) -> None:
    sizes = QUICK if options.quick else FULL
    rows = [[*COLUMNS.split("|"), *PROVEN]]
    wide = [["model, layout", *(f"{n:,} ranks" for n in sizes)]]
    dense = list[Planned]()
    for name in list(MODELS)[:1] if options.quick else MODELS:
        model = MODELS[name]()
        for kind in ("FSDP", "PP") if options.quick else PARALLELISMS:
            wide.append([f"{name}, {kind}"])
            for n in sizes:
                found = _planned(model, kind, n, 1 if options.quick or len(model) > 10_000 else 3)
                rows.append([f"{name}, {kind}", str(n), *found.row()])
                wide[-1].append(f"{found.save:.1f} / {found.load:.1f}")
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
                if found.tensors == 873 and kind == "FSDP":
                    dense.append(found)
    report.tables.append(Table(TITLE, rows))
    report.tables.append(Table("plan of a save / of a load, CPU milliseconds of one rank", wide))
    report.tables.append(_commit(report, place, 64 if options.quick else 16384))
    report.tables.append(_beside_dcp((8,) if options.quick else (8, 64)))
    report.ratios["plan_ms"] = Ratio.of([max(p.save for p in dense)])
    report.ratios["load_plan_ms"] = Ratio.of([max(p.load for p in dense)])
    report.ratios["manifest_bytes"] = Ratio.of([dense[-1].index])
    report.ratios["manifest_bytes_beyond_files"] = Ratio.of([max(p.index - 100 * p.files for p in dense)])
    report.ratios["open_ms"] = Ratio.of([max(p.opened for p in dense)])
    report.ratios["sent_bytes"] = Ratio.of([max(p.sent for p in dense)])


def _planned(model: Model, kind: str, n: int, repeats: int) -> Planned:
    sharding = PARALLELISMS[kind](model, n)
    agreement, agreed, sent = agreement_of(model, sharding, repeats)
    partitions = divide(agreement.tensors)
    content = index_of(model, partitions, n)
    data = manifest.encode(content)
    shards, regions = written_once(partitions, n), 0
    readers = {reader: PARALLELISMS[reader](model, max(TP, n // 2)) for reader in READERS}
    regions += any_region(partitions, _REGIONS)
    for reader in readers.values():
        regions += served(partitions, reader.layouts, reader.world_size, every=n <= 64)
    return Planned(
        tensors=len(model),
        agree=agreed,
        divide=_milliseconds(lambda: divide(agreement.tensors), repeats),
        own=_milliseconds(lambda: [regions_of(p, n // 2) for p in partitions.values()], repeats),
        sent=sent,
        load=max(_load(model, content, reader, repeats) for reader in readers.values()),
        index=len(data),
        files=n,
        opened=_milliseconds(lambda: manifest.decode(data, None), repeats),
        shards=shards,
        regions=regions,
    )


def _milliseconds(act: Callable[[], object], repeats: int) -> float:
    """CPU milliseconds of an act: the median of its repeats."""
    return statistics.median(_cpu_seconds(act) for _ in range(repeats)) * 1e3


def _cpu_seconds(act: Callable[[], object]) -> float:
    started = time.thread_time()
    act()
    return time.thread_time() - started


def _load(model: Model, content: Manifest, reader: Sharding, repeats: int) -> float:
    """Milliseconds of one rank to plan the load of a checkpoint into another layout."""
    layouts, size, nothing = reader.layouts, reader.world_size, torch.empty(0)
    targets = State()
    for fqn, w in model.items():
        shards = tuple(Shard(region, nothing) for region in layouts[fqn].held.of_file(size // 2))
        targets.tensors[fqn] = GlobalTensor(w.shape, w.dtype, layouts[fqn], shards)
    saved = Saved(dict(content.tensors), {}, content.world_size, size // 2, size, lambda _n, _r: None)
    names = {fqn: fqn for fqn in model}
    return _milliseconds(lambda: plan_load(saved, names, {}, targets, LoadOptions()), repeats)


def _commit(report: Report, place: Path, ranks: int) -> Table:
    """Rank 0's work once all have written: list and read the acks, check, commit, remove the acks."""
    model = MODELS["Llama-3 8B"]()
    partitions: dict[str, Partition] = divide(agreement_of(model, PARALLELISMS["FSDP"](model, ranks), 1)[0].tensors)
    content = index_of(model, partitions, ranks)
    store, attempt = LocalStore(place), Attempt(StepDir(1), content.attempt, ranks)
    for rank, file in enumerate(content.files):
        write_ack(store, attempt, rank, file, content if rank == 0 else None)
    made: list[Manifest | None] = []
    rows = [["rank 0's commit", "seconds"]]
    for what, act in (
        ("list the acks", lambda: acked_ranks(store, attempt)),
        ("read them, and check the manifest", lambda: made.append(complete(store, attempt))),
        ("write commit.json", lambda: commit(store, attempt, made[0] or content)),
        ("remove the acks", lambda: remove_acks(store, attempt)),
        ("(a reader) open it", lambda: open_checkpoint(store, attempt.directory)),
    ):
        took = seconds(act)
        rows.append([what, f"{took:.3f}"])
    report.ratios["commit_s"] = Ratio.of([sum(float(row[1]) for row in rows[1:-1])])
    return Table(f"commit of Llama-3 8B at {ranks} ranks, with real ack files on {place}", rows)


def _beside_dcp(sizes: tuple[int, ...]) -> Table:
    """Seconds and bytes of DCP's global plan: its rank 0's work, on plans made by hand."""
    rows = [["DCP, Llama-3 8B, FSDP", "plan, s on rank 0", "metadata, MB"]]
    for n in sizes:
        took, size = _dcp(n)
        rows.append([f"{n} ranks", f"{took:.2f}", f"{size / 1e6:.1f}"])
    return Table("DCP's planner and metadata, which grow with tensors times ranks", rows)


def _dcp(n: int) -> tuple[float, int]:
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    model, plans = MODELS["Llama-3 8B"](), []
    layouts = PARALLELISMS["FSDP"](model, n).layouts
    for rank in range(n):
        items = []
        for fqn, w in model.items():
            for region in layouts[fqn].held.of_file(rank):
                offsets = torch.Size(region.offsets)  # type: ignore[union-attr]
                chunk = ChunkStorageMetadata(offsets, torch.Size(region.sizes))  # type: ignore[union-attr]
                data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(w.shape))
                items.append(WriteItem(MetadataIndex(fqn, offsets, None), WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))
    started = time.perf_counter()
    _, metadata = create_default_global_save_plan(plans)
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return time.perf_counter() - started, buffer.tell()
