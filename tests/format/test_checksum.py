"""Sums: known values, and the same whatever pieces the bytes come in."""

from __future__ import annotations

import hashlib
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.format.checksum import BLOCK, BlockSums, crc_of, digest

DATA = bytes(range(251)) * (5 * BLOCK // 502)
"""Two and a half blocks."""


def test_crc_is_the_castagnoli_one():
    assert crc_of([memoryview(b"123456789")]) == 0xE3069283
    assert crc_of([]) == 0


def test_digest_is_blake2b_of_16_bytes():
    assert digest(b"ab", memoryview(b"c")) == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert len(digest()) == 32


@settings(max_examples=15)
@given(
    st.lists(
        st.one_of(st.integers(0, len(DATA)), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])), max_size=6
    )
)
def test_sums_do_not_depend_on_where_the_pieces_end(cuts):
    bounds = [0, *sorted(cuts), len(DATA)]
    sums = BlockSums()
    pieces = [memoryview(DATA)[a:b] for a, b in itertools.pairwise(bounds)]
    for piece in pieces:
        sums.feed(piece)
    whole = [crc_of([memoryview(DATA)[i : i + BLOCK]]) for i in range(0, len(DATA), BLOCK)]
    assert list(sums.finish()) == whole
    assert crc_of(pieces) == crc_of([memoryview(DATA)])


def test_a_full_last_block_is_not_followed_by_an_empty_one():
    sums = BlockSums()
    sums.feed(memoryview(DATA)[: 2 * BLOCK])
    assert len(sums.finish()) == 2
    assert len(BlockSums().finish()) == 0
