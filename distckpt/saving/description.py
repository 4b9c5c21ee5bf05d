"""What a rank holds, as JSON that is equal on ranks which hold alike."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from distckpt.format import partition
from distckpt.format.partition import FlatEven, Grid, Pieces, Split
from distckpt.state import Everywhere, Layout, Listed, RankObject

if TYPE_CHECKING:
    from distckpt.format.box import Shape
    from distckpt.state import State


_BOOL = ("false", "true")


def dump(value: Any) -> bytes:
    """JSON, always the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def described(state: State) -> bytes:
    """JSON of what this rank holds; equal on ranks that hold alike."""
    quoted = json.encoder.encode_basestring_ascii
    tensors = ",".join(
        f'{quoted(fqn)}:[{list(t.shape)},"{t.dtype}",{_layout_text(t.layout)},{_BOOL[t.trusted]},{_BOOL[t.frozen]}]'
        for fqn, t in sorted(state.tensors.items())
    )
    objects = {n: v.on_reshard if isinstance(v, RankObject) else None for n, v in state.objects.items()}
    rest = dump({"aliases": state.aliases, "objects": objects})
    return rest[:-1] + b',"tensors":{' + tensors.encode() + b"}}"


def _layout_text(layout: Layout | Everywhere | Listed) -> str:
    if isinstance(layout, Layout):
        return _regular_text(layout)
    return dump(layout.pieces.to_json()).decode() if isinstance(layout, Listed) else "null"


@lru_cache(maxsize=1 << 14)
def _regular_text(layout: Layout) -> str:
    """JSON of a layout: a model has few, each for many tensors."""
    return dump([layout.held.to_json(), [[s.count, s.stride] for s in layout.replicas]]).decode()


def layout_from_json(data: Any, shape: Shape, first: int, steps: Split | None) -> Layout | Listed:
    """Layout of a tensor that a group of ranks describes: its first rank, and its ranks as a stride if they are one."""
    if data is None:
        return Layout(Grid(shape, ((),) * len(shape), first), (steps,) if steps and steps.count > 1 else ())
    if isinstance(data, dict):
        pieces = partition.from_json(data, shape)
        assert isinstance(pieces, Pieces)
        return Listed(pieces)
    held = partition.from_json(data[0], shape)
    assert isinstance(held, (Grid, FlatEven))
    return Layout(held, tuple(Split(*s) for s in data[1]))
