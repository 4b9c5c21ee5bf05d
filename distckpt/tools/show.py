"""`distckpt show CHECKPOINT`: what one checkpoint holds, from its manifest and its readable objects.

--tensor FQN reads one tensor, and tells its statistics; --svg OUT draws which rank wrote which part.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt
from distckpt.format.objects import tag
from distckpt.format.partition import Copies, FlatEven, Grid, Partition
from distckpt.format.text import shown
from distckpt.run.lease import lease
from distckpt.signing import fingerprint
from distckpt.tools.answer import Answer, checkpoint_at, save_text, table
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse

    from distckpt.loading.open import Checkpoint


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", metavar="CHECKPOINT", help="a step, `last`, or a run (its newest); a path or URI")
    parser.add_argument("--step", type=int, help="step of the run")
    parser.add_argument("--tensors", action="store_true", help="list every tensor, and how it is divided")
    parser.add_argument("--tensor", metavar="FQN", help="statistics of this tensor, which is read for them")
    parser.add_argument("--svg", type=Path, metavar="OUT", help="write a picture of which rank wrote which part")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    history, checkpoint = checkpoint_at(given.path, given.step)
    if given.svg:
        from distckpt.tools.shardmap import shard_map

        save_text(given.svg, shard_map(checkpoint.manifest))
    if given.tensor is not None:
        with lease(history.store, checkpoint.directory):
            return _one_tensor(checkpoint, given.tensor)
    content = checkpoint.manifest
    parts: Counter[str] = Counter()
    for fqn, info in content.tensors.items():
        parts[fqn.partition(".")[0]] += info.nbytes
    value: dict[str, Any] = {
        "path": str(checkpoint.directory),
        "step": content.step,
        "generation": content.generation,
        "launch": content.launch,
        "attempt": content.attempt,
        "date": content.date,
        "world_size": content.world_size,
        "writer": dict(content.writer),
        "metrics": {name: m if isinstance(m, (int, float)) else str(m) for name, m in content.metrics.items()},
        "keep": content.keep,
        "signed_by": fingerprint(content.signature),
        "tensors": len(content.tensors),
        "partitions": dict(Counter(_kind(info.partition) for info in content.tensors.values())),
        "bytes_of_parts": dict(parts),
        "dtypes": dict(Counter(info.dtype for info in content.tensors.values())),
        "files": len(content.files),
        "bytes": sum(f.size for f in content.files) + sum(o.size for o in content.objects.values()),
        "objects": {name: _object(checkpoint, name) for name in content.objects},
        "objects_of_ranks": dict(content.rank_objects),
    }
    value |= {"svg": str(given.svg)} if given.svg else {}
    lines = [f"{name}: {_line(name, found)}" for name, found in value.items() if found not in ("", {}, None)]
    if given.tensors:
        value["tensors"] = {fqn: [list(i.shape), i.dtype] for fqn, i in content.tensors.items()}
        value["divided"] = {fqn: i.partition.to_json() for fqn, i in content.tensors.items()}
        rows = [(fqn, i.dtype, str(list(i.shape)), divided(i.partition)) for fqn, i in content.tensors.items()]
        lines += ["", *(table(rows) if rows else [])]
    return Answer(lines, value)


def _one_tensor(checkpoint: Checkpoint, fqn: str) -> Answer:
    from distckpt.tools.stats import stats_of  # brings torch along

    stats = stats_of(checkpoint, fqn)
    info = checkpoint.manifest.tensors[checkpoint.manifest.aliases.get(fqn, fqn)]
    value: dict[str, Any] = {
        "path": str(checkpoint.directory),
        "tensor": fqn,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "bytes": info.nbytes,
        "divided": divided(info.partition),
        **stats.to_json(),
    }
    return Answer([f"{name}: {'-' if found is None else found}" for name, found in value.items()], value)


def divided(partition: Partition) -> str:
    """How a tensor is divided over files, in words."""
    if isinstance(partition, Grid):
        cuts = [(d, s) for d, splits in enumerate(partition.splits) for s in splits if s.count > 1]
        parts = ", ".join(f"dimension {d} in {s.count}" for d, s in cuts)
        return f"{parts}, from file {partition.first} on" if cuts else f"whole in file {partition.first}"
    if isinstance(partition, FlatEven):
        return f"flat runs in files {partition.first} to {partition.last_file}"
    if isinstance(partition, Copies):
        return f"{partition.count} copies, each rank's own"
    return f"{len(partition.pieces)} pieces"


def _kind(partition: Partition) -> str:
    if isinstance(partition, Grid) and not partition.last_file - partition.first:
        return "whole"
    return {"Grid": "grid", "FlatEven": "flat", "Copies": "copies", "Pieces": "pieces"}[type(partition).__name__]


def _object(checkpoint: Checkpoint, name: str) -> Any:
    """Object as the format's tagged JSON; why there is none."""
    try:
        return tag(checkpoint.object(name))
    except Corrupt as e:
        return f"damaged: {e}"


def _line(name: str, found: Any) -> str:
    if name == "bytes":
        return f"{size_text(found)} ({found})"
    if name == "bytes_of_parts":
        return ", ".join(f"{part} {size_text(n)}" for part, n in found.items())
    if name == "objects":
        return ", ".join(f"{k} {shown(v)}" for k, v in found.items())
    if isinstance(found, dict):
        return ", ".join(f"{k} {v}" if name in {"dtypes", "partitions"} else f"{k}={v}" for k, v in found.items())
    return str(found)
