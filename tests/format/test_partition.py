"""Partitions, against brute force over the elements of small tensors and against torch.chunk."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import FormatError
from distckpt.format.box import Box, Run
from distckpt.format.partition import Copies, FlatEven, Grid, Pieces, Split, chunk_of, from_json
from tests.format.draw import damaged, dividing, elements, grids, json_values, partitions, regions, shapes


def chunks_of(partition):
    """Every (file, chunk), by asking each file."""
    return [(file, region) for file in range(partition.last_file + 3) for region in partition.of_file(file)]


@given(dividing)
def test_chunks_are_disjoint_and_cover_the_tensor(partition):
    held = [elements(region, partition.shape) for _, region in chunks_of(partition)]
    together = np.concatenate([np.empty(0, int), *held])
    assert np.array_equal(np.sort(together), np.arange(prod(partition.shape)))


@given(partitions.flatmap(lambda p: st.tuples(st.just(p), regions(p.shape))))
def test_overlapping_names_the_chunks_that_share_an_element_each_once(drawn):
    partition, region = drawn
    chunks = chunks_of(partition)
    if isinstance(partition, Copies):
        chunks = chunks[:1]
    wanted = elements(region, partition.shape)
    expected = Counter((f, c) for f, c in chunks if np.isin(elements(c, partition.shape), wanted).any())
    assert Counter(partition.overlapping(region)) == expected


@given(partitions)
def test_no_file_beyond_the_last_or_before_the_first_holds_a_chunk(partition):
    assert all(file <= partition.last_file for file, _ in chunks_of(partition))
    assert not [r for f in range(-4, 0) for r in partition.of_file(f)]
    partition.check()


@given(partitions)
def test_every_partition_survives_json(partition):
    assert from_json(json.loads(json.dumps(partition.to_json())), partition.shape) == partition


@given(shapes.flatmap(grids))
def test_a_grid_cuts_as_nested_torch_chunk_does(grid):
    index = torch.arange(prod(grid.shape)).reshape(grid.shape)
    expected = {}
    flat = [(d, split) for d, splits in enumerate(grid.splits) for split in splits]
    for chosen in itertools.product(*(range(split.count) for _, split in flat)):
        piece = index
        file = grid.first
        for (d, split), i in zip(flat, chosen, strict=True):
            cut = torch.chunk(piece, split.count, dim=d)
            piece = cut[i] if i < len(cut) else piece.narrow(d, 0, 0)
            file += i * split.stride
        if piece.numel():
            expected[file] = piece.reshape(-1).tolist()
    assert {f: elements(r, grid.shape).tolist() for f, r in chunks_of(grid)} == expected


@given(st.integers(0, 200), st.integers(1, 30))
def test_chunk_of_gives_the_bounds_of_torch_chunk(size, count):
    cut = [] if size == 0 else [len(c) for c in torch.arange(size).chunk(count)]
    cut += [0] * (count - len(cut))
    starts = [0, *itertools.accumulate(cut)][:count]
    assert [chunk_of(3, size, count, i) for i in range(count)] == [(3 + a, n) for a, n in zip(starts, cut, strict=True)]


def test_a_grid_over_an_empty_dimension_has_no_chunks():
    grid = Grid((0, 4), ((Split(2, 1),), ()), 0)
    assert list(grid.overlapping(Box.whole((0, 4)))) == []


def test_an_empty_region_meets_no_chunk():
    grid = Grid((4, 4), ((Split(2, 1),), ()), 0)
    assert list(grid.overlapping(Box((1, 1), (0, 2)))) == []


def test_a_file_before_the_first_of_a_grid_holds_nothing():
    assert list(Grid((4,), ((Split(2, 1),),), 1).of_file(0)) == []


def test_a_region_of_a_wide_flat_buffer_is_found_without_looking_at_every_file():
    partition = FlatEven((1 << 40,), period=1, offset=5, first=0)
    started = time.monotonic()
    assert list(partition.overlapping(Run(1 << 39, (1 << 39) + 1))) == [(5 + (1 << 39), Run(1 << 39, (1 << 39) + 1))]
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("cut", [0, 1])
def test_thousands_of_columns_are_checked_at_once(cut):
    n = 4000
    shape = (2, n) if cut else (n, 2)
    offsets = lambda i: (0, i) if cut else (i, 0)
    partition = Pieces(shape, tuple((0, Box(offsets(i), (2, 1) if cut else (1, 2))) for i in range(n)))
    started = time.monotonic()
    partition.check()
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("ranks", [8, 16384])
def test_an_even_split_is_as_short_for_many_ranks_as_for_few(ranks):
    shape = (4 * 16384, 16)
    digits = lambda p: sum(c.isdigit() for c in json.dumps(p.to_json()))
    length = lambda p: len(json.dumps(p.to_json()))
    grid = Grid(shape, ((Split(ranks, 1),), ()), 0)
    flat = FlatEven(shape, prod(shape) // ranks, 0, 0)
    copies = Copies(shape, 0, ranks)
    assert [length(p) - digits(p) for p in (grid, flat, copies)] == [
        len('{"grid": [[[, ]]], "file": }'),
        len('{"flat": [, ], "file": , "stride": }'),
        len('{"copies": , "file": , "stride": }'),
    ]
    assert max(map(length, (grid, flat, copies))) < 60


def test_own_copies_are_told_by_rank():
    copies = Copies((3,), first=1, count=3, stride=2)
    assert [copies.copy_of(rank) for rank in range(8)] == [None, 1, None, 3, None, 5, None, None]


@pytest.mark.parametrize(
    ("shape", "pieces", "message"),
    [
        ((4,), [(0, Run(0, 5))], "outside"),
        ((4,), [(0, Box((3,), (2,)))], "outside"),
        ((4,), [(-1, Run(0, 4))], "outside"),
        ((4,), [(0, Run(0, 3))], "add up"),
        ((4,), [(0, Run(0, 3)), (1, Run(1, 2))], "overlap"),
        ((2, 4), [(0, Box((0, 0), (2, 2))), (1, Box((1, 1), (1, 2))), (2, Run(2, 4))], "overlap"),
        ((), [(0, Box((), ())), (1, Box((), ()))], "add up"),
        ((2, 3), [(0, Box((0, 0), (2, 2))), (1, Run(4, 6))], "overlap"),
    ],
)
def test_pieces_that_do_not_cover_the_tensor_once_are_refused(shape, pieces, message):
    with pytest.raises(FormatError, match=message):
        Pieces(shape, tuple(pieces)).check()


@given(shapes.filter(lambda s: prod(s) > 0).flatmap(lambda s: st.tuples(st.just(s), st.lists(regions(s), max_size=4))))
def test_check_passes_exactly_the_pieces_that_hold_each_element_once(drawn):
    shape, found = drawn
    held = Counter(i for region in found for i in elements(region, shape).tolist())
    whole = held == Counter(range(prod(shape)))
    try:
        Pieces(shape, tuple((0, r) for r in found)).check()
        passed = True
    except FormatError:
        passed = False
    assert passed == whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split(0, 1),
        lambda: Split(2, -1),
        lambda: Grid((4,), (), 0),
        lambda: Grid((4,), ((),), -1),
        lambda: Grid((4,), ((Split(2, 0),),), 0),
        lambda: Grid((4, 4), ((Split(2, 1),), (Split(2, 1),)), 0),
        lambda: Grid((4, 4), ((Split(3, 1),), (Split(2, 2),)), 0),
        lambda: FlatEven((4,), 0, 0, 0),
        lambda: FlatEven((4,), 1, -1, 0),
        lambda: FlatEven((4,), 1, 0, -1),
        lambda: FlatEven((4,), 1, 0, 0, 0),
        lambda: Copies((4,), -1, 1),
        lambda: Copies((4,), 0, 0),
        lambda: Copies((4,), 0, 1, 0),
    ],
)
def test_numbers_that_make_no_partition_are_refused(make):
    with pytest.raises(FormatError):
        make()


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"file": "0"},
        {"file": 0, "grid": [[[1]]]},
        {"file": 0, "grid": [[[2, 1]], [], []]},
        {"file": 0, "grid": {}},
        {"file": 0, "more": 1},
        {"flat": [4], "file": 0, "stride": 1},
        {"flat": [4, 0], "file": 0},
        {"copies": 2, "file": 0},
        {"pieces": [[0, 2, 1]]},
        {"pieces": [[0, [0], [1]]]},
        {"pieces": [[0, [0, -1], [1, 1]]]},
        {"pieces": 3},
    ],
)
def test_json_that_is_no_partition_is_refused(data):
    with pytest.raises(FormatError):
        from_json(data, (4, 4))


def accepted(data, shape):
    """Partition in the JSON, or None; any error but FormatError goes through."""
    try:
        partition = from_json(data, shape)
        if partition.last_file < 64:
            partition.check()
            chunks_of(partition)
    except FormatError:
        return None
    return partition


@given(json_values, shapes)
def test_any_json_is_a_format_error_or_a_partition_that_survives_json(data, shape):
    partition = accepted(data, shape)
    assert partition is None or from_json(partition.to_json(), shape) == partition


@given(partitions.flatmap(lambda p: st.tuples(damaged(p.to_json()), st.just(p.shape))))
def test_a_damaged_partition_is_a_format_error_or_another_partition(drawn):
    data, shape = drawn
    partition = accepted(data, shape)
    assert partition is None or from_json(partition.to_json(), shape) == partition
