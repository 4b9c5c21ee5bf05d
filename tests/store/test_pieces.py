"""The pieces of a file on their way down: every size around a border, on every kind of file system there is here."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import time

import pytest

from distckpt import system
from distckpt.store import pieces
from distckpt.store.base import FOR_GOOD
from distckpt.store.pieces import ALIGNMENT, BATCH, IN_FLIGHT, LARGE, write_at, write_pieces
from tests import disks

SIZES = [0, 1, ALIGNMENT + 1, LARGE - 1, LARGE, LARGE + 1, LARGE + ALIGNMENT, 3 * BATCH, 5 * BATCH + 17]
CUTS = [BATCH + ALIGNMENT, BATCH - 1, BATCH, 1 << 16]


@pytest.fixture(scope="module")
def content():
    view = memoryview(mmap.mmap(-1, 6 * BATCH))
    view[:] = random.Random(0).randbytes(6 * BATCH)
    return view


@pytest.fixture(params=["disk", "tmpfs", "ramfs"])
def folder(request, tmp_path):
    """ramfs neither takes O_DIRECT nor sets room aside."""
    if request.param == "disk":
        yield tmp_path
        return
    with disks.disk(tmp_path / "disk", request.param, 1 << 30) as target:
        yield target


def written(path, given, size, *, stable):
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        assert write_pieces(descriptor, given, size, stable=stable) == size
    finally:
        os.close(descriptor)
    return path.read_bytes()


def fleeting(given, stable):
    """Pieces of which each is good only while so many more are asked for."""
    ring = [memoryview(mmap.mmap(-1, max(1, *map(len, given)))) for _ in range(stable + 1)] if given else []
    for number, piece in enumerate(given):
        scratch = ring[number % len(ring)]
        scratch[:] = bytes(len(scratch))
        scratch[: len(piece)] = piece
        yield scratch[: len(piece)]


@pytest.mark.parametrize("odd", [0, 8])
@pytest.mark.parametrize("stable", [FOR_GOOD, IN_FLIGHT, 8, 0])
def test_what_is_written_is_what_was_given(folder, content, stable, odd):
    for size in SIZES:
        for cut in CUTS:
            whole = content[odd : odd + size]
            given = [whole[at : at + cut] for at in range(0, size, cut)]
            pieces_ = given if stable == FOR_GOOD else fleeting(given, stable)
            found = written(folder / "x", pieces_, size, stable=stable)
            assert found == bytes(whole), (size, cut)


def test_a_piece_that_is_written_where_it_lies_is_not_reused_before(folder, content, monkeypatch):
    def slow(*arguments):
        time.sleep(0.05)
        write_at(*arguments)

    monkeypatch.setattr(pieces, "write_at", slow)
    ends = [0, BATCH, *range(BATCH + 100, BATCH + 900, 100), 3 * BATCH]
    given = [content[a:b] for a, b in itertools.pairwise(ends)]
    found = written(folder / "x", fleeting(given, IN_FLIGHT), 3 * BATCH, stable=IN_FLIGHT)
    assert found == bytes(content[: 3 * BATCH])


def test_where_no_room_can_be_set_aside_nothing_is_written_for_it(folder):
    descriptor = os.open(folder / "x", os.O_RDWR | os.O_CREAT)
    started = time.process_time()
    try:
        write_pieces(descriptor, [], 1 << 30, stable=FOR_GOOD)
        assert os.fstat(descriptor).st_size in {0, 1 << 30}
    finally:
        os.close(descriptor)
    assert time.process_time() - started < 1, "os.posix_fallocate writes a byte into each block there"


@pytest.mark.parametrize("call", ["is_cached", "mmap"])
def test_where_it_cannot_be_told_what_is_cached_files_are_written_plainly(tmp_path, content, monkeypatch, call):
    def refused(*_):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(pieces, "_past_cache", {})
    real = mmap.mmap
    if call == "mmap":
        monkeypatch.setattr(mmap, "mmap", lambda file, *rest: real(file, *rest) if file < 0 else refused())
    else:
        monkeypatch.setattr(system, "is_cached", refused)
    assert written(tmp_path / "x", [content], len(content), stable=FOR_GOOD) == bytes(content)
    assert set(pieces._past_cache.values()) <= {False}
