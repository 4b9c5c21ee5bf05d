"""What training code sees of a Checkpointer: when it saves, what it records, what it shows people."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.errors import RunConflict, StateWarning, Unsupported
from distckpt.store.local import LocalStore


def state():
    return TrainState(model=nn.Linear(2, 2))


def test_step_saves_every_so_many_steps(tmp_path):
    with Checkpointer(tmp_path, every=3, wait=True) as c:
        saved = [c.step(step, state()).saved for step in range(1, 8)]
        assert [r.step for r in saved if r] == [3, 6]
        assert c.steps() == [3, 6]


def test_metrics_of_any_numeric_kind_are_recorded(tmp_path):
    metrics = {"a": np.float64(1.5), "b": torch.tensor(2), "c": math.inf, "d": 3, "e": np.int64(4)}
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(np.int64(1), state(), metrics)
        with pytest.raises(Unsupported, match="metric 'x' is a list"):
            c.save(2, state(), {"x": [1]})
    (entry,) = json.loads((tmp_path / "meta.json").read_text())["checkpoints"]
    assert entry["metrics"] == {"a": 1.5, "b": 2, "c": "inf", "d": 3, "e": 4}


def test_last_points_at_the_newest_commit_and_the_registry_lists_all(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
        c.save(2, state())
    assert json.loads((tmp_path / "last.json").read_text()) == {"checkpoint": "step-00000002", "step": 2}
    assert os.readlink(tmp_path / "last") == "step-00000002"
    registry = json.loads((tmp_path / "meta.json").read_text())["checkpoints"]
    assert [(e["path"], e["status"]) for e in registry] == [
        ("step-00000002", "committed"),
        ("step-00000001", "committed"),
    ]


def test_a_pointer_that_cannot_be_written_is_a_warning_and_the_checkpoint_stands(tmp_path, monkeypatch):
    from distckpt.errors import StoreError

    def refuse(self, name, target):
        raise StoreError("no links here")

    monkeypatch.setattr(LocalStore, "link_hint", refuse)
    with Checkpointer(tmp_path, wait=True) as c:
        with pytest.warns(StateWarning, match="step-00000001 is committed, but .* no links here"):
            c.save(1, state())
        assert c.steps() == [1]


def test_pointers_are_hints_that_a_resume_does_not_need_or_believe(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
        c.save(2, state())
    (tmp_path / "last.json").write_text('{"checkpoint": "step-00000001", "step": 1}')
    (tmp_path / "meta.json").unlink()
    (tmp_path / "last").unlink()
    with Checkpointer(tmp_path, wait=True) as c:
        assert c.resume(state()).step == 2


def test_the_same_step_saved_twice_is_a_further_generation(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        assert c.save(1, state()).directory == "step-00000001"
        model = nn.Linear(2, 2)
        assert c.save(1, TrainState(model=model)).directory == "step-00000001.2"
        assert c.steps() == [1]
        again = nn.Linear(2, 2)
        c.load(TrainState(model=again))
    assert torch.equal(again.weight, model.weight)


def test_names_of_any_characters_are_saved(tmp_path):
    names = ["plain", "with/slash", "ünïcode", "__dunder", "w[0:1]", "back\\slash\\", "a b"]
    model = nn.ParameterDict({n: nn.Parameter(torch.full((3,), float(i))) for i, n in enumerate(names)})
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model))
        again = nn.ParameterDict({n: nn.Parameter(torch.zeros(3)) for n in names})
        c.load(TrainState(model=again))
    assert [float(again[n][0].detach()) for n in names] == list(range(len(names)))


def test_a_root_is_a_path_or_a_store(tmp_path):
    with Checkpointer(str(tmp_path / "a b"), wait=True) as c:
        c.save(1, state())
    with Checkpointer(LocalStore(tmp_path / "a b"), wait=True) as c:
        assert c.steps() == [1]


def test_the_directory_of_one_checkpoint_is_no_run(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
    before = sorted((tmp_path / "step-00000001").iterdir())
    for path in (tmp_path / "step-00000001", tmp_path / "last"):
        for act in (lambda c: c.resume(state()), lambda c: c.save(2, state())):
            with Checkpointer(path, wait=True) as c, pytest.raises(RunConflict, match="give its parent"):
                act(c)
        with Checkpointer(tmp_path / "other", wait=True) as c:
            assert c.load(state(), source=path).step == 1
    assert sorted((tmp_path / "step-00000001").iterdir()) == before


def test_a_launcher_whose_ranks_never_met_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(StateWarning, match="WORLD_SIZE=4, but torch.distributed is not initialised"):
        Checkpointer(tmp_path, wait=True).close()


def test_options_and_calls_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ValueError, match="arena_bytes=-1"):
        Checkpointer(tmp_path, arena_bytes=-1)
    with pytest.raises(ValueError, match="when_busy='never': 'wait' or 'skip'"):
        Checkpointer(tmp_path, when_busy="never")
    c = Checkpointer(tmp_path, wait=True)
    c.close()
    for call in (lambda: c.save(1, state()), lambda: c.resume(state()), lambda: c.load(state())):
        with pytest.raises(ValueError, match="was closed"):
            call()
