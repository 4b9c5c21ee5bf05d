"""The memory tier: a killed job's last staged state is read from its writer's memory, not from storage."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer, TrainState
from distckpt.errors import DistckptError
from distckpt.run.held import _found
from tests import ranks
from tests.run.test_async import until, writers


def state(value=-1.0):
    model = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(model.weight, value)
    return TrainState(model=model, rng=False), model


def killed(root, hold):
    """Save steps 1 and 2 in the background, and be killed."""
    c = Checkpointer(root, hold=hold, timeout=20)
    c.save(1, state(1.0)[0]).wait()
    c.save(2, state(2.0)[0])
    os.kill(os.getpid(), signal.SIGKILL)


def holders(root):
    return list(_found(Path(root)))


def spoil(root):
    """Have storage lose all data of all steps: whoever reads it finds damage."""
    for path in Path(root).glob("step-*/rank-*.safetensors"):
        size = path.stat().st_size
        data = path.read_bytes()
        path.write_bytes(data[:4096] + bytes(b ^ 1 for b in data[4096 : size - 4096]) + data[size - 4096 :])


def test_a_job_that_is_started_again_reads_what_is_held(tmp_path):
    ranks.run(1, killed, str(tmp_path), "2 min", may_die=(0,))
    until(lambda: len(holders(tmp_path)) == 1)
    assert sorted(p.name for p in tmp_path.glob("step-*/commit.json")) == ["commit.json"] * 2
    spoil(tmp_path)
    live, model = state()
    with Checkpointer(tmp_path, hold="2 min") as c:
        report = c.resume(live)
        assert report.step == 2
        assert (model.weight == 2.0).all()
        assert "1 data file(s) of this machine were held in memory" in report.notes
        until(lambda: not holders(tmp_path))
    with Checkpointer(tmp_path) as c, pytest.raises(DistckptError), pytest.warns(UserWarning, match="damage|fall"):
        c.load(state()[0])


def test_who_does_not_ask_for_it_holds_nothing_and_reads_storage(tmp_path):
    before = writers()
    ranks.run(1, killed, str(tmp_path), None, may_die=(0,))
    until(lambda: writers() == before)
    assert not holders(tmp_path)
    with Checkpointer(tmp_path, hold=60, wait=True) as c:
        c.resume(state()[0])
        c.save(3, state()[0], wait=False)
    assert not holders(tmp_path), "nothing is held for a job that has ended well"


def test_it_is_held_for_so_long(tmp_path):
    before = writers()
    ranks.run(1, killed, str(tmp_path), 1.0, may_die=(0,))
    until(lambda: len(holders(tmp_path)) == 1)
    started = time.monotonic()
    until(lambda: writers() == before)
    assert time.monotonic() - started < 10
    with pytest.raises(ValueError, match="hold='soon'"):
        Checkpointer(tmp_path, hold="soon")


def _sharded(value):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    fully_shard(model)
    return model


def _group_is_killed(root):
    c = Checkpointer(root, hold="2 min", timeout=20)
    c.save(1, TrainState(model=_sharded(1.0), rng=False)).wait()
    os.kill(os.getpid(), signal.SIGKILL)


def _group_goes_on(root):
    model = _sharded(-1.0)
    with Checkpointer(root, hold="2 min", timeout=20) as c:
        report = c.resume(TrainState(model=model, rng=False))
    return report.step, report.notes, all(bool((p.to_local() == 1.0).all()) for p in model.parameters())


def test_every_rank_of_a_machine_reads_from_memory_at_another_number_too(tmp_path):
    ranks.run(2, _group_is_killed, str(tmp_path), may_die=(0, 1))
    until(lambda: len(holders(tmp_path)) == 2)
    spoil(tmp_path)
    for step, notes, whole in ranks.run(3, _group_goes_on, str(tmp_path)):
        assert (step, whole) == (1, True)
        assert "2 data file(s) of this machine were held in memory" in notes
    until(lambda: not holders(tmp_path))
