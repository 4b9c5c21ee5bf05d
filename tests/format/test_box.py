"""Boxes and flat runs, against indexing of a small array."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.format.box import Box, Run, flat_extent, overlap_numel, overlaps, parts, spans, strides
from tests.format.draw import boxes, elements, regions, runs, shapes

shape_and_region = shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s)))
shape_and_two = shapes.flatmap(lambda s: st.tuples(st.just(s), regions(s), regions(s)))


@given(shape_and_region)
def test_parts_lie_one_after_another_in_the_memory_of_their_region(drawn):
    shape, region = drawn
    memory = elements(region, shape)
    position = 0
    for part in parts(region, shape):
        assert part.start == position
        assert part.box.fits(shape)
        position += part.box.numel
        assert np.array_equal(elements(part.box, shape), memory[part.start : position])
    assert position == len(memory) == region.numel


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), runs(s))))
def test_a_run_of_an_n_dimensional_tensor_is_at_most_2n_minus_1_parts(drawn):
    shape, run = drawn
    assert sum(1 for _ in parts(run, shape)) <= max(1, 2 * len(shape) - 1)


@given(shape_and_two)
def test_overlaps_hold_each_common_element_exactly_once(drawn):
    shape, a, b = drawn
    found = list(overlaps(a, b, shape))
    common = np.intersect1d(elements(a, shape), elements(b, shape))
    got = np.concatenate([np.empty(0, int), *(elements(o.box, shape) for o in found)])
    assert np.array_equal(np.sort(got), common)
    assert overlap_numel(a, b, shape) == len(common)
    for o in found:
        assert o.source.box.intersect(o.box) == o.target.box.intersect(o.box) == o.box
        assert o.source in list(parts(a, shape))
        assert o.target in list(parts(b, shape))


@given(shape_and_region.flatmap(lambda d: st.tuples(st.just(d), boxes(d[0]))), st.integers(1, 60), st.booleans())
def test_spans_cut_a_box_into_short_stretches_of_memory(drawn, limit, in_place):
    (shape, region), box = drawn
    memory = elements(region, shape)
    for part in parts(region, shape):
        common = part.box.intersect(box)
        if common is None:
            continue
        found = list(spans(part, common, limit=limit, in_place=in_place))
        got = np.concatenate([elements(s.box, shape) for s in found])
        assert np.array_equal(got, elements(common, shape))
        for s in found:
            inside = elements(s.box, shape)
            stretch = memory[s.start : s.start + s.extent]
            assert len(stretch) == s.extent
            assert (stretch[0], stretch[-1]) == (inside[0], inside[-1])
            assert np.isin(inside, stretch).all()
            assert s.contiguous == (len(inside) == s.extent)
            assert s.extent <= limit or (in_place and s.contiguous)


def test_an_empty_box_has_no_spans():
    part = next(parts(Box.whole((4, 4)), (4, 4)))
    assert list(spans(part, Box((1, 1), (3, 0)), limit=8)) == []


def test_a_contiguous_box_is_one_span_in_place_however_long():
    part = next(parts(Box.whole((100, 8)), (100, 8)))
    (span,) = spans(part, Box((10, 0), (80, 8)), limit=1, in_place=True)
    assert (span.start, span.extent, span.contiguous) == (80, 640, True)


@given(shape_and_region)
def test_the_flat_extent_is_the_shortest_run_that_holds_a_region(drawn):
    shape, region = drawn
    inside = elements(region, shape)
    run = flat_extent(region, shape)
    if len(inside):
        assert (run.start, run.stop) == (inside.min(), inside.max() + 1)
    else:
        assert run.numel == 0


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), boxes(s), boxes(s))))
def test_intersect_agrees_with_indexing_and_knows_no_order(drawn):
    shape, a, b = drawn
    common = a.intersect(b)
    assert common == b.intersect(a)
    inside = elements(common, shape) if common else np.empty(0, int)
    assert np.array_equal(inside, np.intersect1d(elements(a, shape), elements(b, shape)))


@given(shapes.filter(lambda s: prod(s) > 0))
def test_strides_are_those_of_a_contiguous_array(shape):
    item = 8
    array = np.zeros(shape, np.int64)
    assert all(s * item == got for s, n, got in zip(strides(shape), shape, array.strides, strict=True) if n > 1)


def test_the_whole_of_a_0_d_tensor_is_one_element():
    assert Box.whole(()) == Box((), ())
    assert Box.whole(()).numel == 1
    assert [p.box for p in parts(Run(0, 1), ())] == [Box((), ())]


def test_relative_to_moves_the_origin():
    assert Box((5, 7), (2, 1)).relative_to(Box((4, 7), (9, 9))) == Box((1, 0), (2, 1))


@pytest.mark.parametrize("make", [lambda: Box((0,), (1, 1)), lambda: Box((-1,), (1,)), lambda: Box((0,), (-1,))])
def test_a_box_with_a_negative_or_missing_number_is_refused(make):
    with pytest.raises(ValueError, match="not a box"):
        make()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2)])
def test_a_run_that_ends_before_it_begins_is_refused(start, stop):
    with pytest.raises(ValueError, match="not a flat run"):
        Run(start, stop)


def test_fits_tells_what_lies_outside_a_shape():
    assert Box((1, 1), (2, 2)).fits((3, 3))
    assert not Box((2, 1), (2, 2)).fits((3, 3))
    assert not Box((0,), (1,)).fits((1, 1))
    assert Run(0, 6).fits((2, 3))
    assert not Run(0, 7).fits((2, 3))
