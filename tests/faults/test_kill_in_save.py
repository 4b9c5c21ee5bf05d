"""A save that is broken at any point: by errors (ranks as threads), by SIGKILL (real gloo processes)."""

from __future__ import annotations

import itertools
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer
from distckpt.comm import TorchComm
from distckpt.errors import DistckptError, RanksMissing
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import layouts, ranks
from tests.faults.failpoints import FaultyComm, FaultyStore, Fuse, kill
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


# -- SIGKILL, on real processes -----------------------------------------------------------------------------------

SALTS = {1: "one", 2: "two"}
TIMEOUT = 3.0
"""Seconds that a rank waits for the others at most."""


def _state():
    """State of a small model with Adam's moments: FSDP2 over the ranks of this job, plain on one."""
    torch.manual_seed(0)
    model = torch.nn.Linear(19, 7)
    if dist.is_initialized():
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters())
    layouts.make_moments(model, optimizer)
    return layouts.train_state(model, optimizer)


def _save_and_die(root, killed, point):
    """Save step 1, then step 2; when the first of `killed` comes to that point of it, all of `killed` die.

    Returns (trace, error, seconds) of step 2.
    """
    comm = TorchComm(TIMEOUT)
    pids = [int.from_bytes(pid, "little") for pid in comm.all_gather("pids", os.getpid().to_bytes(8, "little"))]
    fuse = Fuse(lambda _: kill(*(pids[rank] for rank in reversed(killed))))
    comm = FaultyComm(comm, fuse)
    checkpointer = Checkpointer(FaultyStore(LocalStore(root), fuse), comm=comm, arena_bytes=1024, wait=True)
    state = _state()
    layouts.fill(state.capture(), salt=SALTS[1])
    checkpointer.save(1, state)
    layouts.fill(state.capture(), salt=SALTS[2])
    fuse.arm(point if killed and comm.rank == killed[0] else None)
    started = time.monotonic()
    error = _error(lambda: checkpointer.save(2, state), RanksMissing)
    return fuse.trace, error, time.monotonic() - started


def _resume(root):
    """(step that is resumed, what of it is wrong)."""
    state = _state()
    with Checkpointer(root, timeout=TIMEOUT, wait=True) as checkpointer:
        report = checkpointer.resume(state)
        return report.step, layouts.wrong(state.capture(), salt=SALTS[report.step])


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Points of an undisturbed save, of each rank."""
    results = ranks.run(2, _save_and_die, str(tmp_path_factory.mktemp("undisturbed")), (), None)
    assert [error for _, error, _ in results] == [None, None]
    return [trace for trace, _, _ in results]


def _kill(root, trace, killed, point, resumed_on):
    """Kill ranks at a point of the save, resume on a fresh group, and return what went wrong, by the point's name."""
    results = ranks.run(2, _save_and_die, str(root), killed, point, may_die=killed)
    problems = ["it lives"] if results[killed[0]] else []
    committed = (root / "step-00000002" / "commit.json").exists()
    for _, error, seconds in filter(None, results):
        if error is None and not committed:
            problems.append("the survivor believes in a save that is not committed")
        if error and f"rank {killed[0]} did not answer" not in error:
            problems.append(f"the survivor says {error}")
        if seconds > TIMEOUT + 2:
            problems.append(f"the survivor took {seconds:.1f} s")
    resumed = ranks.run(resumed_on, _resume, str(root))
    steps = {step for step, _ in resumed}
    if len(steps) != 1 or any(wrong for _, wrong in resumed) or (committed and steps != {2}):
        problems.append(f"committed: {committed}; resumed {resumed}")
    return [f"{killed} at {trace[point - 1]}: {problem}" for problem in problems]


def _kill_at_all(tmp_path, trace, killed, points, resumed_on):
    """Kill at each of these points; most of the time is waiting, so several at once."""
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda p: _kill(tmp_path / str(p), trace, killed, p, resumed_on), points))
    assert not [problem for problems in found for problem in problems]


SAMPLE = (
    "write step-00000002/rank-0000{rank}.*.safetensors piece 2",
    "write step-00000002/ack-0000{rank}.*.json done",
    "all_gather writing step-00000002 done",
    "create step-00000002/commit.json",
    "create step-00000002/commit.json done",
    "all_gather committing step-00000002 done",
)

KILLED = pytest.mark.parametrize(
    "killed", [(0,), pytest.param((1,), marks=pytest.mark.full), (0, 1)], ids=["rank 0", "rank 1", "both"]
)


@KILLED
def test_a_kill_in_a_save_leaves_the_previous_checkpoint_or_the_new_one_whole(tmp_path, traces, killed):
    trace = traces[killed[0]]
    names = [name.format(rank=killed[0]) for name in SAMPLE]
    points = [trace.index(name) + 1 for name in names if name in trace]
    _kill_at_all(tmp_path, trace, killed, points, 2 if killed == (0, 1) else 1)


@pytest.mark.full
@pytest.mark.timeout(600)
@KILLED
def test_the_same_holds_at_every_point_there_is(tmp_path, traces, killed):
    trace = traces[killed[0]]
    _kill_at_all(tmp_path, trace, killed, range(1, len(trace) + 1), 2)
