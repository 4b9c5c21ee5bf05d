"""Two jobs on one run: the second is told while the first lives, and takes over once it is dead."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import RunConflict
from distckpt.run import heartbeat
from distckpt.run.heartbeat import Heartbeat, refuse_living, seen_alive
from distckpt.run.launches import open_launch
from distckpt.store.base import read_all
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore

_JOB = """
import sys, time, torch
from distckpt import Checkpointer, TrainState
from distckpt.run import heartbeat
heartbeat.INTERVAL = 0.2
c = Checkpointer(sys.argv[1])
state = TrainState(model=torch.nn.Linear(1, 1), rng=False)
c.resume(state)
c.save(1, state, wait=True)
print("trains", flush=True)
sys.stdin.read()
c.close()
"""


@pytest.fixture
def job(tmp_path):
    command = [sys.executable, "-c", _JOB, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        assert running.stdout.readline() == b"trains\n"
        yield running
        running.kill()


def resume(root):
    state = TrainState(model=torch.nn.Linear(1, 1), rng=False)
    with Checkpointer(root, timeout=20) as c:
        report = c.resume(state)
        c.save(report.step + 1, state, wait=True)
        return report.step


def test_a_second_job_is_told_of_the_first_which_goes_on(tmp_path, job):
    with pytest.raises(RunConflict, match=rf"pid={job.pid} on {socket.gethostname()} .* is training on this run"):
        resume(tmp_path)
    state = TrainState(model=torch.nn.Linear(1, 1), rng=False)
    with Checkpointer(tmp_path) as reader:
        assert reader.load(state).step == 1, "to read is always possible"
    job.communicate(b"")
    assert resume(tmp_path) == 1, "it has ended"


def test_a_job_that_was_killed_here_is_taken_over_from_at_once(tmp_path, job):
    job.kill()
    job.wait()
    started = time.monotonic()
    assert resume(tmp_path) == 1
    assert time.monotonic() - started < 10


def test_a_job_elsewhere_counts_as_dead_once_its_beat_is_stale(tmp_path, job, monkeypatch):
    monkeypatch.setattr(heartbeat.socket, "gethostname", lambda: "another-machine")
    with pytest.raises(RunConflict):
        resume(tmp_path)
    os.kill(job.pid, signal.SIGSTOP)
    started = time.monotonic()
    assert resume(tmp_path) == 1
    assert time.monotonic() - started > 0.5


def test_the_restart_of_a_job_is_the_same_job(monkeypatch):
    store = MemoryStore()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    number = open_launch(store, None, 1, "now")
    beat = Heartbeat(store)
    beat.start(number)
    started = time.monotonic()
    refuse_living(store, 60)
    assert time.monotonic() - started < 1
    beat.stop()


def test_the_beat_counts_and_says_when_it_ends(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    store = MemoryStore()
    beat = Heartbeat(store)
    beat.start(3)

    def said():
        return json.loads(read_all(store, "launches/0003.beat.json", limit=1000))

    first = said()
    deadline = time.monotonic() + 10
    while said()["count"] == first["count"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beat.stop()
    assert (first["ended"], said()["ended"]) == (False, True)


def test_a_beat_of_the_future_is_no_sign_of_life(tmp_path):
    store = LocalStore(tmp_path)
    beat = Heartbeat(store)
    beat.start(open_launch(store, None, 1, "now"))
    assert seen_alive(store)
    later = time.time() + 3600  # the clock was set back since
    os.utime(tmp_path / "launches" / "0001.beat.json", (later, later))
    assert not seen_alive(store)
    beat.stop()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"count": "x"}', b"\xff"])
def test_a_beat_that_cannot_be_read_stops_nobody(content):
    store = MemoryStore()
    open_launch(store, None, 1, "now")
    store.write("launches/0001.beat.json", [memoryview(content)], size=len(content))
    refuse_living(store, 60)


def test_a_job_that_was_let_go_of_without_a_close_beats_no_more(tmp_path):
    before = threading.active_count()
    for step in range(1, 6):
        state = TrainState(model=torch.nn.Linear(1, 1), rng=False)
        c = Checkpointer(tmp_path, wait=True)
        c.resume(state)
        c.save(step, state, wait=True)
    assert threading.active_count() > before
    del c
    gc.collect()
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_store_that_does_not_answer_keeps_nobody_from_ending(monkeypatch):
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.1)
    ended, begun = threading.Event(), threading.Event()

    class Silent(MemoryStore):
        def write(self, key, pieces, *, size, stable=0):
            if begun.is_set():
                ended.wait(20)
            super().write(key, pieces, size=size, stable=stable)

    beats = Heartbeat(Silent())
    beats.start(1)
    begun.set()
    time.sleep(0.3)
    started = time.monotonic()
    beats.stop()
    assert time.monotonic() - started < 5
    ended.set()
