"""Jobs that are told to stop: one step boundary, a committed checkpoint, an exit code; and no child that dies of it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import StateWarning
from distckpt.run.background import Background
from distckpt.run.history import History
from distckpt.run.preemption import REQUEUE, STOPPED, Preemption, Reason
from distckpt.store.local import LocalStore
from tests import ranks


def state():
    return TrainState(model=torch.nn.Linear(2, 2), rng=False)


def committed(root):
    return sorted({c.directory.step for c in History(LocalStore(root)).valid()})


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", REQUEUE), ("SIGUSR1", REQUEUE), ("SIGINT", STOPPED)])
def test_a_signal_is_a_checkpoint_and_an_exit_code(tmp_path, number, code):
    before = signal.getsignal(getattr(signal, number))
    with Checkpointer(tmp_path, every=100, preemption=True) as c:
        live = state()
        assert not c.step(1, live).should_stop
        os.kill(os.getpid(), getattr(signal, number))
        os.kill(os.getpid(), getattr(signal, number))  # a launcher passes on what it got itself
        report = c.step(2, live)
        assert (report.should_stop, report.exit_code, report.note) == (True, code, "")
        assert report.saved.committed
    assert committed(tmp_path) == [2]
    assert signal.getsignal(getattr(signal, number)) == before


def test_without_preemption_signals_are_nobodys_business(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(tmp_path, every=100) as c:
        assert signal.getsignal(signal.SIGTERM) == before
        report = c.step(1, state())
        assert (report.should_stop, report.exit_code, report.saved) == (False, 0, None)


def test_a_stop_file_stops_and_is_not_to_be_requeued(tmp_path):
    with Checkpointer(tmp_path, preemption=True) as c:
        live = state()
        assert not c.step(1, live).should_stop
        (tmp_path / "stop").write_text("")
        time.sleep(1.1)  # it is looked for about once a second
        report = c.step(2, live)
        assert (report.reason, report.exit_code) == (Reason.ASKED, STOPPED)
    assert committed(tmp_path) == [2]


@pytest.mark.parametrize(("left", "stops"), [(15, True), (3600, False), (-5, False)])
def test_the_end_of_the_jobs_time(tmp_path, monkeypatch, left, stops):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + left))
    with Checkpointer(tmp_path, preemption=True) as c:
        report = c.step(1, state())
        assert report.reason == (Reason.DEADLINE if stops else Reason.NONE)
        assert report.exit_code == (REQUEUE if stops else 0)
    assert committed(tmp_path) == ([1] if stops else [])


def test_a_save_that_does_not_fit_is_skipped_where_there_is_a_checkpoint(tmp_path):
    with Checkpointer(tmp_path, preemption=Preemption(grace=1e-6)) as c:
        live = state()
        c.save(1, live, wait=True)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.warns(StateWarning, match="step 2 is not saved: 0 s are left, and a save takes"):
            report = c.step(2, live)
        assert (report.should_stop, report.exit_code, report.saved) == (True, REQUEUE, None)
    assert committed(tmp_path) == [1]


def test_a_save_that_does_not_fit_is_tried_where_there_is_none(tmp_path):
    with Checkpointer(tmp_path, preemption=Preemption(grace=1e-6)) as c:
        os.kill(os.getpid(), signal.SIGTERM)
        assert c.step(1, state()).saved.committed
    assert committed(tmp_path) == [1]


def test_the_last_save_is_made_even_where_saves_are_skipped_that_would_have_to_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(Background, "busy", property(lambda self: self.poll() or bool(self._jobs)))
    with Checkpointer(tmp_path, preemption=True, when_busy="skip") as c:
        live = TrainState(model=torch.nn.Linear(1000, 1000), rng=False)
        c.save(1, live)
        os.kill(os.getpid(), signal.SIGTERM)
        assert c.step(2, live).saved.committed


def test_every_checkpointer_of_a_process_is_told(tmp_path):
    with Checkpointer(tmp_path / "a", preemption=True) as a, Checkpointer(tmp_path / "b", preemption=True) as b:
        os.kill(os.getpid(), signal.SIGTERM)
        assert [c.step(1, state()).exit_code for c in (a, b)] == [REQUEUE, REQUEUE]


def test_signals_are_given_back_in_whatever_order_checkpointers_are_closed(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    twice = Preemption(signals=("SIGTERM", "SIGTERM"))
    a, b, c = (Checkpointer(tmp_path / name, preemption=twice) for name in "abc")
    b.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert a.step(1, state()).should_stop
    a.close()
    assert c.step(1, state()).should_stop
    c.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_no_stop_file_is_none(tmp_path):
    with Checkpointer(tmp_path, preemption=Preemption(stop_file="")) as c:
        assert not c.step(1, state()).should_stop


@pytest.mark.parametrize(
    ("options", "message"),
    [({"signals": ("SIGWINTER",)}, "'SIGWINTER' is no signal"), ({"grace": "soon"}, "grace='soon'")],
)
def test_what_cannot_be_is_refused_before_it_is_needed(options, message):
    with pytest.raises(ValueError, match=message):
        Preemption(**options)
    assert Preemption(grace="2 min").grace == 120


_SECOND = """
import os, signal, sys, time, torch
from distckpt import Checkpointer, TrainState
from distckpt.run import preemption
preemption._AGAIN = 0.2
c = Checkpointer(sys.argv[1], preemption=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.5)
print("waiting", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(30)
"""


def test_a_second_signal_ends_at_once(tmp_path):
    done = subprocess.run([sys.executable, "-c", _SECOND, str(tmp_path)], capture_output=True, timeout=60, check=False)
    assert done.stdout == b"waiting\n"
    assert done.returncode == -signal.SIGTERM


def _one_is_told(root, number):
    rank = torch.distributed.get_rank()
    with Checkpointer(root, every=10_000, preemption=True, timeout=20) as c:
        live = state()
        for step in range(1, 10_000):
            time.sleep(0.005)
            if step == 20 and rank == 1:
                os.kill(os.getpid(), number)
            report = c.step(step, live)
            if report.should_stop:
                return step, report.exit_code
    return None


def test_a_signal_on_one_rank_stops_all_at_one_step(tmp_path):
    first, second = ranks.run(2, _one_is_told, str(tmp_path), signal.SIGUSR1)
    assert first == second
    assert first[1] == REQUEUE
    assert 20 <= first[0] <= 20 + 64
    assert committed(tmp_path) == [first[0]]


# -- children --------------------------------------------------------------------------------------------------------


class _Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(0.002)
        return index


def _with_workers(root, name):
    """Train in a process group of its own; the whole of it is signalled from outside, as by torchrun and scancel."""
    os.setpgid(0, 0)
    live = state()
    with Checkpointer(root, every=10_000, preemption=True, timeout=20) as c:
        iterator = iter(torch.utils.data.DataLoader(_Slow(), batch_size=4, num_workers=2))
        for step, _ in enumerate(iterator, 1):
            if step == 10:
                tell = f"import os, signal; os.killpg({os.getpid()}, signal.SIG{name})"
                subprocess.run([sys.executable, "-c", tell], start_new_session=True, check=True)
            report = c.step(step, live)
            if report.should_stop:
                break
        time.sleep(2)
        for _ in range(50):
            next(iterator)  # of workers that live: they have fetched only a few ahead
        del iterator
    return step, report.exit_code, len(multiprocessing.active_children())


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_workers_of_a_loader_survive_the_signal_and_end_with_it(tmp_path, name):
    ((step, code, children),) = ranks.run(1, _with_workers, str(tmp_path), name)
    assert (code, children) == (REQUEUE, 0)
    assert committed(tmp_path) == [step]


def _sleep(running):
    running.set()
    time.sleep(60)


def _terminated(root):
    fork = multiprocessing.get_context("fork")
    with Checkpointer(root, preemption=True):
        running = fork.Event()
        child = fork.Process(target=_sleep, args=(running,))
        child.start()
        assert running.wait(20)
        started = time.monotonic()
        child.terminate()
        child.join(60)
        return child.exitcode, time.monotonic() - started


def test_a_child_that_is_terminated_ends(tmp_path):
    ((code, seconds),) = ranks.run(1, _terminated, str(tmp_path))
    assert code == -signal.SIGTERM
    assert seconds < 60


def _busy(root):
    """Both are told while this process is in the middle of something that runs no handler, as a collective is."""
    fork = multiprocessing.get_context("fork")
    with Checkpointer(root, preemption=True) as c:
        live = state()
        assert not c.step(1, live).should_stop
        running = fork.Event()
        child = fork.Process(target=_sleep, args=(running,))
        child.start()
        assert running.wait(20)

        def tell():
            for pid in (child.pid, os.getpid()):
                os.kill(pid, signal.SIGTERM)

        threading.Timer(0.2, tell).start()
        started = time.monotonic()
        while time.monotonic() - started < 3.0:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 12_000_000)  # in one piece, some seconds
        lives = child.is_alive()
        child.kill()
        child.join()
        return lives, c.step(2, live).exit_code


def test_a_child_survives_also_while_its_parent_cannot_run_a_handler(tmp_path):
    assert ranks.run(1, _busy, str(tmp_path)) == [(True, REQUEUE)]
