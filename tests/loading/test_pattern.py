"""Patterns: the bytes of a piece, however it is cut."""

from __future__ import annotations

from itertools import pairwise, product

from hypothesis import given
from hypothesis import strategies as st

from distckpt.loading.pattern import Need, Pattern, cut, plainest, run, strided


def bytes_of(pattern):
    steps = zip(pattern.sizes, pattern.steps, strict=True)
    return [pattern.start + sum(i) for i in product(*(range(0, n * s, s) for n, s in steps))]


@st.composite
def patterns(draw):
    """A box inside a row-major part: each row as long as the part's, or shorter."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    sizes = [draw(st.integers(1, n)) for n in shape]
    steps, step = [], 1
    for n in reversed(shape):
        steps.insert(0, step)
        step *= n
    found = strided(draw(st.integers(0, 30)), sizes, steps, draw(st.sampled_from([1, 2, 4])))
    return draw(st.sampled_from([found, plainest(found)]))


@given(patterns(), st.integers(0, 200), st.integers(0, 200))
def test_a_cut_holds_exactly_the_bytes_between(pattern, a, b):
    low, high = min(a, b), max(a, b)
    parts = [part for _, part in cut(pattern, low, high)]
    assert [x for part in parts for x in bytes_of(part)] == [x for x in bytes_of(pattern) if low <= x < high]
    assert all(part.steps[-1] == 1 for part in parts)


@given(patterns(), st.lists(st.integers(0, 400), max_size=6))
def test_cuts_one_after_another_are_the_whole(pattern, borders):
    ends = [0, *sorted(borders), 10_000]
    found = [part for low, high in pairwise(ends) for _, part in cut(pattern, low, high)]
    assert [x for part in found for x in bytes_of(part)] == bytes_of(pattern)
    assert sum(part.nbytes for part in found) == pattern.nbytes == len(bytes_of(pattern))
    assert pattern.stop == bytes_of(pattern)[-1] + 1


def test_a_box_that_is_whole_rows_is_one_run():
    assert plainest(strided(8, (3, 4), (4, 1), 4)) == run(8, 56)
    assert plainest(strided(8, (1, 1, 1), (9, 9, 9), 2)) == run(8, 10)
    assert plainest(strided(0, (3, 2), (4, 1), 2)) == Pattern(0, (3, 4), (8, 1))


@given(patterns())
def test_the_plainest_pattern_has_the_same_bytes(pattern):
    assert bytes_of(plainest(pattern)) == bytes_of(pattern)
    assert len(plainest(pattern).sizes) <= len(pattern.sizes)


@given(st.lists(st.tuples(st.integers(0, 2), patterns()), max_size=8), st.integers(0, 60), st.integers(0, 60))
def test_a_need_finds_what_lies_within_and_survives_the_journey(found, a, b):
    low, high = min(a, b), max(a, b)
    need = Need.decode(Need(found).encode())
    assert need.patterns == sorted(found)
    for file in range(3):
        got = [(i, x) for i, part in need.within(file, low, high) for x in bytes_of(part)]
        wanted = [(i, x) for i, (f, p) in enumerate(need.patterns) if f == file for x in bytes_of(p) if low <= x < high]
        assert got == wanted


@given(st.lists(st.tuples(st.integers(0, 2), patterns()), max_size=8))
def test_stretches_are_the_blocks_of_all_that_is_needed(found):
    blocks = {(f, b) for f, p in found for b in range(p.start // 7, -(-p.stop // 7))}
    stretches = list(Need(found).stretches(7))
    assert sorted((f, b) for f, first, stop in stretches for b in range(first, stop)) == sorted(blocks)
