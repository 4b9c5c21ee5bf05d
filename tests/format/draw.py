"""Hypothesis strategies for values of the format, and the oracle: a tensor whose elements are their own flat index."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from distckpt.format.box import Box, Region, Run
from distckpt.format.partition import Copies, FlatEven, Grid, Pieces, Split

SIZES = st.sampled_from([0, 1, 1, 2, 3, 4, 5, 7, 11, 13])
"""Sizes of a dimension: none, one, primes, and some that divide."""

shapes = st.lists(SIZES, max_size=4).map(tuple).filter(lambda s: prod(s) <= 1500)


def elements(region: Region, shape: tuple[int, ...]) -> np.ndarray:
    """Flat indices of a region's elements, in the order of its memory."""
    index = np.arange(prod(shape)).reshape(shape)
    if isinstance(region, Run):
        return index.reshape(-1)[region.start : region.stop]
    return index[tuple(slice(a, a + n) for a, n in zip(region.offsets, region.sizes, strict=True))].reshape(-1)


@st.composite
def boxes(draw, shape):
    offsets = [draw(st.integers(0, n)) for n in shape]
    return Box(tuple(offsets), tuple(draw(st.integers(0, n - a)) for a, n in zip(offsets, shape, strict=True)))


@st.composite
def runs(draw, shape):
    start = draw(st.integers(0, prod(shape)))
    return Run(start, draw(st.integers(start, prod(shape))))


def regions(shape):
    return st.one_of(boxes(shape), runs(shape), st.just(Box.whole(shape)))


@st.composite
def grids(draw, shape):
    counts = [draw(st.lists(st.integers(1, 5), max_size=2)) for _ in shape]
    flat = [(d, k) for d, dim in enumerate(counts) for k in range(len(dim))]
    reach, strides = 0, {}
    for d, k in draw(st.permutations(flat)):
        if counts[d][k] == 1:
            strides[d, k] = draw(st.integers(0, 3))
        else:
            strides[d, k] = reach + draw(st.integers(1, 3))
            reach += (counts[d][k] - 1) * strides[d, k]
    splits = tuple(tuple(Split(n, strides[d, k]) for k, n in enumerate(dim)) for d, dim in enumerate(counts))
    return Grid(shape, splits, draw(st.integers(0, 5)))


@st.composite
def flats(draw, shape):
    return FlatEven(
        shape,
        period=draw(st.integers(1, prod(shape) + 5)),
        offset=draw(st.integers(0, 40)),
        first=draw(st.integers(0, 4)),
        stride=draw(st.integers(1, 3)),
    )


@st.composite
def pieces(draw, shape):
    """Boxes made by cutting boxes in two, or runs between cut points; shuffled over files."""
    if draw(st.booleans()):
        cuts = sorted(draw(st.lists(st.integers(0, prod(shape)), max_size=6)))
        found: list[Region] = [Run(a, b) for a, b in zip([0, *cuts], [*cuts, prod(shape)], strict=True)]
    else:
        found = [Box.whole(shape)]
        for _ in range(draw(st.integers(0, 6)) if shape else 0):
            box = found.pop(draw(st.integers(0, len(found) - 1)))
            d = draw(st.integers(0, len(shape) - 1))
            cut = draw(st.integers(0, box.sizes[d]))
            found += [_side(box, d, 0, cut), _side(box, d, cut, box.sizes[d] - cut)]
    return Pieces(shape, tuple((draw(st.integers(0, 5)), p) for p in draw(st.permutations(found))))


def _side(box: Box, d: int, start: int, size: int) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[d] += start
    sizes[d] = size
    return Box(tuple(offsets), tuple(sizes))


def copies(shape):
    small = st.integers(1, 4)
    return st.builds(Copies, st.just(shape), st.integers(0, 4), small, small)


dividing = shapes.flatmap(lambda s: st.one_of(grids(s), flats(s), pieces(s)))
"""Partitions whose chunks are disjoint and cover the tensor."""

partitions = shapes.flatmap(lambda s: st.one_of(grids(s), flats(s), pieces(s), copies(s)))

json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 20),
        st.integers(),
        st.sampled_from([2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**3000]),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=6),
        st.sampled_from(["$int", "$bytes", "$dict", "file", "grid", "float32", "../x", "0x1", "a" * 32]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.text(max_size=4),
                st.sampled_from(["file", "grid", "flat", "stride", "pieces", "copies", "$set", "$tuple", "$counter"]),
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
"""Any JSON, with a taste for the words of the format."""


@st.composite
def damaged(draw, value):
    """`value` (JSON) with one node, anywhere in it, dropped or replaced."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        changed = value.copy()
        if draw(st.integers(0, 9)):
            changed[key] = draw(damaged(value[key]))
        else:
            del changed[key]
        return changed
    return draw(json_values)
