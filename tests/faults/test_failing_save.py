"""A save that a fault of its store breaks at any point. Kills are in test_kills.py."""

from __future__ import annotations

import itertools
import re

import pytest

from distckpt import Checkpointer
from distckpt.errors import DistckptError
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import layouts
from tests.faults.failpoints import FaultyStore, Fuse
from tests.faults.sharded import Sharded, on_threads

THREE = 3


class Broken:
    """Three ranks, a committed step 1, and a save of step 2 in which one rank's store has a fault."""

    def __init__(self, store, failing):
        self.store, self.failing, self.fuse = store, failing, Fuse()

    def save_step_2(self, at, *, forever):
        """Each rank's error (None where its save succeeded), then, with the fault mended, those of saving step 3."""

        def work(comm):
            state = Sharded(comm.rank, THREE, 1)
            mine = FaultyStore(self.store, self.fuse) if comm.rank == self.failing else self.store
            checkpointer = Checkpointer(mine, comm=comm, arena_bytes=4096, wait=True)
            checkpointer.save(1, state)
            comm.all_gather("arming", b"")
            if comm.rank == self.failing:
                self.fuse.arm(at, forever=forever)
            state.set(2)
            first = _error(lambda: checkpointer.save(2, state))
            self.fuse.disarm() if comm.rank == self.failing else None
            comm.all_gather("mended", b"")
            left = sorted(e.name for e in self.store.list("step-00000002"))
            comm.all_gather("looked", b"")
            state.set(3)
            return first, left, _error(lambda: checkpointer.save(3, state))

        with layouts.quiet():  # a fault in last.json or meta.json is a warning: the checkpoint is committed
            results = on_threads(THREE, work)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def loads(self, step, value):
        """Whether every rank loads this step and finds it whole."""

        def work(comm):
            state = Sharded(comm.rank, THREE)
            Checkpointer(self.store, comm=comm, wait=True).load(state, step=step)
            return state.is_at(value)

        return on_threads(THREE, work) == [True] * THREE

    def steps(self):
        return Checkpointer(self.store, wait=True).steps()


def _error(fn, kind=DistckptError):
    """Text of the error that fn raises, None where it raises none."""
    try:
        fn()
    except kind as e:
        return str(e)
    return None


def _check(store, failing, at, *, forever):
    """Break the save at one point and check all that must hold. Returns the point, None when there is none."""
    broken = Broken(store, failing)
    results = broken.save_step_2(at, forever=forever)
    point = broken.fuse.trace[at - 1] if broken.fuse.blown else None
    errors = [first for first, _, _ in results]
    assert all(third is None for _, _, third in results), f"{point}: the next save failed: {results}"
    assert broken.loads(1, 1), f"{point}: the previous checkpoint"
    assert broken.loads(3, 3), f"{point}: the next checkpoint"
    committed = 2 in broken.steps()
    if committed:
        assert broken.loads(2, 2), f"{point}: committed, but not whole"
    if any(errors):
        assert all(errors), f"{point}: some ranks believe in the save: {errors}"
        assert all(f"rank {failing}" in e and "injected fault" in e for e in errors), f"{point}: {errors}"
        uncertain = point.startswith("create step-00000002/commit.json done") or forever
        assert uncertain or not committed, f"{point}: it raised, but it did commit"
        left = [n for n in results[0][1] if not (forever and n.split(".")[0].endswith(f"-{failing:05d}"))]
        if forever and failing == 0:
            left = [n for n in left if not re.match("trainer_state", n)]
        assert committed or not left, f"{point}: left behind {left}"
    else:
        assert committed, f"{point}: no rank raised, and nothing is committed"
    return point


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
def test_a_store_error_at_any_point_is_raised_on_every_rank_or_the_save_is_whole(failing, forever):
    points = []
    for at in itertools.count(1):
        point = _check(MemoryStore(), failing, at, forever=forever)
        if point is None:
            break
        points.append(point)
    wanted = {"write step-00000002/rank-0000%d.*.safetensors piece 1", "write step-00000002/ack-0000%d.*.json done"}
    assert {w % failing for w in wanted} <= set(points)
    if failing == 0:
        assert {"create step-00000002/commit.json", "create step-00000002/commit.json done"} <= set(points)


@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.full)])
def test_the_same_holds_on_a_file_system(tmp_path, failing):
    for at in itertools.count(1):
        if _check(LocalStore(tmp_path / str(at)), failing, at, forever=False) is None:
            break
    assert at > 5
