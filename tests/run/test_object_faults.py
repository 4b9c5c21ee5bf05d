"""Requests of a save or a load that fail, are lost, cut off or late: it is whole, or every rank is told and nothing lost."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from distckpt import Checkpointer
from distckpt.errors import DistckptError
from distckpt.store.object import ObjectStore
from tests import layouts
from tests.faults.sharded import Sharded, on_threads
from tests.store import servers
from tests.store.faulty import Fault, Faulty

TWO = 2
PATIENCE = 2.0
"""Seconds for which the store tries again."""

SAVE_FAULTS = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "reset in the upload": Fault(upload=100),
    "reset at once": Fault(upload=0),
    "answer lost": Fault(lost=True),
    "answer cut off": Fault(body=20),
}


@pytest.fixture
def proxy():
    with Faulty(servers.start("moto").bucket().address) as proxy:
        yield proxy


class Run(NamedTuple):
    """A run of two ranks, threads here, to which requests go by way of a proxy."""

    proxy: Faulty
    store: ObjectStore
    direct: ObjectStore

    @staticmethod
    def made(proxy):
        """An empty one."""
        bucket = servers.start("moto").bucket()
        slow = bucket.at(proxy.endpoint).options
        return Run(proxy, ObjectStore(bucket.uri, slow, timeout=PATIENCE), ObjectStore(bucket.uri, bucket.options))

    def saved(self, fault, at=0, times=1):
        """Save step 1; step 2, in which the `at`-th request and the next suffer a fault; then step 3 without.

        Returns each rank's error at 2 and at 3 (None where it succeeded), and how many requests step 2 took.
        """

        def work(comm):
            state = Sharded(comm.rank, TWO, 1)
            with Checkpointer(self.store, comm=comm, wait=True) as c:
                c.save(1, state)
                comm.all_gather("saved", b"")
                if comm.rank == 0:
                    self.proxy.clear()
                    self.proxy.on(".", fault, after=at, times=times)
                comm.all_gather("armed", b"")
                state.set(2)
                second = _error(lambda: c.save(2, state))
                comm.all_gather("failed", b"")
                if comm.rank == 0:
                    count.append(len(self.proxy.requests))
                    self.proxy.clear()
                comm.all_gather("mended", b"")
                state.set(3)
                return second, _error(lambda: c.save(3, state))

        count = []
        with layouts.quiet():  # a fault in last.json or meta.json is a warning: the checkpoint is committed
            results = on_threads(TWO, work, timeout=60)
        for result in results:
            if isinstance(result, Exception):
                raise result
        seconds, thirds = zip(*results, strict=True)
        return list(seconds), list(thirds), sum(count)

    def loads(self, step):
        """Whether every rank finds this step whole."""

        def work(comm):
            state = Sharded(comm.rank, TWO)
            with Checkpointer(self.direct, comm=comm, wait=True) as c:
                c.load(state, step=step)
            return state.is_at(step)

        return on_threads(TWO, work) == [True] * TWO


def _error(fn):
    try:
        fn()
    except DistckptError as e:
        return str(e)


def _check_save(proxy, fault, at, times=1):
    """Break a save at one request, and check all that must hold. Returns whether it took as many requests."""
    run = Run.made(proxy)
    errors, after, count = run.saved(fault, at, times)
    where = f"{fault}, {times} from request {at} on: {errors}, {after}"
    assert after == [None] * TWO, where
    steps = Checkpointer(run.direct, wait=True).steps()
    assert 1 in steps, where
    assert 3 in steps, where
    assert all(run.loads(step) for step in steps), where
    if any(errors):
        assert all(errors), f"some ranks believe in the save: {where}"
        assert all("rank " in error and re.search("s3://|step-00000002", error) for error in errors), where
    else:
        assert 2 in steps, where
    return count > at


@pytest.mark.parametrize(("name", "at"), [*zip(SAVE_FAULTS, (1, 4, 6, 9, 12, 15, 18), strict=True)])
def test_a_request_of_a_save_that_fails_once_costs_nothing_or_is_told_on_every_rank(proxy, name, at):
    assert _check_save(proxy, SAVE_FAULTS[name], at)


@pytest.mark.parametrize(("name", "at"), [("503", 2), ("answer lost", 8), ("reset in the upload", 11)])
def test_requests_that_fail_from_one_on_are_told_on_every_rank(proxy, name, at):
    assert _check_save(proxy, SAVE_FAULTS[name], at, times=1 << 30)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SAVE_FAULTS)
def test_the_same_holds_for_every_request_there_is(proxy, name):
    at = 0
    while _check_save(proxy, SAVE_FAULTS[name], at):
        at += 1
    assert at > 20


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["503", "reset in the upload", "answer lost"])
def test_the_same_holds_for_requests_that_fail_from_any_on(proxy, name):
    at = 0
    while _check_save(proxy, SAVE_FAULTS[name], at, times=1 << 30):
        at += 2
    assert at > 20


# -- loads -------------------------------------------------------------------------------------------------------------

LOAD_FAULTS = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "reset at once": Fault(upload=0),
    "answer lost": Fault(lost=True),
    "answer cut off": Fault(body=100),
    "a bit flipped": Fault(flip=300),
}
FILES = "GET .*/(rank|commit|trainer_state)"


def _check_load(run, fault, at, times=1):
    """Break a load at one request of a file. Returns whether it took as many."""
    run.proxy.clear()
    run.proxy.on(FILES, fault, after=at, times=times)

    def work(comm):
        state = Sharded(comm.rank, TWO)
        with Checkpointer(run.store, comm=comm, wait=True) as c:
            return _error(lambda: c.load(state)) or state.value, state.is_at(state.value)

    with layouts.quiet():
        results = on_threads(TWO, work, timeout=60)
    where = f"{fault}, {times} from request {at} on: {results}"
    assert not [r for r in results if isinstance(r, Exception)], where
    said, whole = zip(*results, strict=True)
    if said[0] in {2, 3}:  # of a bit that was flipped, all fall back
        assert len(set(said)) == 1, where
        assert all(whole), where
        assert said[0] == 3 or fault.flip, where
    else:
        assert all(isinstance(one, str) for one in said), where
        assert times > 1, where
    return run.proxy.count(FILES) > at


@pytest.mark.parametrize("name", LOAD_FAULTS)
def test_an_answer_that_fails_once_is_asked_for_again_and_a_wrong_one_never_taken(proxy, name):
    run = Run.made(proxy)
    run.saved(Fault())
    for at in (0, 3, 5):
        assert _check_load(run, LOAD_FAULTS[name], at)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("times", [1, 1 << 30], ids=["once", "forever"])
@pytest.mark.parametrize("name", LOAD_FAULTS)
def test_the_same_holds_for_every_file_that_is_read(proxy, name, times):
    run = Run.made(proxy)
    run.saved(Fault())
    at = 0
    while _check_load(run, LOAD_FAULTS[name], at, times):
        at += 1
    assert at > 5
