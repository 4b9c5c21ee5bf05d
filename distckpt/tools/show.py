"""`distckpt show CHECKPOINT`: what one checkpoint holds. Reads its manifest and its readable objects, no tensor."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt
from distckpt.format.dtype import item_size
from distckpt.format.objects import tag
from distckpt.format.text import shown
from distckpt.tools.answer import Answer, checkpoint_at, table
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse

    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", metavar="CHECKPOINT", help="a step, `last`, or a run (its newest); a path or URI")
    parser.add_argument("--step", type=int, help="step of the run")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    _, checkpoint = checkpoint_at(given.path, given.step)
    content = checkpoint.manifest
    parts: Counter[str] = Counter()
    for fqn, info in content.tensors.items():
        parts[fqn.partition(".")[0]] += _nbytes(info)
    value: dict[str, Any] = {
        "path": str(checkpoint.directory),
        "step": content.step,
        "generation": content.generation,
        "launch": content.launch,
        "attempt": content.attempt,
        "date": content.date,
        "world_size": content.world_size,
        "writer": dict(content.writer),
        "metrics": {name: m if isinstance(m, int) or m - m == 0 else str(m) for name, m in _numbers(content.metrics)},
        "keep": content.keep,
        "tensors": len(content.tensors),
        "bytes_of_parts": dict(parts),
        "dtypes": dict(Counter(info.dtype for info in content.tensors.values())),
        "files": len(content.files),
        "bytes": sum(f.size for f in content.files) + sum(o.size for o in content.objects.values()),
        "objects": {name: _object(checkpoint, name) for name in content.objects},
        "objects_of_ranks": dict(content.rank_objects),
    }
    lines = [f"{name}: {_line(name, found)}" for name, found in value.items() if found not in ("", {}, None)]
    if given.tensors:
        value["tensors"] = {fqn: [list(info.shape), info.dtype] for fqn, info in content.tensors.items()}
        lines += [
            "",
            *table([(fqn, info.dtype, str(list(info.shape))) for fqn, info in content.tensors.items()] or [("",)]),
        ]
    return Answer(lines, value)


def _object(checkpoint: Checkpoint, name: str) -> Any:
    """Object as the format's tagged JSON; why there is none."""
    try:
        return tag(checkpoint.object(name))
    except Corrupt as e:
        return f"damaged: {e}"


def _numbers(metrics: Any) -> list[tuple[str, Any]]:
    return [(name, m if isinstance(m, (int, float)) else str(m)) for name, m in metrics.items()]


def _line(name: str, found: Any) -> str:
    if name == "bytes":
        return f"{size_text(found)} ({found})"
    if name == "bytes_of_parts":
        return ", ".join(f"{part} {size_text(n)}" for part, n in found.items())
    if name == "objects":
        return ", ".join(f"{k} {shown(v)}" for k, v in found.items())
    if isinstance(found, dict):
        return ", ".join(f"{k} {v}" if name == "dtypes" else f"{k}={v}" for k, v in found.items())
    return str(found)


def _nbytes(info: TensorInfo) -> int:
    return prod(info.shape) * item_size(info.dtype)
