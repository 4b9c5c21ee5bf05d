"""A sample of the campaign of errors; and that it finds a store that does wrong, of each kind it looks for."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import sys
import tracemalloc
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from distckpt import Checkpointer
from distckpt.errors import DistckptError
from distckpt.store import local
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from tests.faults import errors, syscalls
from tests.faults.errors import Bench, Case, Operation
from tests.faults.sharded import Sharded

SAVE = Operation("save")


@pytest.fixture
def bench(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Bench(tmp_path)


def _at(bench, point):
    """Number of the first such point of a save."""
    return next(n for n, name in enumerate(bench.trace(SAVE), 1) if point in name)


def test_a_sample_of_every_fault_there_is():
    here = [of for of in errors.OPERATIONS if of.wait]
    tally = errors.campaign(seed=3, seconds=60, most=30, among=here)
    assert not tally.problems, str(tally)
    assert tally.cases == 30
    assert tally.figures["faults that were met"] > 20


def test_a_writer_that_can_say_nothing_any_more_is_told_on_every_rank_and_the_job_goes_on(bench):
    of = Operation("save", 2, wait=False, rank=1)
    verdict, problem = bench.judged(Case(of, errno.EIO, 3, forever=True))
    assert verdict == "told", problem


class Wrong(SimpleNamespace):
    """`os` for the local store, but for what is wrong with it."""

    def __getattr__(self, name):
        return getattr(os, name)


def _swallow(descriptor):
    with contextlib.suppress(OSError):
        os.fsync(descriptor)


def _retry(descriptor):
    try:
        os.fsync(descriptor)
    except OSError:
        os.fsync(descriptor)


def _leak(descriptor):
    if not isinstance(sys.exc_info()[1], OSError):
        os.close(descriptor)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"fsync": _swallow}, "a failed fsync is a success"),
        ({"fsync": _retry}, "is tried again"),
        ({"close": _leak}, "leaked descriptors"),
    ],
    ids=["swallows a failed fsync", "tries it again", "leaks a descriptor"],
)
def test_a_store_that_does_wrong_is_found(bench, monkeypatch, wrong, found):
    case = Case(SAVE, errno.EIO, _at(bench, "fsync step-00000003/.tmp-*-rank"), forever=False)
    assert bench.judged(case) == ("told", None)
    monkeypatch.setattr(local, "os", Wrong(**wrong))
    verdict, problem = bench.judged(case)
    assert verdict == "PROBLEM"
    assert found in problem


def test_a_store_that_leaves_temp_files_or_stops_short_is_found(bench, monkeypatch):
    case = Case(SAVE, errno.ENOSPC, _at(bench, "fsync step-00000003/.tmp-*-rank"), forever=False)
    with monkeypatch.context() as patch:
        patch.setattr(local.Path, "unlink", lambda *_, **__: None)
        assert "left behind" in bench.judged(case)[1]
    short = Case(SAVE, errors.SHORT, _at(bench, "pwritev step-00000003/.tmp-*-rank"), forever=True)
    assert bench.judged(short)[0] == "whole"
    monkeypatch.setattr(local, "write_pieces", _once)
    assert bench.judged(short)[0] == "PROBLEM"


def _once(descriptor, pieces, size, **_):
    return sum(os.pwritev(descriptor, [piece], 0) and len(piece) for piece in pieces)


@pytest.mark.parametrize("wait", [True, False])
def test_saves_that_fail_again_and_again_hold_no_more_memory(tmp_path, wait):
    def fail(call):
        if call.name == "fsync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call.make()

    def failed(times):
        for _ in range(times):
            with pytest.raises(DistckptError):
                made = c.save(1, state)
                made.wait() if made else None
        gc.collect()

    state, root = Sharded(0, 1), tmp_path / "run"
    with contextlib.ExitStack() as stack:
        if not wait:
            stack.enter_context(
                syscalls.in_writer(syscalls.plant, str(root), str(tmp_path / "told"), 1, errno.EIO, True)
            )
        c = stack.enter_context(Checkpointer(root, wait=wait, timeout=20))
        c.resume(state)
        if wait:
            stack.enter_context(syscalls.seen(root, fail))
        failed(40)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        writer = None if wait else Path(f"/proc/{c._saver._background._line._process.pid}")
        held, sizes = errors.held(), []
        for _ in range(3):  # what is kept once, such as lines of a source file, is no growth
            sizes.append([tracemalloc.get_traced_memory()[0], *_of_process(writer)])
            failed(20)
        sizes.append([tracemalloc.get_traced_memory()[0], *_of_process(writer)])
        after = errors.held()
        assert len(after["descriptors"] - held["descriptors"]) <= 1  # the heartbeat may be at its file
        assert after["children"] == held["children"]
        assert any(all(b - a < 100 << 10 for a, b in zip(*pair, strict=True)) for pair in pairwise(sizes)), sizes
        assert len({tuple(size[2:]) for size in sizes}) == 1


def _of_process(process):
    """Bytes of its own, and how many descriptors it has."""
    if process is None:
        return []
    pages = int((process / "statm").read_text().split()[5])
    return [pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(process / "fd"))]


def test_signals_that_come_all_the_time_cost_nothing(tmp_path):
    heard = []
    usual = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        with Checkpointer(tmp_path, wait=True) as c:
            state = Sharded(0, 1)
            for step in range(1, 11):
                state.set(step)
                c.save(step, state)
            assert c.load(state, step=5).step == 5
            write_all(LocalStore(tmp_path), "large", bytes(20 << 20))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, usual)
    assert state.is_at(5)
    assert len(heard) > 50
