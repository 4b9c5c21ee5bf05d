"""Somebody who removes checkpoints and stands still at the worst moment, and others who go on meanwhile.

What tests/faults/interleavings.py has found, each made again as it was.
"""

from __future__ import annotations

import pytest

from distckpt import Checkpointer, Keep
from distckpt.errors import NotACheckpoint, RunConflict
from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.lease import being_removed
from distckpt.run.publish import Retention, pointing, retain
from distckpt.store.memory import MemoryStore
from tests.faults.sharded import Sharded
from tests.faults.turns import Job, TurnedMemory, clocked


@pytest.fixture
def store():
    """A run of six steps."""
    store = MemoryStore()
    save(trainer(store), 1, 2, 3, 4, 5, 6)
    return store


def trainer(store, **options):
    checkpointer = Checkpointer(store, wait=True, timeout=1)
    checkpointer.resume(Sharded(0, 1), **options)
    return checkpointer


def save(checkpointer, *steps, value=0):
    """Save these steps; returns the directory of the last."""
    state = Sharded(0, 1)
    for step in steps:
        state.set(value or step)
        made = checkpointer.save(step, state).directory
    return made


def steps(store):
    return Checkpointer(store, wait=True).steps()


def paused(store, point, fn):
    """A job that has run fn(its store) until it was about to do this."""
    turned = TurnedMemory(None, lambda *_: None, store._data)
    turned.job = job = Job("the one that stands still", lambda _: fn(turned))
    while not job.at.startswith(point):
        job.turn()
        assert not job.ended, job.error or f"it never came to {point}"
    return job


def goes_on(job):
    while not job.ended:
        job.turn()
    if job.error:
        raise job.error


def prune(store):
    """Remove all but the two newest; what was in the way."""
    return retain(History(store), Retention(Keep(last=1)))


def test_a_launch_that_began_since_it_was_decided_what_goes_is_not_robbed(store):
    job = paused(store, "write leases/step-00000004", prune)
    trainer(store, step=3)
    goes_on(job)
    assert steps(store) == [1, 2, 3]


def test_no_launch_begins_with_what_somebody_was_about_to_remove(store):
    job = paused(store, "delete step-00000004/commit.json", prune)
    with pytest.raises(NotACheckpoint, match=r"retention removes step-00000004; besides it has \[1, 2, 3, 5, 6\]"):
        trainer(store, step=4)
    trainer(store, step=3)
    goes_on(job)
    assert steps(store) == [1, 2, 3]
    assert not being_removed(store)


def test_of_a_newest_that_is_being_removed_a_launch_takes_the_one_before(store):
    trainer(store, step=5)
    job = paused(store, "delete step-00000003/commit.json", prune)  # decided while 5 and 4 are the newest
    trainer(store, step=4)
    for name in [name for name in store._data if name.startswith("step-00000004")]:
        del store._data[name]
    state = Sharded(0, 1)
    assert Checkpointer(store, wait=True, timeout=1).resume(state).step == 2
    assert state.is_at(2)
    goes_on(job)
    assert steps(store) == [1, 2]


def test_a_checkpoint_saved_under_the_name_of_one_that_was_to_go_stays(store):
    trainer(store, step=3)
    job = paused(store, "write leases/step-00000006", prune)  # what the rewind has left behind is to go
    prune(store)
    launch = Checkpointer(store, wait=True, timeout=1)
    launch._job.launch = 2  # that job goes on, and comes to step 6 again
    assert save(launch, 6, value=66) == "step-00000006"
    goes_on(job)
    assert steps(store) == [2, 3, 6]


def test_no_save_takes_a_name_that_somebody_may_still_remove(store):
    trainer(store, step=3)
    job = paused(store, "delete step-00000006/commit.json", prune)
    store._data = {name: data for name, data in store._data.items() if not name.startswith("step-00000006")}
    assert History(store).next_generation(6) == 2
    job.kill()


def test_a_reader_that_comes_too_late_reads_the_newest_there_is_and_is_not_told_of_damage(store):
    read = []

    def load(store):
        state = Sharded(0, 1)
        read.append((Checkpointer(store, wait=True, timeout=1).load(state), state.value))

    job = paused(store, "write leases/step-00000006", load)
    trainer(store, step=5)
    prune(store)
    goes_on(job)
    ((report, value),) = read
    assert (report.step, value) == (5, 5)


def test_a_reader_whose_listing_is_all_gone_by_the_time_it_looks_looks_again(store):
    read = []

    def resume(store):
        state = Sharded(0, 1)
        read.append((Checkpointer(store, wait=True, timeout=1).load(state).step, state.value))

    job = paused(store, "read step-00000006/commit.json", resume)
    save(trainer(store), 7, 8)
    prune(store)
    goes_on(job)
    assert read == [(8, 8)]


def test_a_pointer_that_was_written_late_leads_to_what_is_there(store):
    store.delete("last.json")
    job = paused(store, "write last.json", prune)
    trainer(store, step=3)
    prune(store)  # as the launch does that has gone back to step 3
    goes_on(job)
    assert pointing(store) == {"last": "step-00000003"}


def test_a_pointer_that_was_written_before_a_removal_and_after_its_look_is_set_right(store):
    store.delete("last.json")
    late = paused(store, "write last.json", prune)
    trainer(store, step=3)
    job = paused(store, "delete step-00000006/commit.json", prune)
    while "step-00000006" not in pointing(store).values():
        late.turn()
    goes_on(job)
    assert pointing(store) == {"last": "step-00000003"}
    goes_on(late)
    assert pointing(store) == {"last": "step-00000003"}


def test_a_save_whose_files_a_later_launch_cleared_away_is_told_of_that_launch(store):
    zombie = trainer(store)

    def last(turned):
        zombie._store = zombie._history.store = turned
        save(zombie, 7)

    with clocked():
        successor = paused(store, "create launches/0003", trainer)  # it has found nothing that all had acked
        job = paused(store, "read step-00000007/ack-00000", last)
        goes_on(successor)
        with pytest.raises(RunConflict, match=r"launch 3 .* has resumed this run since launch 2 began"):
            goes_on(job)
    assert steps(store) == [1, 2, 3, 4, 5, 6]
    assert StepDir(7) not in History(store).directories()
