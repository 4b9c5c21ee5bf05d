"""Planning and index: a Llama-3-8B's 873 tensors under FSDP, at growing world sizes, beside DCP's planner and metadata.

Ranks are simulated: what is timed is what one rank (ours: any; DCP's: rank 0) computes, and what the index weighs.
"""

from __future__ import annotations

import io
import pickle
import statistics
import time
from math import prod
from typing import TYPE_CHECKING

from benchmarks.report import Report, Table
from benchmarks.rounds import Ratio
from distckpt.format import manifest
from distckpt.format.manifest import FileInfo, Manifest, TensorInfo
from distckpt.format.partition import Grid, Split
from distckpt.saving.agree import Agreed
from distckpt.saving.divide import divide
from distckpt.state import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.options import Options
    from benchmarks.ranks import World


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """Fqn -> shape of Llama-3-8B's 291 parameters and their two Adam moments."""
    blocks: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
        "input_layernorm": (4096,),
        "post_attention_layernorm": (4096,),
    }
    shapes = {f"layers.{i}.{name}.weight": s for i in range(32) for name, s in blocks.items()}
    shapes |= {"embed_tokens.weight": (128256, 4096), "norm.weight": (4096,), "lm_head.weight": (128256, 4096)}
    return {
        name: shape
        for fqn, shape in shapes.items()
        for name in (f"model.{fqn}", f"optim.{fqn}.exp_avg", f"optim.{fqn}.exp_avg_sq")
    }


def agreed(world_size: int) -> dict[str, Agreed]:
    """The tensors, each cut along its first dimension over `world_size` ranks."""
    return {
        fqn: Agreed(s, "float32", Layout(Grid(s, ((Split(world_size, 1),), *((),) * (len(s) - 1)), 0)))
        for fqn, s in llama_shapes().items()
    }


def index_of(world_size: int) -> Manifest:
    """Manifest of a checkpoint of those tensors."""
    tensors = agreed(world_size)
    partitions = divide(tensors)
    infos = {fqn: TensorInfo(t.shape, t.dtype, partitions[fqn]) for fqn, t in tensors.items()}
    size = 81920 + sum(4 * prod(t.shape) for t in tensors.values()) // world_size
    files = tuple(FileInfo(f"rank-{r:05d}.0123456789ab.safetensors", size, 81920, "0" * 32) for r in range(world_size))
    return Manifest(1, 1, 1, "0123456789ab", "2026-01-01T00:00:00+00:00", world_size, infos, files)


def _timed(fn: Callable[[], object], repeat: int = 5) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(repeat):
        started = time.perf_counter()
        fn()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _dcp_metadata_bytes(world_size: int) -> tuple[float, int]:
    """(seconds, bytes) of DCP's global plan for the same tensors: its rank 0's work, on plans made by hand."""
    import torch
    from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    plans = []
    for rank in range(world_size):
        items = []
        for fqn, shape in llama_shapes().items():
            step = -(-shape[0] // world_size)
            start = min(shape[0], step * rank)
            size = min(shape[0], start + step) - start
            if size:
                offsets, sizes = (start, *[0] * (len(shape) - 1)), (size, *shape[1:])
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties(torch.float32), torch.Size(shape))
                index = MetadataIndex(fqn, torch.Size(offsets), None)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        plans.append(SavePlan(items))
    started = time.perf_counter()
    _, metadata = create_default_global_save_plan(plans)
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return time.perf_counter() - started, buffer.tell()


def plan(world: World, options: Options) -> Report:  # noqa: ARG001
    """Plan on rank 0, while the others wait."""
    report = Report("plan")
    if world.rank == 0:
        _plan(report)
    world.barrier()
    return report


def _plan(report: Report) -> None:
    rows = [["ranks", "plan, ms a rank", "commit.json", "open, ms", "DCP plan, s on rank 0", "DCP metadata"]]
    for world_size in (8, 64, 512, 16384, 100_000):
        tensors = agreed(world_size)
        plan = _timed(lambda tensors=tensors: [list(p.of_file(3)) for p in divide(tensors).values()])  # type: ignore[misc]
        data = manifest.encode(index_of(world_size))
        opened = _timed(lambda data=data: manifest.decode(data))  # type: ignore[misc]
        peer = _dcp_metadata_bytes(world_size) if world_size <= 64 else None
        theirs = [f"{peer[0]:.2f}", f"{peer[1] / 1e6:.1f} MB"] if peer else ["-", "-"]
        rows.append([str(world_size), f"{plan * 1e3:.1f}", f"{len(data) / 1e6:.2f} MB", f"{opened * 1e3:.0f}", *theirs])
    report.tables.append(Table("planning and index, Llama-3-8B with Adam (873 tensors), FSDP over N ranks", rows))
    report.ratios["plan_ms"] = Ratio.of([plan * 1e3])
    report.ratios["manifest_bytes"] = Ratio.of([len(data)])
