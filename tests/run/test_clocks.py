"""Clocks that are hours apart, and dates of files that say nothing: nothing is ordered by them, and nothing is lost."""

from __future__ import annotations

import os
import random
import time
import types

import pytest

from distckpt import Checkpointer, Keep
from distckpt.errors import NotACheckpoint
from distckpt.format.layout import StepDir
from distckpt.run import lease as leases
from distckpt.run.history import History
from distckpt.run.lease import lease, leased
from distckpt.run.publish import Retention, pointing, retain
from distckpt.run.sweep import leftovers, sweep
from distckpt.store.local import LocalStore
from distckpt.tools import gc
from tests.faults.sharded import Sharded


def run(root, *steps, **options):
    checkpointer, state = Checkpointer(root, wait=True, timeout=2, **options), Sharded(0, 1)
    checkpointer.resume(state)
    for step in steps:
        state.set(step)
        checkpointer.save(step, state)
    return checkpointer


def shake(root, draw):
    """Give every file and directory a date of its own: hours ago, hours ahead, or that of all others."""
    for path in [root, *root.rglob("*")]:
        date = time.time() + draw.choice((-1e6, -7200, 0, 7200, 1e6))
        os.utime(path, (date, date), follow_symlinks=False)


@pytest.fixture
def off(monkeypatch):
    """Set the clock by which leases are dated and read ahead by so many seconds."""

    def set_ahead(seconds):
        monkeypatch.setattr(leases, "time", types.SimpleNamespace(time=lambda: time.time() + seconds))

    return set_ahead


@pytest.mark.parametrize("seed", range(3))
def test_dates_of_files_decide_nothing(tmp_path, seed):
    draw = random.Random(seed)
    first = run(tmp_path, 1, 2, 3, keep=Keep(last=2))
    shake(tmp_path, draw)
    first.close()
    second = run(tmp_path, 4, 5, keep=Keep(last=2))
    shake(tmp_path, draw)
    assert second.steps() == [4, 5]
    assert pointing(LocalStore(tmp_path))["last"] == "step-00000005"
    back = Checkpointer(tmp_path, wait=True, timeout=2, keep=Keep(last=2))
    back.resume(Sharded(0, 1), step=4)
    shake(tmp_path, draw)
    state = Sharded(0, 1)
    assert run(tmp_path).load(state).step == 4
    assert state.is_at(4)


def test_gc_beside_a_job_that_lives_goes_by_no_date(tmp_path, monkeypatch):
    run(tmp_path, 1)
    directory = tmp_path / "step-00000002"
    directory.mkdir()
    (directory / "rank-00000.0123456789ab.safetensors").write_bytes(b"on its way, and its ack is still to come")
    for path in directory.iterdir():
        os.utime(path, (0, 0))  # by the clock of another host
    monkeypatch.setattr(gc, "living", lambda store, patience: {"pid": 1, "host": "another"})
    answer = gc.run(types.SimpleNamespace(run_path=str(tmp_path), idle="1 s", copies="1 day", delete=True))
    assert [found["over"] for found in answer.value["found"]] == [False]
    assert list(directory.iterdir())


def test_what_is_being_written_stays_though_no_heart_beats_and_its_date_is_old(tmp_path):
    """Of a writer that outlives its job."""
    run(tmp_path, 1)
    store, seen = LocalStore(tmp_path), []

    def pieces():
        yield memoryview(bytes(9 << 20))
        for path in (tmp_path / "step-00000002").iterdir():
            os.utime(path, (0, 0))
        history = History(store)
        seen.append(sweep(history, leftovers(history, idle=1.0)))
        yield memoryview(b"end")

    store.write("step-00000002/rank-00000.0123456789ab.safetensors", pieces(), size=(9 << 20) + 3)
    assert seen == [([], [])]


def test_a_lease_by_a_clock_that_is_behind_costs_its_reader_at_most_a_clear_error(tmp_path, off):
    run(tmp_path, 1, 2, 3)
    with lease(LocalStore(tmp_path), StepDir(1)):
        off(7200)  # here, where retention runs
        retain(History(LocalStore(tmp_path)), Retention(Keep(last=1)))
        with pytest.raises(NotACheckpoint, match=r"no committed checkpoint of step 1; it has \[2, 3\]"):
            Checkpointer(tmp_path, wait=True).load(Sharded(0, 1), step=1)
    state = Sharded(0, 1)
    assert Checkpointer(tmp_path, wait=True).load(state).step == 3
    assert state.is_at(3)


def test_a_lease_by_a_clock_that_is_ahead_lasts_longer_and_ends(tmp_path, off):
    run(tmp_path, 1, 2, 3)
    off(7200)
    held = lease(LocalStore(tmp_path), StepDir(1))
    held.__enter__()  # its reader dies
    off(3 * 3600 - 60)
    assert leased(LocalStore(tmp_path)) == {StepDir(1)}
    off(3 * 3600 + 60)
    assert retain(History(LocalStore(tmp_path)), Retention(Keep(last=1))) == ([StepDir(1)], [])
