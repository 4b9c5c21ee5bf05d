"""The Trainer of transformers through distckpt, against the same Trainer that was never stopped."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.cli import main
from distckpt.errors import Mismatch, StateWarning
from distckpt.run.preemption import REQUEUE
from tests import ranks

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

LOADED = ("tests.integrations.trainers",)


@pytest.fixture(scope="module")
def hf():
    from tests.integrations import trainers

    return trainers


@pytest.fixture(scope="module")
def whole(hf, tmp_path_factory):
    trainer = hf.trained(tmp_path_factory.mktemp("whole"), "run")
    assert len(hf.log(trainer)) == hf.STEPS
    return hf.log(trainer), trainer.model.state_dict()


@pytest.mark.parametrize("killed_after", [3, 5, pytest.param(7, marks=pytest.mark.full)])
def test_a_resume_gives_the_losses_of_a_run_that_went_through(hf, tmp_path, whole, killed_after):
    hf.trained(tmp_path, "run", hf.Killed(killed_after), run={"every": 1})
    resumed = hf.trained(tmp_path, "run")
    assert hf.log(resumed) == whole[0]
    assert all(torch.equal(v, whole[1][k]) for k, v in resumed.model.state_dict().items())


@pytest.mark.full
def test_a_run_that_is_done_is_not_trained_further(hf, tmp_path, whole):
    hf.trained(tmp_path, "run")
    again = hf.trained(tmp_path, "run")
    assert hf.log(again) == whole[0]
    assert all(torch.equal(v, whole[1][k]) for k, v in again.model.state_dict().items())


def test_a_signal_ends_training_with_a_checkpoint(hf, tmp_path, whole):
    told = hf.trained(tmp_path, "run", hf.Told(), run={"preemption": True}, eval_strategy="epoch")
    assert told.stop.exit_code == REQUEUE
    assert told.state.global_step == 4
    assert not [line for line in told.state.log_history if "eval_loss" in line]
    assert hf.log(hf.trained(tmp_path, "run")) == whole[0]


def test_what_the_arguments_say_is_saved_and_the_best_is_loaded_at_the_end(hf, tmp_path):
    keep = Keep(last=2, best=("eval_loss", "min", 1))
    saves = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    trainer = hf.trained(tmp_path, "run", run={"keep": keep}, load_best_model_at_end=True, **saves)
    best = trainer.state.best_global_step
    with Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.steps() == sorted({best, 8, 9})
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_step_is_saved_once_and_again_where_an_evaluation_came_to_it(hf, tmp_path):
    options = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    hf.trained(tmp_path, "run", run={"every": 1, "wait": True}, max_steps=6, **options)
    saved = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert saved == [
        *(f"step-0000000{n}" for n in (1, 2, 3, 4, 5)),
        "step-00000005.2",
        "step-00000006",
        "step-00000006.2",
    ]
    with Checkpointer(tmp_path / "run") as checkpointer:
        found = checkpointer.load(TrainState(model=hf.small()), step=5, only=("model",)).metrics
    assert {"loss", "eval_loss"} <= found.keys()


@pytest.mark.full
def test_a_best_that_is_no_longer_there_is_told(hf, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 5.0}
    with pytest.warns(StateWarning, match=r"stay those of the last step, not of step \d: .*Keep\(best=\('loss'"):
        hf.trained(tmp_path, "run", run={"keep": Keep(last=2), "wait": True}, load_best_model_at_end=True, **saves)


def test_another_global_batch_is_refused(hf, tmp_path):
    hf.trained(tmp_path, "run", hf.Killed(3), run={"every": 1})
    with pytest.raises(Mismatch, match=r"4 samples a step over all ranks, here are 8.*ignore_data_skip"):
        hf.trained(tmp_path, "run", gradient_accumulation_steps=4)


@pytest.mark.full
def test_save_total_limit_is_not_obeyed_in_silence(hf, tmp_path):
    with pytest.warns(StateWarning, match="Keep"):
        hf.trained(tmp_path, "run", save_total_limit=2)


@pytest.mark.full
def test_a_checkpoint_of_the_trainers_own_is_gone_on_from(hf, tmp_path, whole):
    from transformers import Trainer

    args = hf.arguments(tmp_path, save_strategy="steps", save_steps=3)
    trainer = Trainer(hf.small(), args, train_dataset=hf.samples(20))
    trainer.train()
    hf.trained(tmp_path, "run", hf.Killed(5), run={"every": 1}, resume=str(tmp_path / "out" / "checkpoint-3"))
    assert hf.log(hf.trained(tmp_path, "run")) == whole[0]


@pytest.mark.full
def test_the_weights_are_exported_as_from_pretrained_has_them(hf, tmp_path, whole):
    trainer = hf.trained(tmp_path, "run")
    trainer.model.config.save_pretrained(tmp_path / "config")
    where = (str(tmp_path / name) for name in ("run", "model", "config"))
    assert main(["export", next(where), "-o", next(where), "--config", next(where)]) == 0
    loaded = hf.GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    assert all(torch.equal(v, whole[1][k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("fsdp2", "FSDPGPT2LMHeadModel"),
        ("ddp", "DistributedDataParallel"),
        ("zero2", "DeepSpeedEngine"),
        ("zero3", "DeepSpeedEngine"),
    ],
)
@pytest.mark.full
def test_a_resume_on_as_many_ranks_gives_the_same_losses(hf, tmp_path, layout, kind):
    preload = (*LOADED, "tests.deepspeed_loaded") if layout.startswith("zero") else LOADED
    for whole, resumed, model in ranks.run(2, hf.lives, tmp_path, layout, 0.1, preload=preload, timeout=100):
        assert len(whole) == hf.STEPS
        assert resumed == whole
        assert model == kind


@pytest.mark.full
def test_a_run_of_two_ranks_goes_on_on_one(hf, tmp_path):
    ranks.run(2, hf.lives, tmp_path, "fsdp2", 0.0, preload=LOADED, timeout=100)
    one, two = (hf.log(hf.trained(tmp_path, root, dropout=0.0)) for root in ("alone", "run"))
    assert [line[:2] for line in two] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss, *_ in one]
