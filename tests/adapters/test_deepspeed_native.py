"""Tags that DeepSpeed itself has saved, loaded by an unchanged script once install() was called."""

from __future__ import annotations

import argparse
import inspect
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distckpt import TrainState
from distckpt.errors import Mismatch
from tests import deepspeeds, ranks
from tests.adapters.engines import assert_equal, held
from tests.adapters.scripts import rates, script, train, weights
from tests.foreign.tags import CASES

CLIENT = {"epoch": 1, "order": [3, 1], "scheduler": {"x": 1}, "rng": (1, {2: "two"}), "a.b": None}


def _save(root, name):
    engine = CASES[name].engine()
    train(engine, 0, 3)
    engine.save_checkpoint(root, client_state=CLIENT | {"mean": torch.arange(3.0)})
    return train(engine, 3, 5)


def _resume(root, name, installed):
    from distckpt.adapters import deepspeed

    engine = CASES[name].engine(seed=5)
    if installed:
        deepspeed.install(timeout=20)
    _, client = engine.load_checkpoint(root)
    counted = engine.global_steps, engine.global_samples, engine.skipped_steps, engine.lr_scheduler.last_epoch
    mean = client["mean"].tolist()
    state = held(TrainState(model=engine, rng=False))
    return state, counted, mean, {k: client[k] for k in CLIENT}, rates(engine), train(engine, 3, 5)


FULL = [n for n in CASES if n != "zero3-adagrad"]  # which DeepSpeed itself cannot load
COVER = ("zero1-fp16", "zero2-round-robin-aligned", "zero3-sub-groups")


@pytest.mark.parametrize("name", [n if n in COVER else pytest.param(n, marks=pytest.mark.full) for n in FULL])
def test_its_state_is_what_deepspeed_itself_loads_bit_for_bit(tmp_path, name):
    size = CASES[name].size
    losses = deepspeeds.run(size, _save, str(tmp_path), name)[0]
    ours, theirs = (deepspeeds.run(size, _resume, str(tmp_path), name, i) for i in (True, False))
    for mine, other in zip(ours, theirs, strict=True):
        assert_equal(mine[0], other[0])
        assert mine[1:] == other[1:]
    assert ours[0][2:4] == ([0.0, 1.0, 2.0], CLIENT)
    assert ours[0][-1] == losses


def _elsewhere(root, case):
    from distckpt.adapters import deepspeed

    deepspeed.install(timeout=20)
    engine = case.engine(seed=5)
    path, client = engine.load_checkpoint(root)
    assert (path, client["epoch"], client["mean"].tolist()) == (f"{root}/global_step3", 1, [0.0, 1.0, 2.0])
    wanted, found = weights(engine), (engine.global_steps, rates(engine), train(engine, 3, 5))
    alone = case.engine(seed=5)
    assert alone.load_checkpoint(root, load_module_only=True)[1]["epoch"] == 1
    assert (alone.global_steps, len(alone.optimizer.optimizer.state)) == (0, 0)
    assert all(torch.equal(value, wanted[n]) for n, value in weights(alone).items())
    return found


ELSEWHERE = [("zero2-round-robin", 2, 2), ("zero3", 1, 3), ("zero1", 3, 4)]


@pytest.mark.parametrize(("name", "stage", "on"), ELSEWHERE)
def test_it_goes_on_at_another_number_of_ranks_and_another_stage(tmp_path, name, stage, on):
    case = CASES[name]
    losses = deepspeeds.run(case.size, _save, str(tmp_path), name)[0]
    steps, _, found = deepspeeds.run(on, _elsewhere, str(tmp_path), replace(case, size=on, stage=stage, zero={}))[0]
    assert steps == 3
    assert found == pytest.approx(losses, rel=1e-6)


def _saved_again(root):
    from distckpt.adapters import deepspeed

    deepspeed.install(timeout=20)
    engine = CASES["zero1"].engine(seed=4)
    native = engine.load_checkpoint.__wrapped__
    assert engine.load_checkpoint(f"{root}/nowhere") == native(engine, f"{root}/nowhere") == (None, None)
    assert "exclude_frozen_parameters" in inspect.signature(engine.save_checkpoint).parameters
    path, client = engine.load_checkpoint(root, custom_load_fn=lambda src, dst: None)
    assert path.endswith("mp_rank_00_model_states.pt"), "only DeepSpeed has a state dict for a custom_load_fn"
    assert (client["epoch"], engine.global_steps) == (1, 3)
    engine.load_checkpoint(root)
    train(engine, 3, 4)
    engine.save_checkpoint(root, tag="global_step3", client_state={"epoch": 7})
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        torch.save({}, Path(root, "global_step3", "ema.pt"))  # a script's own, beside the checkpoint
    torch.distributed.barrier()
    assert engine.load_checkpoint(root)[1] == {"epoch": 7}


def test_it_counts_until_it_is_saved_again_whatever_else_lies_beside(tmp_path):
    deepspeeds.run(2, _save, str(tmp_path), "zero1")
    for file in tmp_path.rglob("*.pt"):
        os.utime(file, (1e9, 1e9))
    deepspeeds.run(2, _saved_again, str(tmp_path))


def _save_namespace(root):
    script(1, installed=False).save_checkpoint(root, client_state={"args": argparse.Namespace(lr=1)})


def _load_namespace(root):
    return ranks.expect_error(lambda: script(1).load_checkpoint(root), Mismatch)


def test_a_client_state_that_only_a_pickle_can_hold_is_refused_by_name(tmp_path):
    deepspeeds.run(2, _save_namespace, str(tmp_path))
    assert all("argparse.Namespace" in text for text in deepspeeds.run(2, _load_namespace, str(tmp_path)))
