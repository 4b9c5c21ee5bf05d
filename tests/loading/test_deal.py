"""Who reads what several ranks need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from distckpt.format.checksum import BLOCK
from distckpt.loading.deal import ROUND, UNIT, Amount, deal, pays

_STRETCH = st.tuples(st.integers(0, 2), st.integers(0, 90), st.integers(1, 60))


def _blocks(of_rank):
    return {(f, b) for f, first, n in of_rank for b in range(first, first + n)}


def _stretches(blocks):
    found = []
    for f, b in sorted(blocks):
        if found and found[-1][0] == f and found[-1][2] == b:
            found[-1] = (f, found[-1][1], b + 1)
        else:
            found.append((f, b, b + 1))
    return found


@given(st.lists(st.lists(_STRETCH, max_size=4), min_size=2, max_size=5))
def test_each_block_that_several_need_is_read_by_one_of_them(wanted):
    blocks = [_blocks(of_rank) for of_rank in wanted]
    units = deal([_stretches(of_rank) for of_rank in blocks])
    needed = Counter(block for of_rank in blocks for block in of_rank)
    dealt = Counter((u.file, b) for u in units for b in range(u.first, u.stop))
    assert dealt == {block: 1 for block, n in needed.items() if n > 1}
    assert all((u.file, b) in blocks[u.reader] for u in units for b in range(u.first, u.stop))
    assert units == sorted(units)


@given(st.integers(2, 12), st.integers(1, 900))
def test_what_all_need_is_dealt_out_evenly_and_in_bounded_rounds(ranks, count):
    units = deal([[(0, 0, count)]] * ranks)
    read = Counter()
    for u in units:
        read[u.reader] += u.stop - u.first
    assert max(read.values()) - min(read[r] for r in range(ranks)) <= UNIT
    of_round = Counter()
    for u in units:
        of_round[u.round] += (u.stop - u.first) * BLOCK
    assert all(nbytes <= ROUND + ranks * UNIT * BLOCK for nbytes in of_round.values())


def test_ranks_share_where_parts_of_blocks_are_read_twice_and_where_many_need_the_same():
    alone = Amount(100, 99, 400)
    assert not pays([alone] * 4)
    assert pays([Amount(110, 100, 400)] * 4)
    assert not pays([Amount(400, 400, 400)] * 4)
    assert pays([Amount(400, 400, 400)] * 8)
    assert not pays([Amount(400, 100, 100)])
    assert not pays([Amount(0, 0, 0)] * 8)
