"""Saves that training does not wait for: the writer process, what it leaves behind, and every way to lose it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import RankFailed, RanksMissing, StateWarning, StoreError
from distckpt.run.history import History
from distckpt.run.writer import NOT_OURS
from distckpt.store.local import LocalStore
from tests import ranks

VALUES = 4096


def state(value):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.full((VALUES,), float(value)))
    return TrainState(model=model, rng=False), model.w.data


def writers():
    """Process ids of the writer processes of this process."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with warnings.catch_warnings():
            try:
                told = (entry / "cmdline").read_bytes().split(b"\0")
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
        if alive and any(b"distckpt.run.writer" in part for part in told) and str(os.getpid()).encode() in told:
            found.append(int(entry.name))
    return found


def committed(root):
    return sorted({c.directory.step for c in History(LocalStore(root)).valid()})


def until(happens, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def loaded(root, **options):
    target, w = state(-1)
    with Checkpointer(root, wait=True) as c:
        c.load(target, **options)
    return w


@contextlib.contextmanager
def stopped_writer(c, root):
    """Its writer process does nothing while the block runs."""
    c._saver._background.start()
    until(writers)
    (pid,) = writers()
    time.sleep(0.3)  # it has started, and waits for messages
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_the_state_may_change_at_once_and_what_was_is_saved(tmp_path):
    live, w = state(0)
    with Checkpointer(tmp_path) as c:
        for step in range(1, 6):
            w.fill_(step)
            pending = c.save(step, live, {"loss": step / 2})
            assert (pending.step, str(pending.directory), pending.staged) == (step, f"step-0000000{step}", True)
            w.fill_(-1)
        report = pending.result()
        assert pending.committed
        assert (report.step, report.directory) == (5, "step-00000005")
        assert report.nbytes > 4 * VALUES
        assert pending.result() is report
    for step in range(1, 6):
        assert torch.equal(loaded(tmp_path, step=step), torch.full((VALUES,), float(step)))
    assert (tmp_path / "last").resolve().name == "step-00000005"
    assert not list(tmp_path.rglob("ack-*")) + list(tmp_path.rglob(".tmp-*"))


def _odd_state(fill):
    model = torch.nn.Module()
    for i, dtype in enumerate((torch.float64, torch.bfloat16, torch.bool, torch.complex64, torch.int8)):
        for j, shape in enumerate(((), (0,), (7,), (3, 5), (2, 1, 4))):
            values = torch.randint(0, 2, shape).to(dtype) if fill else torch.zeros(shape, dtype=dtype)
            model.register_buffer(f"b{i}{j}", values)
    base = torch.arange(24.0).reshape(4, 6) if fill else torch.zeros(4, 6)
    model.turned = torch.nn.Parameter(base.t())
    model.conj = torch.nn.Parameter(
        torch.ones(3, dtype=torch.complex64).mul(1j).conj() if fill else torch.zeros(3) * 0j
    )
    return model


def test_every_dtype_shape_and_stride_is_staged_as_it_is_written_from_live_memory(tmp_path):
    torch.manual_seed(0)
    model = _odd_state(fill=True)
    with Checkpointer(tmp_path) as c:
        c.save(1, TrainState(model=model, rng=False))
        c.save(2, TrainState(model=model, rng=False), wait=True)
    one, two = (next((tmp_path / f"step-0000000{s}").glob("rank-*")).read_bytes() for s in (1, 2))
    assert one == two
    again = _odd_state(fill=False)
    with Checkpointer(tmp_path) as c:
        c.resume(TrainState(model=again, rng=False))
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in model.state_dict().items())


def _train(root, stop):
    live, w = state(0)
    found = []
    with Checkpointer(root) as c:
        c.resume(live)
        for step in range(1, stop + 1):
            w.fill_(step)
            found.append(c.save(step, live))
            w.fill_(-1)
        sizes = [f.result().nbytes for f in found]
        assert found[-1].committed
    return sizes


def test_ranks_save_without_waiting_for_each_other(tmp_path):
    sizes = ranks.run(2, _train, str(tmp_path), 4)
    assert sizes[0] == sizes[1]
    assert committed(tmp_path) == [1, 2, 3, 4]
    assert all(torch.equal(loaded(tmp_path, step=s), torch.full((VALUES,), float(s))) for s in range(1, 5))


# -- what is left behind ---------------------------------------------------------------------------------------------


def _descriptors():
    return sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n != "3")


def test_nothing_is_left_after_close(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path) as c:
        c.save(1, live)
    before, mapped = len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("distckpt-arena")
    for root in ("a", "b", "c"):
        with Checkpointer(tmp_path / root) as c:
            c.save(1, live)
            c.save(2, live)
            until(lambda: len(writers()) == 1)
        assert not writers()
        assert committed(tmp_path / root) == [1, 2]
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count("distckpt-arena") == mapped == 0


def test_the_writer_process_is_small_and_has_no_torch(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path) as c:
        c.save(1, live).wait()
        (pid,) = writers()
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "torch" not in maps
        assert "numpy" not in maps
        told = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(told["VmRSS"].split()[0]) < 50_000
        assert os.getsid(pid) == pid


def test_a_signal_to_all_of_a_job_does_not_end_the_writer_not_even_as_it_starts(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path) as c:
        line = c._saver._background.start()
        for number in NOT_OURS:
            os.kill(line._process.pid, number)
        c.save(1, live).wait()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    assert committed(tmp_path) == [1]


_TRAINER = """
import os, sys, time, torch
from distckpt import Checkpointer, TrainState
model = torch.nn.Module()
model.w = torch.nn.Parameter(torch.ones(8 << 20))
c = Checkpointer(sys.argv[1])
state = TrainState(model=model, rng=False)
for step in (1, 2):
    c.save(step, state)
if sys.argv[2] == "fork" and not os.fork():
    time.sleep(60)
    os._exit(0)
print("staged", flush=True)
if sys.argv[2] == "exit":
    sys.exit()
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", pytest.param("fork", marks=pytest.mark.full), "exit"])
def test_the_writer_outlives_a_trainer_finishes_what_was_staged_and_ends(tmp_path, end):
    command = [sys.executable, "-c", _TRAINER, str(tmp_path), end]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as trainer:
        assert trainer.stdout.readline() == b"staged\n"
        if end != "exit":
            trainer.kill()
        trainer.wait(30)
        until(lambda: committed(tmp_path) == [1, 2])
        until(lambda: not [p for p in Path("/proc").glob("[0-9]*/cmdline") if f"\0{trainer.pid}\0" in _told(p)])
        if end == "fork":
            os.killpg(trainer.pid, signal.SIGKILL)
    assert not list(tmp_path.rglob(".tmp-*"))


def _told(path):
    try:
        told = path.read_text()
    except OSError:
        return ""
    return told if "distckpt.run.writer" in told else ""


def test_a_child_that_was_forked_leaves_the_writer_alone(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path) as c:
        c.save(1, live).wait()
        child = os.fork()
        if not child:
            c.close()
            os._exit(0)
        os.waitpid(child, 0)
        c.save(2, live).wait()
        assert len(writers()) == 1


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_writer_that_was_killed_is_told_at_the_next_save_and_replaced_at_the_one_after(tmp_path):
    live, w = state(1)
    with Checkpointer(tmp_path) as c:
        c.save(1, live).wait()
        with stopped_writer(c, tmp_path) as pid:
            pending = c.save(2, live)
            os.kill(pid, signal.SIGKILL)
            until(lambda: pending.failed)
            assert not pending.committed
            with pytest.raises(StoreError, match=r"step-00000002: the writer process ended .*killed by signal 9"):
                c.save(3, live)
            w.fill_(3)
            c.save(3, live).wait()
    assert committed(tmp_path) == [1, 3]
    assert torch.equal(loaded(tmp_path), torch.full((VALUES,), 3.0))


def _a_rank_fails(root, how):
    live, _ = state(1)
    rank = torch.distributed.get_rank()
    said = []
    with Checkpointer(root, timeout=20) as c:
        c.save(1, live).wait()
        if rank == 1 and how == "stage":
            from distckpt.run import pending

            pending.stage = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
        if rank == 1 and how == "write":
            (Path(root) / "step-00000002").write_text("in the way")
        torch.distributed.barrier()
        first = c.save(2, live)
        said.append(first.staged)
        if rank == 1 and how == "stage":
            pending.stage = __import__("distckpt.saving.stage", fromlist=["stage"]).stage
        try:
            until(lambda: first.failed)
            c.save(3, live)
        except (RankFailed, StoreError) as e:
            said.append(f"{type(e).__name__}: {e}")
        c.save(4, live)
    return said


@pytest.mark.parametrize(("how", "told"), [("stage", "no room"), ("write", "a part of the path is a file")])
def test_what_fails_on_one_rank_is_raised_on_every_rank_at_the_next_save(tmp_path, how, told):
    found = ranks.run(2, _a_rank_fails, str(tmp_path), how)
    assert [f[0] for f in found] == [True, how != "stage"]
    assert all(told in f[1] for f in found), found
    assert how == "write" or all("on rank 1: " in f[1] for f in found), found
    assert committed(tmp_path) == [1, 4]
    left = [p for p in tmp_path.rglob("*") if "step-00000002" in str(p) and p.is_file() and how == "stage"]
    assert not left, "what the other rank had written is taken away"


def test_a_failure_that_nobody_asked_for_is_raised_by_close(tmp_path):
    live, _ = state(1)
    c = Checkpointer(tmp_path)
    c.save(1, live).wait()
    (tmp_path / "step-00000002").write_text("in the way")
    c.save(2, live)
    with pytest.raises(StoreError, match="a part of the path is a file"):
        c.close()
    c.close()
    assert not writers()


def test_an_exception_in_the_block_is_raised_and_what_was_staged_is_committed(tmp_path):
    live, _ = state(1)
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path) as c:
        c.save(1, live)
        1 / 0  # noqa: B018
    assert committed(tmp_path) == [1]
    assert not writers()


# -- room ------------------------------------------------------------------------------------------------------------


def test_a_save_that_comes_too_early_is_skipped_where_that_is_wanted(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, when_busy="skip") as c, stopped_writer(c, tmp_path):
        assert c.save(1, live) is not None
        assert c.save(2, live) is not None
        with pytest.warns(StateWarning, match="step 3 is not saved: rank 0 is still writing 2 earlier saves"):
            assert c.save(3, live) is None
    assert committed(tmp_path) == [1, 2]


def test_a_save_that_comes_too_early_waits_for_room(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=30) as c, stopped_writer(c, tmp_path) as pid:
        c.save(1, live)
        c.save(2, live)
        threading.Timer(0.3, os.kill, [pid, signal.SIGCONT]).start()
        started = time.monotonic()
        c.save(3, live)
        assert 0.2 < time.monotonic() - started < 20
    assert committed(tmp_path) == [1, 2, 3]


def test_a_writer_that_hangs_is_told_after_the_timeout(tmp_path, monkeypatch):
    monkeypatch.setattr("distckpt.run.background._GRACE", 0.2)
    live, _ = state(1)
    c = Checkpointer(tmp_path, timeout=0.5)
    with stopped_writer(c, tmp_path):
        pending = c.save(1, live)
        with pytest.raises(RanksMissing, match="step-00000001: the writer process of this rank has not finished it"):
            pending.wait(0.2)
        c.save(2, live)
        with pytest.raises(RanksMissing, match="has not finished it"):
            c.save(3, live)
        with pytest.raises(RanksMissing):
            c.close()
    assert not writers()


def _some_do_not_fit(root):
    live, w = state(0)
    big = torch.distributed.get_rank() == int(Path(root, "big").read_text())
    with Checkpointer(root, arena_bytes=0 if big else None) as c:
        for step in (1, 2, 3):
            w.fill_(step)
            pending = c.save(step, live)
            w.fill_(-1)
        pending.wait()


@pytest.mark.parametrize("big", [0, 1])
def test_what_does_not_fit_into_the_arena_is_written_by_the_call(tmp_path, big):
    (tmp_path / "big").write_text(str(big))
    ranks.run(2, _some_do_not_fit, str(tmp_path))
    assert committed(tmp_path) == [1, 2, 3]
    assert all(torch.equal(loaded(tmp_path, step=s), torch.full((VALUES,), float(s))) for s in (1, 2, 3))


def test_one_step_saved_twice_in_flight_is_two_generations(tmp_path):
    live, w = state(1)
    with Checkpointer(tmp_path) as c, stopped_writer(c, tmp_path):
        c.save(7, live)
        w.fill_(2)
        c.save(7, live)
    assert [str(c.directory) for c in History(LocalStore(tmp_path)).valid()] == ["step-00000007.2", "step-00000007"]
    assert torch.equal(loaded(tmp_path), torch.full((VALUES,), 2.0))


def test_the_first_save_finds_process_and_arena_made(tmp_path):
    live, w = state(1)
    with Checkpointer(tmp_path, every=2) as c:
        assert c.step(1, live).saved is None
        until(writers)
        assert c._saver._background._arenas[0].nbytes >= 4 * VALUES
        arena = c._saver._background._arenas[0]
        w.fill_(2)
        saved = c.step(2, live).saved
        assert c._saver._background._arenas == {0: arena}
        saved.wait()
    with Checkpointer(tmp_path) as c:
        assert c.resume(live).step == 2
        until(writers)
    assert torch.equal(w, torch.full((VALUES,), 2.0))
