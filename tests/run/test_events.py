"""What a run notes of itself, and the goodput that is worked out of it."""

from __future__ import annotations

import itertools
import os
import signal
import warnings

import pytest
import torch

from distckpt import Checkpointer, Keep, Progress, TrainState
from distckpt.errors import StateWarning, StoreError
from distckpt.run.events import Following, note, read
from distckpt.run.goodput import Goodput, goodput
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import ranks
from tests.run.test_async import until


def state(progress=None):
    return TrainState(model=torch.nn.Linear(2, 2), progress=progress, rng=False)


def events(root):
    return [event for event, _ in read(root)]


def named(root, name):
    return [event for event in events(root) if event["event"] == name]


@pytest.mark.parametrize("wait", [True, False])
def test_a_run_tells_what_happens_to_it(tmp_path, wait):
    progress = Progress()
    with Checkpointer(tmp_path, keep=Keep(last=2), wait=wait) as c:
        assert c.resume(state(progress)) is None
        for step in (1, 2, 3):
            progress.advance(8)
            c.save(step, state(progress), {"loss": 1 / step})
    with Checkpointer(tmp_path, keep=Keep(last=2), wait=wait) as c:
        c.resume(state(progress))
    assert [(e["launch"], e.get("step")) for e in named(tmp_path, "launched")] == [(1, None), (2, 3)]
    assert [(e["step"], e["samples"], e["epoch"]) for e in named(tmp_path, "staged")] == [
        (1, 8, 0),
        (2, 16, 0),
        (3, 24, 0),
    ]
    committed = named(tmp_path, "committed")
    assert [(e["step"], e["launch"], e["directory"]) for e in committed] == [(s, 1, f"step-{s:08d}") for s in (1, 2, 3)]
    assert committed[1]["metrics"] == {"loss": 0.5}
    assert all(e["bytes"] > 0 and e["seconds"] > 0 for e in committed)
    assert [e["checkpoints"] for e in named(tmp_path, "removed")] == [["step-00000001"]]
    assert [e["step"] for e in named(tmp_path, "resumed")] == [3]
    assert [e["launch"] for e in named(tmp_path, "closed")] == [1, 2]
    times = [e["time"] for e in events(tmp_path)]
    assert all(b - a > -0.1 for a, b in itertools.pairwise(times))


def test_what_goes_wrong_is_told(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
        (tmp_path / "step-00000002").write_text("in the way")
        with pytest.raises(StoreError):
            c.save(2, state())
    with Checkpointer(tmp_path) as c:
        c.resume(state())
        with pytest.raises(StoreError):
            c.save(2, state()).wait()
    failed = named(tmp_path, "failed")
    assert [e["step"] for e in failed] == [2, 2]
    assert all("step-00000002" in e["error"] for e in failed)


def test_being_told_to_stop_is_told(tmp_path):
    with Checkpointer(tmp_path, preemption=True) as c:
        os.kill(os.getpid(), signal.SIGTERM)
        assert c.step(1, state()).should_stop
    (stopping,) = named(tmp_path, "stopping")
    assert (stopping["step"], stopping["reason"], stopping["exit_code"]) == (1, "signal", 75)


def _saved_by_two(root):
    with Checkpointer(root, timeout=20) as c:
        c.save(1, state())


def test_one_rank_tells_it(tmp_path):
    ranks.run(2, _saved_by_two, str(tmp_path))
    assert [e["event"] for e in events(tmp_path)] == ["launched", "staged", "committed", "closed"]


def _killed_once_staged(root):
    c = Checkpointer(root)
    live = state()
    c.save(1, live, wait=True)
    c.save(2, live)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_commit_after_the_job_was_killed_is_told(tmp_path):
    ranks.run(1, _killed_once_staged, str(tmp_path), may_die=(0,))
    until(lambda: [e["step"] for e in named(tmp_path, "committed")] == [1, 2])


def test_a_torn_line_costs_only_itself(tmp_path):
    store = LocalStore(tmp_path)
    note(store, "skipped", step=1)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 12.5, "event": "stag')
    note(store, "skipped", step=2)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"time": 1}\n{"time": 1, "event": "unheard of"}\n{"time": 1, "event": "skipped"')
    assert [e["step"] for e in events(tmp_path)] == [1, 2]
    assert events(tmp_path / "nowhere") == []


def test_a_metric_called_time_is_a_metric(tmp_path):
    store = LocalStore(tmp_path)
    note(store, "committed", step=1, metrics={"time": 2.5})
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 12.5, "event": "stag')
    note(store, "committed", step=2, metrics={"time": 2.5})
    assert [(e["step"], e["metrics"]) for e in events(tmp_path)] == [(1, {"time": 2.5}), (2, {"time": 2.5})]


def test_a_file_that_is_another_now_is_followed_from_its_beginning(tmp_path):
    store, following = LocalStore(tmp_path), Following(tmp_path)
    assert following.look() == []
    for step in (1, 2):
        note(store, "skipped", step=step)
        assert [e["step"] for e in following.look()] == [step]
    (tmp_path / "events.jsonl").unlink()
    note(store, "skipped", step=3)
    assert [e["step"] for e in following.look()] == [3]
    (tmp_path / "events.jsonl").write_text("")
    assert (following.look(), following.seen) == ([], [])


def test_reading_goes_on_where_it_stopped(tmp_path):
    store = LocalStore(tmp_path)
    note(store, "skipped", step=1)
    ((_, end),) = read(tmp_path)
    note(store, "skipped", step=2, why="x" * 10_000)
    ((event, _),) = read(tmp_path, end)
    assert event["step"] == 2
    assert len(event["why"]) == 2000


def test_an_event_that_cannot_be_written_is_warned_of_and_fails_nothing(tmp_path):
    (tmp_path / "events.jsonl").mkdir()
    with warnings.catch_warnings(record=True) as caught, Checkpointer(tmp_path, wait=True) as c:
        warnings.simplefilter("always")
        c.save(1, state())
        assert c.steps() == [1]
    assert {w.category for w in caught} == {StateWarning}
    told = [str(w.message).partition(":")[0] for w in caught]
    assert told == [f"{name} is not noted in events.jsonl" for name in ("launched", "committed", "staged", "closed")]
    with Checkpointer(MemoryStore(), wait=True) as c:
        c.save(1, state())  # a store that keeps none


# -- goodput -----------------------------------------------------------------------------------------------------------


def said(event, time, launch, **more):
    return {"event": event, "time": time, "launch": launch, **more}


def test_goodput_leaves_out_loading_stalls_lost_work_and_the_time_between():
    first = [
        said("launched", 10.0, 1, seconds=10.0),
        said("staged", 40.0, 1, step=1, stall=2.0),
        said("committed", 41.0, 1, step=1),
        said("staged", 70.0, 1, step=2, stall=1.0),  # never committed
        said("staged", 80.0, 1, step=3, stall=1.0),
    ]
    assert goodput(first) == Goodput(wall=80.0, training=66.0, saving=4.0, lost=0.0, down=10.0, launches=1)
    second = [
        said("launched", 100.0, 2, step=1, seconds=5.0),
        said("staged", 150.0, 2, step=2, stall=0.0),
        said("closed", 160.0, 2),
    ]
    found = goodput(first + second)
    assert found == Goodput(wall=160.0, training=28.0 + 60.0, saving=2.0, lost=40.0, down=10.0 + 15.0 + 5.0, launches=2)
    assert found.share == pytest.approx(0.55)
    assert goodput(first, alive_at=90.0).training == 76.0


def test_goodput_of_a_run_that_began_again_from_nothing_counts_nothing_of_before():
    events = [
        said("launched", 0.0, 1),
        said("staged", 10.0, 1, step=1, stall=0.0),
        said("launched", 20.0, 2),
        said("closed", 30.0, 2),
    ]
    assert goodput(events) == Goodput(wall=30.0, training=10.0, saving=0.0, lost=10.0, down=10.0, launches=2)


def test_goodput_of_nothing():
    assert goodput([]) == Goodput()
    assert Goodput().share is None


def test_goodput_through_a_clock_that_was_set_back():
    first = [said("launched", 5000.0, 1), said("staged", 9000.0, 1, step=1)]
    assert goodput([*first, said("launched", 5100.0, 2, step=1)]).share == 1.0
