"""`distckpt selftest`: a cold restart of one's own training, and what it says where that is not exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distckpt.cli import main

TRAINING = """
import random

import torch
from torch import nn

from distckpt import ElasticSampler, Progress, TrainState

data = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def whole():
    model, optimizer = parts()
    sampler = ElasticSampler(data, global_batch=4)

    def step():
        optimizer.zero_grad()
        loss = model(data[list(iter(sampler))[:4]]).square().mean()
        loss.backward()
        optimizer.step()
        sampler.advance()
        return loss

    return TrainState(model=model, optimizer=optimizer, sampler=sampler), step


def no_optimizer():
    state, step = whole()
    model = state._parts["model"].module
    return TrainState(model=model, sampler=state._parts["sampler_state"]._value), step


def own_generator():
    model, optimizer = parts()
    drawn = torch.Generator().manual_seed(3)

    def step():
        optimizer.zero_grad()
        loss = model(torch.randn(4, 8, generator=drawn)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return TrainState(model=model, optimizer=optimizer), step


def never_twice():
    state, step = own_generator()
    chance = random.SystemRandom()
    return state, lambda: step() + chance.random()


class Forgetful:
    def __init__(self):
        self.count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = 0


def forgetful():
    state, step = whole()
    counter = Forgetful()
    model, optimizer = parts()

    def counted():
        counter.count += 1
        return step()

    parts_ = state._parts
    again = TrainState(
        model=parts_["model"].module,
        optimizer=parts_["optim"]._optimizer,
        sampler=parts_["sampler_state"]._value,
        counter=counter,
    )
    return again, counted


def broken():
    raise RuntimeError("no such data set")


def sharded():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        loss = model(data[:4]).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return TrainState(model=model, optimizer=optimizer), step
"""


@pytest.fixture
def training(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TRAINING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def outcome(capsys, name, *options, code):
    assert main(["selftest", f"mine:{name}", "--steps", "2", *options, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.full
def test_a_whole_state_goes_on_bit_for_bit(training, capsys):
    found = outcome(capsys, "whole", code=0)
    assert found["equal"]
    assert found["deterministic"]
    assert found["loss"][0] == found["loss"][1]


@pytest.mark.full
def test_what_the_state_lacks_is_told_from_what_is_not_deterministic(training, capsys):
    found = outcome(capsys, "no_optimizer", code=1)
    assert found["cause"] == "missing"
    assert found["after_load"] == []
    assert any(name.startswith("model.") for name in found["after_step"])
    assert main(["selftest", "mine:never_twice", "--steps", "1"]) == 1
    assert "not deterministic" in capsys.readouterr().out


@pytest.mark.full
def test_a_generator_of_ones_own_is_missed(training, capsys):
    assert main(["selftest", "mine:own_generator", "--steps", "1"]) == 1
    assert "a random generator of your own" in capsys.readouterr().out


@pytest.mark.full
def test_what_does_not_come_back_as_it_was_is_named(training, capsys):
    found = outcome(capsys, "forgetful", code=1)
    assert (found["cause"], found["after_load"]) == ("held", ["counter"])


def test_a_training_that_fails_says_why_in_one_line(training, capsys):
    assert main(["selftest", "mine:broken"]) == 1
    assert "no such data set" in capsys.readouterr().err
    assert main(["selftest", "mine"]) == 2


@pytest.mark.full
def test_ranks_are_started_by_torchrun(training, capsys):
    assert outcome(capsys, "sharded", "--ranks", "2", code=0)["equal"]


@pytest.mark.full
def test_a_run_that_hangs_is_ended_with_all_its_ranks(training, capsys):
    Path("hangs.py").write_text(
        "import os, pathlib, time\n\n\ndef make():\n"
        "    pathlib.Path(f'{os.getpid()}.pid').touch()\n    time.sleep(90)\n"
    )
    assert main(["selftest", "hangs:make", "--ranks", "2", "--timeout", "20"]) == 1
    assert "has not ended in 20 s" in capsys.readouterr().err
    begun = [int(path.stem) for path in Path().glob("*.pid")]
    assert len(begun) == 2
    assert not [pid for pid in begun if Path(f"/proc/{pid}").exists()]
