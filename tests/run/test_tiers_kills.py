"""A local directory in front of an object store: what is lost on the way is made good, and nothing is sent twice."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import warnings

import pytest

from distckpt import Checkpointer, Keep, Local
from distckpt.run.events import Following
from distckpt.store.object import ObjectStore
from tests import ranks
from tests.run import lives
from tests.store import servers
from tests.store.faulty import Fault, Faulty

ROWS = 240
"""Of the program's smaller matrix here: a checkpoint of some 280 kB."""
DATA = r"PUT .*/step-\d+/(rank|trainer_state|sampler_state|optim)"


@pytest.fixture
def bucket():
    return servers.start("moto").bucket()


@pytest.fixture
def proxy(bucket):
    with Faulty(bucket.address) as proxy:
        yield proxy


@pytest.fixture
def far(bucket, proxy):
    """The far store by way of the proxy, with little patience."""
    return ObjectStore(bucket.uri, bucket.at(proxy.endpoint).options, timeout=2)


@pytest.fixture
def whole(bucket):
    """The same, directly."""
    return ObjectStore(bucket.uri, bucket.options)


@contextlib.contextmanager
def job(far, near, *, says="", local=None, **options):
    """A job of one rank in this process, resumed: its Checkpointer, and what trains a step and saves it.

    says: what its warnings must match, each of them; "" for none.
    """
    training = lives.Training(ROWS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpointer(far, local=Local(near, **(local or {})), timeout=30, **options) as c:
            report = c.resume(training.state)

            def step():
                training.step()
                return c.save(training.progress.global_step, training.state)

            yield c, report, step
    told = [str(w.message) for w in caught]
    assert bool(told) == bool(says), told
    assert all(re.search(says, text) for text in told), told


def sent(proxy, since=0):
    """Keys of data that were put, in order, since so many requests."""
    lines = [request.line for request in proxy.requests[since:]]
    return [line.partition("/run/")[2].partition("?")[0] for line in lines if re.match(DATA, line)]


def keys(store):
    """Every data key that is there."""
    return {
        f"{directory.name}/{entry.name}"
        for directory in store.list("")
        if directory.name.startswith("step-")
        for entry in store.list(directory.name)
        if not entry.name.startswith(("commit", "ack"))
    }


def same(store, near, steps):
    for step in steps:
        assert lives.saved(store, step, ROWS) == lives.saved(near, step, ROWS), step


# -- kills -------------------------------------------------------------------------------------------------------------


def _story(bucket, whole, proxy, folder, draw, kills):
    """Lives on two ranks that are killed while they replicate, then one that is not. Returns who was, and when."""
    near, told, left = folder / "near", [], []
    given = bucket.at(proxy.endpoint).environment, bucket.uri, str(folder / "log")
    more = None, {"local": Local(near, keep=Keep(last=20))}, ROWS
    proxy.bandwidth(400_000)  # a checkpoint takes the better part of a second
    for life in range(kills):
        whom, after = draw.choice(["all", "ranks", "writers"]), len(sent(proxy)) + draw.randrange(1, 6)
        ready = lambda after=after: len(sent(proxy)) >= after
        left += lives.live_and_die(2, ready, whom, folder / f"{life}", *given, 3 * life + 3, *more, 0.2)
        told.append((whom, after, keys(whole), len(proxy.requests)))
    proxy.bandwidth(None)
    ranks.run(2, lives.train, *given, 3 * kills + 1, *more)
    lives.until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in left))
    for whom, after, there, since in told:
        assert not there & set(sent(proxy, since)), f"{whom} killed after {after} files: sent again what was there"
    again = len(sent(proxy)) - len(set(sent(proxy)))
    assert again <= kills, f"{again} files were sent twice"
    steps = lives.counting(whole)
    assert steps == lives.counting(near)
    assert steps[-1] == 3 * kills + 1
    same(whole, near, steps)
    lives.check_each_once(folder / "log", 3 * kills + 1)
    return [(whom, after, len(there)) for whom, after, there, _ in told], again


def test_a_replication_that_is_killed_goes_on_with_what_lacks(bucket, whole, proxy, tmp_path):
    _story(bucket, whole, proxy, tmp_path, random.Random(1), 1)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_holds_for_four_kills_in_a_row(bucket, whole, proxy, tmp_path, seed):
    print(_story(bucket, whole, proxy, tmp_path, random.Random(seed), 4))


# -- the far store -----------------------------------------------------------------------------------------------------


def test_a_far_store_that_is_down_costs_no_save_and_is_caught_up_with(proxy, far, whole, tmp_path):
    with job(far, tmp_path, says="replicating to .*503") as (_, _, step):
        proxy.on(".", Fault(status=503), times=1 << 30)
        for _ in range(3):
            step().wait()
        lives.until(lambda: _events(tmp_path, "behind"))
        assert lives.counting(tmp_path) == [2, 3]
        assert lives.counting(whole) == []
        proxy.clear()
        lives.until(lambda: lives.counting(whole)[-1:] == [3])
        step().wait()
    assert lives.counting(whole)[-2:] == [3, 4]
    same(whole, tmp_path, [3, 4])


def _events(near, name):
    return [event for event in Following(near).look() if event["event"] == name]


def test_a_far_store_that_lags_is_told_of_and_gets_no_more_bytes_a_second_than_it_may(far, whole, tmp_path):
    local = {"bandwidth": "200 kB", "behind": "0.5 s"}
    with job(far, tmp_path, local=local, says="is behind: it has lacked step-0000000[12]") as (_, _, step):
        for _ in range(2):
            step().wait()
        lives.until(lambda: lives.counting(whole) == [1, 2])
    rates = [event["bytes"] / event["seconds"] for event in _events(tmp_path, "replicated")]
    assert len(rates) == 2
    assert all(20_000 < rate <= 200_000 for rate in rates), rates


ELSEWHERE = "a later launch, elsewhere, has resumed this run: nothing is sent|lacks the newest checkpoint still"


def test_what_an_earlier_launch_saves_on_another_machine_is_not_sent(proxy, far, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")  # else the second would not begin while the first lives
    with job(far, tmp_path / "one", says=ELSEWHERE) as (_, _, step):
        step().wait()
        lives.until(lambda: lives.counting(whole) == [1])
        before = len(sent(proxy))
        with job(whole, tmp_path / "two") as (_, report, other):
            assert report.step == 1
            other().wait()
            lives.until(lambda: lives.counting(whole) == [1, 2])
        for _ in range(2):
            step().wait()
    assert len(sent(proxy)) == before
    assert lives.counting(tmp_path / "one") == [2, 3]
    assert lives.counting(whole) == [1, 2]
    same(whole, tmp_path / "two", [2])


# -- one tier has less than the other ----------------------------------------------------------------------------------


@pytest.fixture
def run(bucket, proxy, whole, tmp_path):
    """A run of two ranks and four steps, in both tiers. Its near directory; the proxy has forgotten it."""
    near = tmp_path / "near"
    given = bucket.environment, bucket.uri, str(tmp_path / "log"), 4, None, {"local": Local(near, keep=Keep(last=9))}
    ranks.run(2, lives.train, *given, ROWS)
    lives.until(lambda: lives.counting(whole)[-1:] == [4])
    return near


def fetched(proxy):
    """Data files that were read."""
    return {found[1] for r in proxy.requests if (found := re.match(r"GET .*/(step-\d+/rank-\d+)", r.line))}


def _resumed(far, near):
    """What a resume tells of, having checked what it gives."""
    with job(far, near) as (_, report, step):
        assert report.step == 4
        step()
    return "\n".join(report.notes)


def test_a_near_directory_that_is_lost_is_replaced_by_the_far_store(run, far, whole, proxy):
    shutil.rmtree(run)
    assert "read from" in _resumed(far, run)
    assert fetched(proxy) >= {"step-00000004/rank-00000", "step-00000004/rank-00001"}
    assert lives.counting(whole)[-1] == lives.counting(run)[-1] == 5
    same(whole, run, [5])


@pytest.mark.parametrize("how", ["missing", "damaged", "short"])
def test_of_a_near_file_that_is_not_whole_the_far_copy_alone_is_read(run, far, whole, proxy, how):
    (path,) = run.glob("step-00000004/rank-00001.*")
    data = bytearray(path.read_bytes())
    path.unlink()
    data[len(data) // 2] ^= 1
    if how != "missing":
        path.write_bytes(data if how == "damaged" else data[:-9])
    assert "read from" in _resumed(far, run)
    assert fetched(proxy) == {"step-00000004/rank-00001"}
    same(whole, run, [5])


def test_a_far_file_that_is_damaged_costs_nothing_while_the_near_one_is_whole(run, far, whole, proxy):
    (name,) = (entry.name for entry in whole.list("step-00000004") if entry.name.startswith("rank-00001"))
    data = b"damaged"
    whole.write(f"step-00000004/{name}", [memoryview(data)], size=len(data))
    assert "read from" not in _resumed(far, run)
    assert not fetched(proxy) & {"step-00000004/rank-00000"}
