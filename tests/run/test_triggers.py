"""When a save is due, and that all ranks find it due at the same step."""

from __future__ import annotations

import math
import time

import pytest
import torch

from distckpt import Checkpointer, ElasticSampler, Keep, Progress, TrainState
from distckpt.errors import Mismatch, RankFailed
from distckpt.run.triggers import Triggers, best_interval, duration
from tests import ranks


def due(every, steps, epochs=None):
    triggers, before, found = Triggers.of(every), None, []
    for step in steps:
        epoch = epochs and epochs(step)
        if triggers.due(step, epoch, before):
            found.append(step)
        before = epoch
    return found


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        (4, [4, 8]),
        ("4 steps", [4, 8]),
        (("5 steps", 3), [3, 5, 6, 9, 10]),
        (lambda step, epoch: step in {1, 7}, [1, 7]),
        ((lambda step, epoch: epoch == 2, "6 steps"), [6, 7, 8, 9]),
        ("1 epoch", [4, 7, 10]),
        ("2 epochs", [7]),
        (None, []),
        ("3 h", []),
    ],
)
def test_steps_epochs_and_functions(every, steps):
    assert due(every, range(1, 11), lambda step: (step - 1) // 3) == steps


@pytest.mark.parametrize(
    "every",
    [0, -1, 1.5, True, "0 steps", "20", "min", "2 fortnights", "1.5 steps", "", object(), ["20 min", None], "-3 min"],
)
def test_nonsense_is_refused(every):
    with pytest.raises(ValueError, match=r"every=.*a number of steps, or one of '500 steps'"):
        Triggers.of(every)


def test_epochs_need_something_that_counts_them(tmp_path):
    with Checkpointer(tmp_path, every="1 epoch") as c, pytest.raises(ValueError, match="give TrainState progress="):
        c.step(1, TrainState(model=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize(("text", "seconds"), [("90 s", 90), ("1.5 min", 90), ("2 h", 7200), (5, 5), ("1 day", 86400)])
def test_durations(text, seconds):
    assert duration(text, "x") == seconds


@pytest.mark.parametrize("text", ["2", "soon", 0, -1, math.inf, True, "3 steps"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"grace=.*a number of seconds, or a time such as"):
        duration(text, "grace")


def test_the_interval_that_loses_least():
    def lost(interval):  # an hour's share: saves, and half an interval a failure
        return 3600 / interval * 2.0 + interval / 2 * 3600 / 86400

    best = best_interval(2.0, 86400)
    assert min(range(100, 2000), key=lost) == pytest.approx(best, abs=1)


def _by_time(root, skew):
    rank = torch.distributed.get_rank()
    found = []
    real = time.monotonic
    time.monotonic = lambda: real() + skew * rank  # rank 1's clock: started elsewhere, and is of no account
    with Checkpointer(root, every="0.4 s") as c:
        state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
        for step in range(1, 61):
            time.sleep(0.03)
            if c.step(step, state).saved:
                found.append(step)
    return found


def test_time_is_rank_0s_and_all_ranks_save_at_the_same_step(tmp_path):
    first, second = ranks.run(2, _by_time, str(tmp_path), 1e6)
    assert first == second
    assert len(first) >= 2
    assert min(b - a for a, b in zip([0, *first], first, strict=False)) >= 3


def _disagree(root):
    rank = torch.distributed.get_rank()
    with Checkpointer(root, every=lambda step, epoch: step == 2 + rank, timeout=10) as c:
        state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
        with pytest.raises((RankFailed, Mismatch)) as caught:
            for step in (1, 2, 3):
                c.step(step, state)
        return str(caught.value)


def test_functions_that_disagree_are_told(tmp_path):
    assert all("different steps" in said or "same point" in said for said in ranks.run(2, _disagree, str(tmp_path)))


def test_the_epoch_is_that_of_the_progress(tmp_path):
    progress = Progress()
    state = TrainState(model=torch.nn.Linear(2, 2), progress=progress, rng=False)
    saved = []
    with Checkpointer(tmp_path, every=("1 epoch", "100 steps")) as c:
        for step in range(1, 10):
            progress.advance(1)
            progress.epoch = step // 4
            if c.step(step, state).saved:
                saved.append(step)
        assert c.suggested_interval("24 h") > 0
    assert saved == [4, 8]


def test_the_epoch_may_be_that_of_the_sampler_alone(tmp_path):
    """As where nobody sets that of the Progress, which stays 0."""
    sampler = ElasticSampler(range(4), global_batch=2)
    state = TrainState(model=torch.nn.Linear(2, 2), progress=Progress(), sampler=sampler, rng=False)
    saved = []
    with Checkpointer(tmp_path, every="1 epoch", keep=Keep(last=1, per_epoch=True)) as c:
        for step in range(1, 9):
            sampler.advance()
            if c.step(step, state).saved:
                saved.append(step)
    assert saved == c.steps() == [2, 4, 6, 8]


def test_an_epoch_may_end_with_the_first_step_after_a_resume(tmp_path):
    progress = Progress()
    state = TrainState(model=torch.nn.Linear(2, 2), progress=progress, rng=False)
    with Checkpointer(tmp_path) as c:
        c.save(1, state)
    with Checkpointer(tmp_path, every="1 epoch") as c:
        c.resume(state)
        progress.epoch = 1
        assert c.step(2, state).saved
        assert not c.step(3, state).saved


def _cost(root):
    state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
    with Checkpointer(root, every=("1000000 steps", "10 h"), preemption=True) as c:
        for step in range(1, 200):
            c.step(step, state)
        started = time.process_time()
        for step in range(200, 2200):
            c.step(step, state)
        return (time.process_time() - started) / 2000


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_at_which_nothing_is_due_costs_next_to_nothing(tmp_path, size):
    assert max(ranks.run(size, _cost, str(tmp_path))) < 200e-6, "50 us is the goal; CI's cores are shared"
