"""`distckpt diff A B`: what two checkpoints differ in, in structure and in values. Tensors are read in slabs, verified.

A and B: a run (its newest), a step, `last`, a URI, or what another tool saved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.format.objects import tag
from distckpt.format.partition import Copies
from distckpt.tools.answer import Answer, table
from distckpt.tools.progress import progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from distckpt.loading.open import Checkpoint

_SHOWN = 20


@dataclass(slots=True)
class Apart:
    """How far two tensors are apart. max_rel: greatest |a - b| / max(|a|, |b|). count: elements that differ."""

    fqn: str
    count: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take two slabs into account. NaNs of the same places are equal."""
        import torch

        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        if a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
            return
        x, y = a.to(torch.float64), b.to(torch.float64)
        differs = ~((x == y) | (x.isnan() & y.isnan()))
        self.count += int(differs.sum())
        far = torch.where(differs, (x - y).abs(), 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
        size = torch.maximum(x.abs(), y.abs())
        relative = torch.where(far > 0, far / size, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
        self.max_abs = max(self.max_abs, float(far.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("a", metavar="A", help="a step, `last`, a run (its newest), or what another tool saved")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--only", action="append", metavar="PART", help="compare this part alone, such as model")
    parser.add_argument("--all", action="store_true", help="list every tensor that differs")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command. 1 where they differ."""
    from distckpt.run.source import open_source

    a, b = open_source(given.a), open_source(given.b)
    kept = tuple(given.only or ())
    both, alone_a, alone_b = _names(a.manifest.tensors, b.manifest.tensors, kept)
    unlike = [line for fqn in both if (line := _unlike(a, b, fqn))]
    comparable = [fqn for fqn in both if not _unlike(a, b, fqn)]
    with progress(sum(a.manifest.tensors[fqn].nbytes for fqn in comparable), "diff") as tell:
        compared = [_compared(a, b, fqn, tell) for fqn in comparable]
    apart = sorted((d for d in compared if d.count), key=lambda d: -d.max_rel)
    objects, objects_a, objects_b = _names(a.manifest.objects, b.manifest.objects, kept)
    changed = [name for name in objects if tag(a.object(name)) != tag(b.object(name))]
    value: dict[str, Any] = {
        "only_in_a": [*alone_a, *objects_a],
        "only_in_b": [*alone_b, *objects_b],
        "unlike": unlike,
        "equal": len(comparable) - len(apart),
        "apart": [{"fqn": d.fqn, "count": d.count, "max_abs": d.max_abs, "max_rel": d.max_rel} for d in apart],
        "objects": changed,
    }
    differs = any(value[name] for name in ("only_in_a", "only_in_b", "unlike", "apart", "objects"))
    return Answer(list(_lines(value, apart, _SHOWN if not given.all else len(apart))), value, code=int(differs))


def _names(a: Any, b: Any, kept: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Names that both have, that A alone has, and B alone."""

    def wanted(name: str) -> bool:
        return not kept or any(name == part or name.startswith(f"{part}.") for part in kept)

    return (
        [n for n in a if n in b and wanted(n)],
        [n for n in a if n not in b and wanted(n)],
        [n for n in b if n not in a and wanted(n)],
    )


def _unlike(a: Checkpoint, b: Checkpoint, fqn: str) -> str:
    """Why two tensors cannot be compared value by value; empty if they can."""
    one, other = a.manifest.tensors[fqn], b.manifest.tensors[fqn]
    if one.shape != other.shape:
        return f"{fqn}: shape {list(one.shape)} and {list(other.shape)}"
    if isinstance(one.partition, Copies) or isinstance(other.partition, Copies):
        return f"{fqn}: each rank has values of its own"
    return f"{fqn}: {one.dtype} and {other.dtype}" if one.dtype != other.dtype else ""


def _compared(a: Checkpoint, b: Checkpoint, fqn: str, tell: Callable[[int], None]) -> Apart:
    from distckpt.loading.read import rows_of

    found = Apart(fqn)
    for x, y in zip(rows_of(a, fqn), rows_of(b, fqn), strict=True):
        found.add(x, y)
        tell(x.nbytes)
    return found


def _lines(value: dict[str, Any], apart: Sequence[Apart], most: int) -> Iterator[str]:
    for side in ("a", "b"):
        yield from (f"only in {side.upper()}: {name}" for name in value[f"only_in_{side}"])
    yield from (f"unlike: {line}" for line in value["unlike"])
    yield from (f"differs: object {name}" for name in value["objects"])
    if apart:
        rows = [(d.fqn, str(d.count), f"{d.max_abs:.3g}", f"{d.max_rel:.3g}") for d in apart[:most]]
        yield from table([("tensor", "elements", "max abs", "max rel"), *rows])
    if len(apart) > most:
        yield f"and {len(apart) - most} more (--all)"
    yield f"{value['equal']} tensors are equal, {len(apart)} are apart"
