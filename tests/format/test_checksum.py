"""Sums: known values, and the same whatever pieces the bytes come in."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.format.checksum import BLOCK, CRC32C, SHA256, algorithm_of, crc_of, digest, matches

DATA = bytes(range(251)) * (5 * BLOCK // 502)
"""Two and a half blocks."""


def test_crc_is_the_castagnoli_one():
    assert crc_of([memoryview(b"123456789")]) == 0xE3069283
    assert crc_of([]) == 0


def test_digest_is_blake2b_of_16_bytes():
    assert digest(b"ab", memoryview(b"c")) == hashlib.blake2b(b"abc", digest_size=16).hexdigest()
    assert len(digest()) == 32


@pytest.mark.parametrize("algorithm", [CRC32C, SHA256], ids=lambda a: a.name)
def test_a_digest_tells_by_its_length_whose_it_is(algorithm):
    found = algorithm.digest(b"ab", memoryview(b"c"))
    assert algorithm_of(found) is algorithm
    assert len(found) == 2 * algorithm.digest_size
    assert matches(found, b"abc")
    assert not matches(found, b"abd")
    assert not matches(found[:-2], b"abc")


@pytest.mark.parametrize("algorithm", [CRC32C, SHA256], ids=lambda a: a.name)
@settings(max_examples=15)
@given(
    st.lists(
        st.one_of(st.integers(0, len(DATA)), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])), max_size=6
    )
)
def test_sums_do_not_depend_on_where_the_pieces_end(algorithm, cuts):
    bounds = [0, *sorted(cuts), len(DATA)]
    sums = algorithm.blocks()
    pieces = [memoryview(DATA)[a:b] for a, b in itertools.pairwise(bounds)]
    for piece in pieces:
        sums.feed(piece)
    whole = [memoryview(DATA)[i : i + BLOCK] for i in range(0, len(DATA), BLOCK)]
    assert sums.finish() == b"".join(algorithm.sum_of([block]) for block in whole)
    assert algorithm.sum_of(pieces) == algorithm.sum_of([memoryview(DATA)])


def test_the_sums_of_blocks_are_crc32c_and_sha256():
    block = memoryview(DATA)[:BLOCK]
    assert CRC32C.sum_of([block]) == crc_of([block]).to_bytes(4, "little")
    assert SHA256.sum_of([block]) == hashlib.sha256(block).digest()


@pytest.mark.parametrize("algorithm", [CRC32C, SHA256], ids=lambda a: a.name)
def test_a_full_last_block_is_not_followed_by_an_empty_one(algorithm):
    sums = algorithm.blocks()
    sums.feed(memoryview(DATA)[: 2 * BLOCK])
    assert len(sums.finish()) == 2 * algorithm.size
    assert algorithm.blocks().finish() == b""
