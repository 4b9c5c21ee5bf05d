"""Runs straight to an object store: killed at any moment and resumed on other ranks, raced for, and read meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
import threading

import pytest
import torch

from distckpt import Checkpointer, Keep
from distckpt.errors import RunConflict
from tests import ranks
from tests.run import lives
from tests.run.test_async import state
from tests.store import servers
from tests.store.faulty import FINE, Fault, Faulty

STEPS = 8


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run of 4 ranks that nothing interrupts; all its checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    ranks.run(4, lives.train, {}, str(folder / "run"), str(folder / "log"), STEPS)
    lives.check_each_once(folder / "log", STEPS)
    return folder / "run"


@pytest.fixture
def bucket():
    return servers.start("moto").bucket()


@pytest.fixture
def environ(bucket, monkeypatch):
    """This process finds the bucket, too."""
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)


def _check(root, reference):
    """Every checkpoint that counts is that of the uninterrupted run, to the bit. Returns the steps."""
    steps = lives.counting(root)
    for step in steps:
        assert lives.saved(root, step) == lives.saved(reference, step), step
    return steps


def _story(draw, kills, bucket, reference, folder):
    """Lives on 4 ranks, each killed at a moment of its own; the last, on 3, goes to the end. Returns the moments."""
    told = []
    with Faulty(bucket.address) as proxy:
        through = bucket.at(proxy.endpoint).environment
        given = (through, bucket.uri, str(folder / "log"), STEPS, str(reference))
        for life in range(kills):
            moment, whom = draw.randrange(20, 250), draw.choice(["all", "all", "ranks", "writers"])
            proxy.clear()
            ready = lambda moment=moment: proxy.count(".") >= moment
            left = lives.live_and_die(4, ready, whom, folder / f"life-{life}", *given)
            told.append((whom, moment, proxy.requests[-1].line, _check(bucket.uri, reference)))
        last = ranks.run(3, lives.train, *given, timeout=90)
        lives.until(lambda: not any(lives.writers([pid]) for pid in left))
    assert _check(bucket.uri, reference)[-1] == STEPS
    assert {step for step, _, _ in last} <= {*range(STEPS + 1), None}
    lives.check_each_once(folder / "log", STEPS)
    return told


def test_killed_at_a_random_moment_it_is_resumed_on_other_ranks_exactly(bucket, environ, reference, tmp_path):
    _story(random.Random(3), 1, bucket, reference, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(6))
def test_the_same_holds_for_three_kills_in_a_row(seed, bucket, environ, reference, tmp_path):
    print(_story(random.Random(seed), 3, bucket, reference, tmp_path))


FAULTS = (
    *(Fault(status=status) for status in (500, 503, 429)),
    *(Fault(upload=sent) for sent in (0, 1000)),
    Fault(lost=True),
    Fault(body=10),
    Fault(delay=0.5),
)


@pytest.mark.full
def test_a_run_whose_every_tenth_request_or_so_fails_is_the_one_without(bucket, environ, reference, tmp_path):
    draw = random.Random(5)
    with Faulty(bucket.address) as proxy:
        proxy.latency = 0.01
        for _ in range(1000):
            proxy.on(".", draw.choice(FAULTS), after=draw.randrange(20))
        given = bucket.at(proxy.endpoint).environment, bucket.uri, str(tmp_path / "log"), STEPS, str(reference)
        ranks.run(2, lives.train, *given, timeout=100)
        suffered = sum(request.fault is not FINE for request in proxy.requests)
    assert suffered > 30
    assert _check(bucket.uri, reference)[-1] == STEPS


# -- two jobs ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _started(fn, *args):
    """A job of one rank. Gives a function that waits for its end, and returns what `fn` did."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        group = ranks.start(1, fn, *args, folder=folder)

        def result():
            group[0].join(60)
            return ranks.answers(group, folder)[0]

        try:
            yield result
        finally:
            ranks.kill(group)


def _save_first(environment, uri, value, wait):
    os.environ.update(environment)
    live, _ = state(value)
    try:
        with Checkpointer(uri, timeout=30) as c:
            made = c.save(1, live, wait=wait)
            if not wait:
                made.wait()
    except RunConflict as e:
        return str(e)


@pytest.mark.parametrize("wait", [True, False], ids=["sync", "async"])
def test_of_two_jobs_that_save_one_step_at_once_one_wins_and_the_other_is_told(bucket, environ, wait):
    with Faulty(bucket.address) as proxy:
        over = threading.Event()
        proxy.on("PUT .*/step-00000001/rank-", Fault(until=over))
        slow = bucket.at(proxy.endpoint).environment
        with _started(_save_first, slow, bucket.uri, 1, wait) as first:
            lives.until(lambda: proxy.count("PUT .*/step-00000001/rank-"))
            with _started(_save_first, bucket.environment, bucket.uri, 2, wait) as second:
                assert second() is None
            over.set()
            told = first()
    assert re.search("resumed this run since launch 1" if wait else "another job or launch committed it first", told)
    live, w = state(0)
    with Checkpointer(bucket.uri, wait=True) as c:
        assert c.load(live).step == 1
    assert torch.all(w == 2)
    assert lives.counting(bucket.uri) == [1]


def _compete(environment, uri, value, until_step):
    """Save each step; returns why it could not."""
    os.environ.update(environment)
    live, w = state(value)
    try:
        with Checkpointer(uri, every=1, keep=Keep(last=3), timeout=20) as c:
            report = c.resume(live)
            w.fill_(value)
            for step in range(report.step + 1 if report else 1, until_step + 1):
                c.step(step, live)
    except RunConflict as e:
        return str(e)


def test_of_jobs_that_are_started_at_once_on_one_run_one_goes_on_and_last_is_always_committed(bucket, environ):
    ended, problems, looks = threading.Event(), [], []

    def watch():
        while not ended.wait(0.01):
            try:
                looks.append(lives.counting(bucket.uri))
            except Exception as e:
                problems.append(e)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with contextlib.ExitStack() as stack:
            given = (bucket.environment, bucket.uri)
            jobs = [stack.enter_context(_started(_compete, *given, value, 12)) for value in (1, 2, 3)]
            told = [job() for job in jobs]
    finally:
        ended.set()
        watcher.join(30)
    assert not problems
    assert len(looks) > 5
    (winner,) = [value for value, why in enumerate(told, 1) if why is None]
    clear = "has begun while this job was loading|has resumed this run since|is training on this run|committed it first"
    assert all(re.search(clear, why) for why in told if why), told
    live, w = state(0)
    with Checkpointer(bucket.uri, wait=True) as c:
        assert c.load(live).step == 12
    assert torch.all(w == winner)


def _save_steps(environment, uri, count):
    os.environ.update(environment)
    live, w = state(0)
    with Checkpointer(uri, keep=Keep(last=2), timeout=30) as c:
        for step in range(1, count + 1):
            w.fill_(step)
            c.save(step, live).wait()


@pytest.mark.full
def test_a_reader_sees_the_old_checkpoint_or_the_new_one_while_they_change(bucket, environ):
    read = []
    with _started(_save_steps, bucket.environment, bucket.uri, 20) as writer:
        lives.until(lambda: lives.counting(bucket.uri))
        while not read or read[-1] < 20:
            for source in (None, f"{bucket.uri}/last"):
                live, w = state(0)
                with Checkpointer(bucket.uri, wait=True) as c:
                    step = c.load(live, source=source).step
                assert torch.all(w == step)
                read.append(step)
        writer()
    assert read[::2] == sorted(read[::2])
    assert len(set(read)) > 3, read
