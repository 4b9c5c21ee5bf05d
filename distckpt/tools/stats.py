"""Statistics of one tensor of a checkpoint, streamed: however large it is, little of it is in memory at a time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from distckpt.errors import Unsupported
from distckpt.format.box import Box
from distckpt.format.partition import Copies
from distckpt.loading.stream import Stretch, stream
from distckpt.state import torch_dtype
from distckpt.tools.progress import progress

if TYPE_CHECKING:
    from distckpt.loading.open import Checkpoint

_AT_ONCE = 1 << 20
"""Elements that are worked on at once, as float64: several times 8 MiB."""


@dataclass(slots=True)
class Stats:
    """Of the elements that are finite: least, greatest, mean, standard deviation (of all of them, not of a sample), L2
    norm. nan, inf, zero: how many of all are that. Of complex elements both parts count.
    """  # noqa: D205

    elements: int = 0
    nan: int = 0
    inf: int = 0
    zero: int = 0
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    _spread: float = field(default=0.0, repr=False)
    """Sum of squares of what the elements are off their mean."""

    def add(self, values: torch.Tensor) -> None:
        """Take more elements (float64) into account."""
        finite = values[values.isfinite()]
        before = self.elements - self.nan - self.inf
        self.elements += values.numel()
        self.nan += int(values.isnan().sum())
        self.inf += int(values.isinf().sum())
        self.zero += int((values == 0).sum())
        if not (count := finite.numel()):
            return
        low, high = float(finite.min()), float(finite.max())
        self.min = low if self.min is None else min(self.min, low)
        self.max = high if self.max is None else max(self.max, high)
        scale = max(abs(low), abs(high)) or 1.0  # squares of large numbers would be infinite, of small ones zero
        self.norm = math.hypot(self.norm or 0.0, scale * float(torch.linalg.vector_norm(finite / scale)))
        mean = float(finite.mean())
        off = mean - (self.mean or 0.0)
        self._spread += float(((finite - mean) ** 2).sum()) + off * off * before * count / (before + count)
        self.mean = (self.mean or 0.0) + off * count / (before + count)
        self.std = math.sqrt(self._spread / (before + count))

    def to_json(self) -> dict[str, Any]:
        """Its public members."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


def stats_of(checkpoint: Checkpoint, fqn: str) -> Stats:
    """Statistics of a saved tensor; of one of which ranks have values of their own, the first rank's.

    Says how far it is. ValueError where there is none of that name; Corrupt; Unsupported for a dtype that cannot be
    computed with.
    """
    info = checkpoint.manifest.tensors.get(fqn := checkpoint.manifest.aliases.get(fqn, fqn))
    if info is None:
        raise ValueError(f"{checkpoint.name}: no tensor {fqn!r}; {_like(fqn, list(checkpoint.manifest.tensors))}")
    dtype = torch_dtype(info.dtype)
    first = info.partition.first if isinstance(info.partition, Copies) else None
    found = Stats()
    with progress(info.nbytes, fqn) as tell:
        for _, data in stream(checkpoint, [Stretch.whole(fqn, Box.whole(info.shape), info.dtype, first)]):
            part = torch.frombuffer(data, dtype=torch.uint8).view(dtype)
            for piece in part.split(_AT_ONCE):
                found.add(_numbers(piece, info.dtype, fqn))
                tell(piece.nbytes)
    return found


def _numbers(piece: torch.Tensor, dtype: str, fqn: str) -> torch.Tensor:
    try:
        real = torch.view_as_real(piece).flatten() if piece.is_complex() else piece
        return real.to(torch.float64)
    except (RuntimeError, NotImplementedError) as e:
        raise Unsupported(f"{fqn}: this torch does not compute with {dtype}") from e


def _like(fqn: str, names: list[str]) -> str:
    """Say what there is that is called alike."""
    import difflib

    near = [name for name in names if fqn in name][:3] or difflib.get_close_matches(fqn, names, 3)
    return f"there are {', '.join(near)}" if near else f"--tensors lists all {len(names)}"
