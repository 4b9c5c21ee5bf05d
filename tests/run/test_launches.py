"""Launches: zombies, rewinds, jobs that race, and attempts that a lost job left behind."""

from __future__ import annotations

import time

import pytest

from distckpt import Checkpointer
from distckpt.errors import FormatError, NotACheckpoint, RunConflict, StateWarning, StoreError
from distckpt.format.layout import StepDir
from distckpt.loading.open import open_checkpoint
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import layouts
from tests.faults.failpoints import FaultyStore, Fuse
from tests.faults.sharded import Sharded, on_threads


@pytest.fixture(params=["memory", "local"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path)


def _launch(store, *steps, resume=True, **options):
    """A new launch that resumes if it can, then saves these steps: (checkpointer, its state)."""
    checkpointer, state = Checkpointer(store, timeout=1, wait=True), Sharded(0, 1)
    if resume:
        checkpointer.resume(state, **options)
    for step in steps:
        state.set(step)
        checkpointer.save(step, state)
    return checkpointer, state


def _unaware(*checkpointers):
    """Let them save as if they had looked for a later launch just before it began: what is left is the fence."""
    for checkpointer in checkpointers:
        checkpointer._job.refuse_if_superseded = lambda: None


def _resumed(store, **options):
    """(step, value of the state) that a new launch resumes."""
    state = Sharded(0, 1)
    report = Checkpointer(store, timeout=1, wait=True).resume(state, **options)
    assert state.is_at(state.value)
    return report.step, state.value


def _directories(store):
    return [e.name for e in store.list("") if e.name.startswith("step-") and e.size is None]


# -- zombies and rewinds -------------------------------------------------------------------------------------------


def test_what_a_zombie_commits_after_a_newer_launch_resumed_is_never_resumed(store):
    zombie, state = _launch(store, 1)
    newer, newer_state = _launch(store)
    _unaware(zombie, newer)
    state.set(5)
    zombie.save(5, state)
    assert (store.head("step-00000005/commit.json") > 0, newer.steps()) == (True, [1])
    assert _resumed(store) == (1, 1)
    with pytest.raises(NotACheckpoint, match="step 5"):
        newer.load(Sharded(0, 1), step=5)
    newer_state.set(2)
    newer.save(2, newer_state)
    state.set(6)
    zombie.save(6, state)
    assert newer.steps() == [1]  # the resume above fenced `newer` off too


def test_a_job_that_a_later_launch_superseded_is_told_at_its_next_save(store):
    zombie, state = _launch(store, 1)
    _launch(store, 2)
    with pytest.raises(RunConflict, match=r"launch 2 \(.* on .*\) has resumed this run since launch 1 began"):
        zombie.save(5, state)
    assert _directories(store) == ["step-00000001", "step-00000002"]


def test_a_fresh_start_beside_checkpoints_that_do_not_count_is_said(store):
    older, state = _launch(store)
    _launch(store)  # began from nothing, too, and died before its first save
    _unaware(older)
    older.save(5, state)
    with pytest.warns(StateWarning, match="step-00000005 will not be resumed: a later launch began"):
        assert Checkpointer(store, timeout=1, wait=True).resume(Sharded(0, 1)) is None


def test_a_zombie_that_saves_the_step_of_its_successor_does_not_replace_it(store):
    zombie, state = _launch(store, 1)
    newer, newer_state = _launch(store)
    _unaware(zombie)
    newer_state.set(20)
    newer.save(2, newer_state)
    state.set(66)
    assert zombie.save(2, state).directory == "step-00000002.2"
    assert newer.steps() == [1, 2]
    assert _resumed(store) == (2, 20)


def test_a_successor_that_saves_the_step_of_a_zombie_wins(store):
    zombie, state = _launch(store, 1)
    newer, newer_state = _launch(store)
    _unaware(zombie)
    state.set(66)
    zombie.save(2, state)
    newer_state.set(20)
    assert newer.save(2, newer_state).directory == "step-00000002.2"
    assert _resumed(store) == (2, 20)


def test_steps_left_behind_by_a_rewind_never_come_back(store):
    _launch(store, 1, 2, 3)
    rewound, state = _launch(store, step=1)
    assert state.is_at(1)
    assert rewound.steps() == [1]
    assert _resumed(store) == (1, 1)
    _launch(store, 4)
    assert Checkpointer(store, wait=True).steps() == [1, 4]
    assert _resumed(store) == (4, 4)
    with pytest.raises(NotACheckpoint, match="step 3"):
        Checkpointer(store, timeout=1, wait=True).resume(Sharded(0, 1), step=3)


def test_a_step_saved_again_by_a_later_launch_gets_the_next_generation_and_wins(store):
    _launch(store, 1, 2)
    checkpointer, state = _launch(store, step=1)
    state.set(22)
    assert checkpointer.save(2, state).directory == "step-00000002.2"
    assert _directories(store) == ["step-00000001", "step-00000002", "step-00000002.2"]
    assert checkpointer.steps() == [1, 2]
    assert _resumed(store) == (2, 22)
    assert _resumed(store, step=2) == (2, 22)


def test_a_step_saved_twice_by_one_launch_is_the_later_one(store):
    checkpointer, state = _launch(store, 1)
    state.set(11)
    assert checkpointer.save(1, state).directory == "step-00000001.2"
    assert _resumed(store) == (1, 11)


# -- two jobs in one run -------------------------------------------------------------------------------------------


def test_of_two_jobs_racing_for_a_directory_one_goes_to_the_next_generation_and_both_are_whole(store):
    _launch(store, 1)
    quick, quick_state = _launch(store)
    fuse = Fuse(lambda _: quick.save(2, quick_state))
    slow, slow_state = _launch(FaultyStore(store, fuse))
    _unaware(quick)
    quick_state.set(7)
    slow_state.set(8)
    fuse.arm("write step-00000002/rank-00000.*.safetensors")  # its directory is chosen, and still empty
    assert slow.save(2, slow_state).directory == "step-00000002.2"
    assert fuse.blown
    for generation, value in ((1, 7), (2, 8)):
        checkpoint = open_checkpoint(store, StepDir(2, generation))
        assert checkpoint.object("trainer_state") == value
        files = {entry.name for entry in store.list(str(checkpoint.directory))}
        assert all(checkpoint.manifest.attempt in name for name in files - {"commit.json"}), files
    assert _resumed(store) == (2, 8)


@pytest.mark.parametrize("point", ["read step-00000001/commit.json", "create launches/0002.json"])
def test_of_two_jobs_that_resume_at_once_the_later_is_told(store, point):
    """It has not seen what the other may have saved, or left behind."""
    _launch(store, 1)
    fuse = Fuse(lambda _: _launch(store, 2))
    fuse.arm(point)
    with pytest.raises(RunConflict, match="launch 2 has begun while this job was loading"):
        _launch(FaultyStore(store, fuse))
    assert [e.name for e in store.list("launches") if "beat" not in e.name] == ["0001.json", "0002.json"]
    assert _resumed(store) == (2, 2)


def test_a_save_without_a_resume_is_refused_where_there_is_something_to_resume(store):
    _launch(store, 1)
    with pytest.raises(RunConflict, match=r"step-00000001: call resume\(\)"):
        _launch(store, 2, resume=False)
    assert Checkpointer(store, wait=True).steps() == [1]
    assert _directories(store) == ["step-00000001"]


def test_a_save_without_a_resume_is_refused_where_all_there_is_to_resume_is_damaged(store):
    _launch(store, 1)
    store.write("step-00000001/commit.json", [memoryview(b"damaged")], size=7)
    with pytest.raises(RunConflict, match="step-00000001"):
        _launch(store, 2, resume=False)


def test_a_save_without_a_resume_begins_a_new_run(store):
    _launch(store, 1, 2, resume=False)
    assert _resumed(store) == (2, 2)


# -- records of launches -------------------------------------------------------------------------------------------


def test_a_damaged_launch_record_is_an_error_that_names_it():
    store = MemoryStore()
    _launch(store, 1)
    _launch(store)
    whole = store._data["launches/0002.json"]
    damaged = [whole[:p] + bytes([whole[p] ^ 1]) + whole[p + 1 :] for p in range(len(whole))]
    for data in [*damaged, b"", whole[:-1], b"[]", store._data["launches/0001.json"]]:
        store._data["launches/0002.json"] = data
        with pytest.raises(FormatError, match=r"launches/0002\.json"):
            Checkpointer(store, timeout=1, wait=True).resume(Sharded(0, 1))
    with pytest.raises(FormatError, match=r"launches/0002\.json"):
        Checkpointer(store, wait=True).load(Sharded(0, 1))
    with pytest.raises(FormatError, match=r"launches/0002\.json"):
        _launch(store, 2, resume=False)
    store._data["launches/0002.json"] = whole
    assert _resumed(store) == (1, 1)


@pytest.mark.parametrize("number", [10**9, 2**63 - 1, 10**24])
def test_a_record_of_a_number_that_no_launch_can_have_changes_nothing(number):
    store = MemoryStore()
    _launch(store, 1)
    store._data[f"launches/{number}.json"] = b"x"
    assert _resumed(store) == (1, 1)
    store._data["launches/999999999.json"] = store._data["launches/0001.json"]
    with pytest.raises(FormatError, match="launches/999999999"):
        _resumed(store)


def test_other_files_among_the_launch_records_change_nothing(store):
    _launch(store, 1)
    store.write("launches/notes.txt", [memoryview(b"hello")], size=5)
    assert _resumed(store) == (1, 1)


# -- attempts of a lost job ----------------------------------------------------------------------------------------


def _lost_before_its_commit(store):
    """A job of two ranks that is lost when all have acked step 2 and nobody has committed it."""
    fuse = Fuse()
    faulty = FaultyStore(store, fuse)

    def work(comm):
        checkpointer, state = Checkpointer(faulty, comm=comm, wait=True), Sharded(comm.rank, 2, 1)
        checkpointer.save(1, state)
        comm.all_gather("saved", b"")
        fuse.arm("create step-00000002/commit.json", forever=True)
        comm.all_gather("armed", b"")
        state.set(2)
        checkpointer.save(2, state)

    assert all(isinstance(error, StoreError) for error in on_threads(2, work))
    return [f"step-00000002/{e.name}" for e in store.list("step-00000002") if e.name.startswith("ack")]


def _resume_on_two(store):
    """(report, step that the state is at) of each rank."""

    def work(comm):
        state = Sharded(comm.rank, 2)
        report = Checkpointer(store, comm=comm, wait=True).resume(state)
        return report, state.value if state.is_at(state.value) else "a mix"

    return on_threads(2, work, timeout=4)


def test_an_attempt_that_every_rank_has_acked_is_committed_by_the_next_resume(store):
    assert len(_lost_before_its_commit(store)) == 2
    for report, value in _resume_on_two(store):
        assert (report.step, value) == (2, 2)
        assert "step-00000002: all ranks had acked" in str(report)
    assert not [e.name for e in store.list("step-00000002") if e.name.startswith("ack")]
    assert Checkpointer(store, wait=True).steps() == [1, 2]


def test_it_is_committed_by_a_resume_on_another_world_size_too(store):
    _lost_before_its_commit(store)
    assert _resumed(store) == (2, 2)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "flipped", "refusal", "not JSON"])
def test_an_attempt_with_an_ack_that_cannot_be_used_is_not_committed(rank, damage):
    store = MemoryStore()
    key = _lost_before_its_commit(store)[rank]
    data = store._data.pop(key)
    if damage != "missing":
        middle = len(data) // 2
        refusal = data.replace(b'"file"', b'"error"')
        flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        store._data[key] = {"flipped": flipped, "refusal": refusal, "not JSON": b"{"}[damage]
    started = time.monotonic()
    assert [(report.step, value) for report, value in _resume_on_two(store)] == [(1, 1), (1, 1)]
    assert time.monotonic() - started < 3


def test_an_attempt_whose_data_file_is_gone_or_short_is_not_committed():
    for data in (None, b"short"):
        store = MemoryStore()
        _lost_before_its_commit(store)
        key = next(k for k in store._data if k.startswith("step-00000002/rank-00001"))
        del store._data[key]
        if data:
            store._data[key] = data
        assert _resumed(store) == (1, 1)


def test_an_attempt_of_a_launch_that_was_superseded_is_not_committed():
    store = MemoryStore()
    _lost_before_its_commit(store)
    lost = {key: store._data.pop(key) for key in list(store._data) if key.startswith("step-00000002")}
    _launch(store)
    store._data |= lost
    assert _resumed(store) == (1, 1)
    assert "step-00000002/commit.json" not in store._data


def test_a_resume_waits_for_acks_that_are_still_arriving():
    store = MemoryStore()
    key = _lost_before_its_commit(store)[1]
    late = {key: store._data.pop(key)}
    fuse = Fuse(lambda _: store._data.update(late))
    fuse.arm("list step-00000002")
    assert _resumed(FaultyStore(store, fuse)) == (2, 2)


def test_the_wait_for_files_that_never_stop_arriving_is_bounded():
    store = MemoryStore()
    store._data.pop(_lost_before_its_commit(store)[1])
    arrived = iter(range(10**9))
    fuse = Fuse(lambda _: store._data.update({f"step-00000002/rank-{next(arrived):05d}.{'0' * 12}.safetensors": b""}))
    fuse.arm("list step-00000002", forever=True)
    started = time.monotonic()
    with layouts.quiet():
        assert _resumed(FaultyStore(store, fuse)) == (1, 1)
    assert time.monotonic() - started < 2
