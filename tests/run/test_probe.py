"""A number on a fixed batch: recorded at saves, asked again after loads, and told where it has become another."""

from __future__ import annotations

import random
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer, Keep, Probe, TrainState
from distckpt.comm import SoloComm, current
from distckpt.errors import StateWarning
from distckpt.run.events import read
from distckpt.run.probe import Probing
from tests import ranks

BATCH = torch.linspace(-1, 1, 24).view(6, 4)


class Training:
    """Dropout, batch statistics and an optimizer; under FSDP2 where there are several ranks."""

    def __init__(self, seed=0):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 4))
        if current().world_size > 1:
            mesh = init_device_mesh("cpu", (current().world_size,))
            for layer in (self.model[0], self.model[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.state = TrainState(model=self.model, optimizer=self.optimizer)

    def loss(self):
        return (self.model(BATCH) - BATCH).square().mean()

    def train(self, steps):
        for _ in range(steps):
            self.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def all_of(training):
    """Weights, buffers, modes and gradients; and the losses of further steps, which draw from the generators."""
    held = training.model.state_dict().values()
    whole = [(v.full_tensor() if hasattr(v, "full_tensor") else v).tolist() for v in held]
    modes = [module.training for module in training.model.modules()]
    bare = all(p.grad is None for p in training.model.parameters())
    drawn = random.random(), float(np.random.rand()), torch.rand(1).item()
    return whole, modes, bare, drawn


def saved(root, *, probe=True, train=2, fn=None, **options):
    """Save steps 1 and 2; what became of the training after it."""
    training = Training()
    asked = (fn or (lambda: training.loss())) if probe else None
    with Checkpointer(root, probe=asked, wait=True, timeout=30, **options) as checkpointer:
        for step in (1, 2):
            training.train(1)
            checkpointer.save(step, training.state)
    return all_of(training.train(train))


def resumed(root, ask=None, **options):
    """Resume with a probe; its report, and what was warned of. ask: the probe, given the training."""
    training = Training(seed=1)
    fn = (lambda: ask(training)) if ask else training.loss
    with (
        warnings.catch_warnings(record=True) as told,
        Checkpointer(root, probe=Probe(fn=fn, **options), timeout=30) as c,
    ):
        warnings.simplefilter("always")
        report = c.resume(training.state)
    return report, [str(w.message) for w in told if w.category is StateWarning], all_of(training.train(2))


def test_what_the_probe_says_is_recorded_and_asking_disturbs_nothing(tmp_path):
    with_probe, without = saved(tmp_path / "a"), saved(tmp_path / "b", probe=False)
    assert with_probe == without
    report, told, after = resumed(tmp_path / "a")
    assert after == without
    assert told == []
    assert report.notes[-1] == f"probe: {report.metrics['probe']:.9g}, recorded was {report.metrics['probe']:.9g}"


def test_another_number_after_a_resume_is_told_with_what_usually_causes_it(tmp_path):
    saved(tmp_path)
    report, (told,), _ = resumed(tmp_path, lambda training: training.loss() * 1.5)
    assert "when step 2 was saved it said" in told
    assert "off by 0.5 of it; allowed is nothing, on 1 rank(s)" in told
    for cause in ("tokenizer", "precision", "dropout", "learning rate", "position in the data"):
        assert cause in told
    assert told.startswith(report.notes[-1])
    (event,) = [e for e, _ in read(tmp_path) if e["event"] == "probe"]
    assert event["now"] == pytest.approx(1.5 * event["was"])


def test_what_is_allowed_can_be_said(tmp_path):
    saved(tmp_path)
    nearly = lambda training: training.loss() * (1 + 1e-5)
    assert len(resumed(tmp_path, nearly)[1]) == 1
    assert resumed(tmp_path, nearly, exact=False)[1] == []
    assert len(resumed(tmp_path, nearly, exact=False, rel=1e-6)[1]) == 1


def test_a_probe_that_fails_costs_neither_the_save_nor_the_load(tmp_path):
    with pytest.warns(StateWarning, match=r"not recorded with this save: .*no such batch"):
        saved(tmp_path / "a", fn=lambda: {}["no such batch"])
    saved(tmp_path / "b")
    report, (told,), _ = resumed(tmp_path / "b", lambda training: 1 / 0)
    assert report.step == 2
    assert "division by zero" in told


def test_only_saves_with_a_metric_are_asked_about_where_one_is_named(tmp_path):
    training, asked = Training(), []
    probe = Probe(fn=lambda: asked.append(1) or training.loss(), with_metric="val_loss")
    with Checkpointer(tmp_path, probe=probe, wait=True, keep=Keep(best=("val_loss", "min", 1))) as checkpointer:
        checkpointer.save(1, training.state)
        checkpointer.save(2, training.state, {"val_loss": 1.0})
        checkpointer.save(3, training.state)
        assert len(asked) == 1
        assert "probe" in checkpointer.load(training.state, step=2).metrics
        checkpointer.load(training.state, step=3)
        assert len(asked) == 2  # of step 2
        checkpointer.load(training.state, step=2, only=("optim",))
        assert len(asked) == 2


def test_the_best_can_be_told_by_the_probe(tmp_path):
    said = iter([3.0, 1.0, 2.0, 4.0])
    training = Training()
    with Checkpointer(tmp_path, probe=lambda: next(said), wait=True, keep=Keep(last=2, best=("probe", "min", 1))) as c:
        for step in (1, 2, 3, 4):
            c.save(step, training.state)
        assert c.steps() == [2, 3, 4]


def test_a_metric_of_its_name_is_refused(tmp_path):
    with Checkpointer(tmp_path, probe=lambda: 1.0) as c, pytest.raises(ValueError, match="'probe'"):
        c.save(1, Training().state, {"probe": 1.0})


def test_what_is_no_probe_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a function"):
        Checkpointer(tmp_path, probe=3)


def test_a_job_without_time_does_not_ask():
    state, probing = Training().state, Probing(SoloComm(), lambda: time.sleep(0.05) or 1.0)
    assert probing.recorded(state, {"loss": 2.0}) == {"loss": 2.0, "probe": 1.0}
    probing.hurry(60.0)
    assert probing.recorded(state, {}) == {"probe": 1.0}
    probing.hurry(0.06)
    assert probing.recorded(state, {}) == {}


def _ranks(root, action):
    if action == "save":
        saved(root + "-rank", fn=lambda: current().rank)
        return saved(root), saved(root + "-without", probe=False)
    return resumed(root)


def test_under_fsdp_every_rank_asks_and_what_they_say_is_averaged(tmp_path):
    root = str(tmp_path / "run")
    lives = ranks.run(2, _ranks, root, "save")
    for (with_probe, without), (report, told, after) in zip(lives, ranks.run(2, _ranks, root, "load"), strict=True):
        assert with_probe == without == after
        assert told == []
        assert report.notes[-1].startswith("probe: ")
    assert resumed(root + "-rank")[0].metrics["probe"] == 0.5
    report, told, _ = resumed(root)  # on one rank
    assert told == []
    assert report.notes[-1].startswith("probe: ")
