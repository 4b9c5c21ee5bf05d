"""What goes wrong around saves in the background: told on every rank, once, and the next save is made."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import OutOfStep, RanksMissing, StateWarning, StoreError
from distckpt.format.layout import StepDir
from distckpt.run import background, pending
from distckpt.run.background import Background
from distckpt.run.history import History
from distckpt.run.publish import Then
from distckpt.saving.commit import Attempt, commit, commit_when_acked
from distckpt.saving.part import Part
from distckpt.store.local import LocalStore
from tests import ranks
from tests.run.test_async import committed, loaded, state, stopped_writer, until, writers

REPOSITORY = Path(__file__).parents[2]


def saved(root, **options):
    live, _ = state(1)
    with Checkpointer(root, timeout=20, **options) as c:
        c.save(1, live).wait()
    return committed(root)


def made(name, tensor):
    model = torch.nn.Module()
    model.register_buffer(name, tensor)
    return TrainState(model=model, rng=False)


# -- the process -----------------------------------------------------------------------------------------------------


def test_python_without_the_calls_that_old_systems_lack(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.delattr(os, "posix_fallocate")
    assert saved(tmp_path) == [1]


def test_a_process_with_more_descriptors_than_select_can_take(tmp_path):
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open(os.devnull))
        assert saved(tmp_path) == [1]


def test_modules_are_found_where_the_training_process_finds_them_and_pythons_own_come_first(tmp_path, monkeypatch):
    (tmp_path / "dataclasses.py").write_text("raise ImportError('a backport')")
    monkeypatch.setattr(sys, "path", [*sys.path, "", str(tmp_path), Path("/a/path"), None])
    assert saved(tmp_path / "run") == [1]


def test_a_process_that_dies_says_why(tmp_path, monkeypatch):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(StoreError, match=r"exit status 3; it said: no such module"):
        saved(tmp_path / "run")


def _cannot_start(root):
    live, _ = state(1)
    said = []
    with Checkpointer(root, timeout=20) as c:
        python = sys.executable
        sys.executable = "/nowhere/python" if torch.distributed.get_rank() else python
        c.step(1, live)  # nothing is due: the process is to be started ahead
        c.save(1, live)
        sys.executable = python
        said.append(ranks.expect_error(c._saver.finish, Exception))
        c.save(2, live).wait()
    return said


def test_a_process_that_cannot_be_started_on_one_rank_is_told_on_all(tmp_path):
    found = ranks.run(2, _cannot_start, str(tmp_path))
    assert all("cannot be started as '/nowhere/python'" in said for (said,) in found)
    assert committed(tmp_path) == [2]


def test_a_writer_killed_while_it_writes_leaves_nothing_behind(tmp_path):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(32 << 20))
    with Checkpointer(tmp_path, timeout=20) as c:
        first = c.save(1, TrainState(model=model, rng=False))
        until(lambda: list(tmp_path.glob("step-00000001/.tmp-*-rank-*")))
        os.kill(writers()[0], signal.SIGKILL)
        with pytest.raises(StoreError, match="killed by signal 9"):
            first.wait()
        assert not (tmp_path / "step-00000001").exists()


def test_a_writer_killed_after_its_commit_has_not_failed(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=20) as c, stopped_writer(c, tmp_path) as pid:
        first = c.save(1, live)
        attempt = first._part.attempt
        with Checkpointer(tmp_path / "other", wait=True) as other:  # what it would have written
            other.save(1, live)
        content = next(History(LocalStore(tmp_path / "other")).valid()).manifest
        commit(LocalStore(tmp_path), attempt, replace(content, attempt=attempt.id))
        os.kill(pid, signal.SIGKILL)
        first.wait()
        assert first.committed
    assert not list(tmp_path.glob("step-*/ack-*"))


def _forgets(root):
    c = Checkpointer(root)
    c.save(1, state(1)[0])
    c._job.close()  # the thread of its heartbeat


def test_a_forgotten_checkpointer_tells_of_its_failure_and_gives_memory_back(tmp_path):
    (tmp_path / "step-00000001").write_text("in the way")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.warns(StateWarning, match=r"has failed: cannot write .*step-00000001.*close\(\) the Checkpointer"):
        _forgets(tmp_path)
    gc.collect()
    assert not writers()
    assert len(os.listdir("/proc/self/fd")) == before


# -- messages --------------------------------------------------------------------------------------------------------


def _staging_raises(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(pending, "stage", fails)


def test_an_error_of_any_length_is_told(tmp_path, monkeypatch):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=20) as c:
        with monkeypatch.context() as patch:
            _staging_raises(patch, RuntimeError("\N{SNOWMAN}" * 300_000))
            c.save(1, live)
        with pytest.raises(StoreError, match="RuntimeError: \N{SNOWMAN}"):
            c.save(2, live)
        c.save(2, live).wait()
        assert len(writers()) == 1
    assert committed(tmp_path) == [2]


def test_ranks_that_are_missing_are_told_however_many(tmp_path):
    writer = Background(0.5)
    job = writer.begin(LocalStore(tmp_path), Part(Attempt(StepDir(1, 1), "0123456789ab", 20_000), 0), Then())
    writer.written(job, 0)
    writer.wait(job)
    writer.close()
    assert isinstance(job.error, RanksMissing)
    assert "no ack from ranks 0, 1, 2" in str(job.error)
    assert "and 19984 more" in str(job.error)


def test_a_failure_that_was_raised_is_not_raised_again(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=20) as c:
        (tmp_path / "step-00000001").write_text("in the way")
        with pytest.raises(StoreError):
            c.save(1, live).wait()
        c.save(2, live).wait()
    assert committed(tmp_path) == [2]


def test_saves_are_watched_from_other_threads(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=20) as c:
        latest, done = [c.save(0, live)], threading.Event()

        def watch():
            while not done.is_set():
                found.append(latest[0].committed)

        found = []
        threads = [threading.Thread(target=watch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for step in range(1, 6):
            latest[0] = c.save(step, live)
            latest[0].wait(20)
        done.set()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert committed(tmp_path) == list(range(6))


# -- staging ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_save_frees_its_place(tmp_path, monkeypatch):
    live, _ = state(1)
    with Checkpointer(tmp_path, timeout=20) as c:
        with monkeypatch.context() as patch:
            _staging_raises(patch, KeyboardInterrupt())
            for step in (1, 2, 3):
                with pytest.raises(KeyboardInterrupt):
                    c.save(step, live)
        c.save(4, live).wait()
    assert committed(tmp_path) == [4]


def test_an_arena_that_cannot_be_made_costs_one_save(tmp_path, monkeypatch):
    def no_descriptor(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    live, _ = state(1)
    large = made("b", torch.ones(1 << 20))
    with Checkpointer(tmp_path, timeout=20) as c:
        c.save(1, live).wait()
        with monkeypatch.context() as patch:
            patch.setattr(background, "Arena", no_descriptor)
            c.save(2, large)
        with pytest.raises(StoreError, match="Too many open files"):
            c.save(3, live)
        c.save(3, live)
        c.save(4, large)
    assert committed(tmp_path) == [1, 3, 4]


def test_another_dtype_of_the_same_bytes_and_name_is_staged_anew(tmp_path):
    value = torch.tensor(3 + 4j, dtype=torch.complex64)
    with Checkpointer(tmp_path) as c:
        c.save(1, made("b", torch.full((8,), 7, dtype=torch.uint8))).wait()
        c.save(2, made("b", value)).wait()
        target = made("b", torch.zeros_like(value))
        c.load(target, step=2)
    assert torch.equal(target.capture().tensors["model.b"].shards[0].tensor, value)


def test_a_save_in_inference_mode_spoils_no_later_one(tmp_path):
    live, w = state(1)
    with Checkpointer(tmp_path) as c:
        with torch.inference_mode():
            c.save(1, live).wait()
        w.fill_(2)
        c.save(2, live).wait()
    assert torch.equal(loaded(tmp_path), w)


def test_states_grow_and_shrink(tmp_path):
    with Checkpointer(tmp_path) as c:
        for step, length in enumerate([5, 3 << 20, 0, 1 << 20, 7]):
            c.save(step, made("b", torch.full((length,), float(step))))
    for step, length in enumerate([5, 3 << 20, 0, 1 << 20, 7]):
        target = made("b", torch.zeros(length))
        with Checkpointer(tmp_path, wait=True) as c:
            c.load(target, step=step)
        assert torch.equal(target.capture().tensors["model.b"].shards[0].tensor, torch.full((length,), float(step)))


# -- ranks, and the next launch --------------------------------------------------------------------------------------


def _asks_alone(root):
    live, _ = state(1)
    c = Checkpointer(root, timeout=20)
    first = c.save(1, live)
    if torch.distributed.get_rank():
        ranks.expect_error(first.wait, OutOfStep)
    else:
        ranks.expect_error(lambda: c.save(2, live), OutOfStep)
    first.wait()
    c.close()


def test_a_rank_that_asks_at_the_wrong_place_destroys_no_save(tmp_path):
    ranks.run(2, _asks_alone, str(tmp_path))
    assert committed(tmp_path) == [1]


def test_a_writer_whose_save_a_resume_committed_finds_that(tmp_path):
    saved(tmp_path)
    (checkpoint,) = History(LocalStore(tmp_path)).valid()
    attempt = Attempt(checkpoint.directory, checkpoint.manifest.attempt, 1)
    found = commit_when_acked(LocalStore(tmp_path), attempt, None, timeout=0.0)
    assert found == checkpoint.manifest


def test_an_earlier_failure_does_not_cost_the_save_before_the_job_is_stopped(tmp_path):
    live, _ = state(1)
    with Checkpointer(tmp_path, every=1, preemption=True, timeout=20) as c:
        assert c.step(1, live).saved
        c._saver.finish()
        (tmp_path / "step-00000002").write_text("in the way")
        failed = c.step(2, live).saved
        until(lambda: failed.failed)
        (tmp_path / "stop").write_text("")
        time.sleep(1.1)
        with pytest.warns(StateWarning, match="last chance: .*a part of the path is a file"):
            report = c.step(3, live)
    assert report.should_stop
    assert committed(tmp_path) == [1, 3]


_TRAINER = """
import os, signal, sys, torch
from pathlib import Path
from distckpt import Checkpointer, TrainState
model = torch.nn.Module()
model.w = torch.nn.Parameter(torch.ones(4 << 20))
state = TrainState(model=model, rng=False)
c = Checkpointer(sys.argv[1])
c.save(1, state).wait()
writer = c._saver._background._line._process.pid
os.kill(writer, signal.SIGSTOP)
c.save(2, state)
c.save(3, state)
os.kill(writer, signal.SIGCONT)
while not list(Path(sys.argv[1]).glob("step-00000002/.tmp-*-rank-*")):
    pass
os.kill(writer, signal.SIGSTOP)
print(writer, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_resume_waits_for_what_a_lost_jobs_writer_is_still_writing(tmp_path):
    told = subprocess.run(
        [sys.executable, "-c", _TRAINER, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, check=False
    )
    writer = int(told.stdout)
    assert LocalStore(tmp_path).arriving("step-00000002")
    target = made("x", torch.zeros(1))
    threading.Timer(1.5, os.kill, [writer, signal.SIGCONT]).start()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(4 << 20))
    target = TrainState(model=model, rng=False)
    with Checkpointer(tmp_path, timeout=60) as c:
        assert c.resume(target).step == 3
    until(lambda: not Path(f"/proc/{writer}").exists())
