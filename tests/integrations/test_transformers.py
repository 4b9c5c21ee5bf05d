"""The Trainer of transformers through distckpt, against the same Trainer that was never stopped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal

import pytest
import torch

from tests import ranks
from tests.integrations.together import joined, sharded

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, set_seed

from distckpt import Checkpointer, Keep
from distckpt.errors import Mismatch, StateWarning
from distckpt.integrations.transformers import CheckpointedTrainer
from distckpt.run.preemption import REQUEUE

STEPS = 9
LOADED = ("tests.integrations.loaded",)


class Killed(TrainerCallback):
    """Ends training before a step, as a crash would: nobody is told."""

    def __init__(self, after):
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= self.after:
            raise KeyboardInterrupt


class Told(TrainerCallback):
    """Is told to stop, by the signal that a scheduler sends."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def small(dropout=0.1):
    set_seed(1)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, loss_type="ForCausalLM", **rates)
    )


def samples(count):
    x = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in x]


def arguments(folder, **more):
    options = {"use_cpu": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS}
    options |= {"learning_rate": 1e-2, "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no", "seed": 3}
    return TrainingArguments(
        str(folder / "out"), disable_tqdm=True, report_to="none", log_level="error", **(options | more)
    )


def trained(folder, root, *callbacks, run=None, dropout=0.1, shard=False, **more):
    """Trainer that has trained in a run: 5 steps an epoch."""
    args = arguments(folder, **more)
    data, model = {"train_dataset": samples(20), "eval_dataset": samples(4)}, small(dropout)
    with Checkpointer(folder / root, timeout=30, **(run or {})) as checkpointer:
        trainer = CheckpointedTrainer(model, args, callbacks=[*callbacks], checkpointer=checkpointer, **data)
        if shard:
            sharded(trainer.accelerator, "GPT2Block")
            trainer.is_fsdp_enabled = True
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
    return trainer


def log(trainer):
    """Step, loss, gradient norm and learning rate of each line."""
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(line[name] for name in names) for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = trained(tmp_path_factory.mktemp("whole"), "run")
    assert len(log(trainer)) == STEPS
    return log(trainer), trainer.model.state_dict()


@pytest.mark.parametrize("killed_after", [3, 5, pytest.param(7, marks=pytest.mark.full)])
def test_a_resume_gives_the_losses_of_a_run_that_went_through(tmp_path, whole, killed_after):
    trained(tmp_path, "run", Killed(killed_after), run={"every": 1})
    resumed = trained(tmp_path, "run")
    assert log(resumed) == whole[0]
    assert all(torch.equal(v, whole[1][k]) for k, v in resumed.model.state_dict().items())


def test_a_run_that_is_done_is_not_trained_further(tmp_path, whole):
    trained(tmp_path, "run")
    again = trained(tmp_path, "run")
    assert log(again) == whole[0]
    assert all(torch.equal(v, whole[1][k]) for k, v in again.model.state_dict().items())


def test_a_signal_ends_training_with_a_checkpoint(tmp_path, whole):
    told = trained(tmp_path, "run", Told(), run={"preemption": True}, eval_strategy="epoch")
    assert told.stop.exit_code == REQUEUE
    assert told.state.global_step == 4
    assert not [line for line in told.state.log_history if "eval_loss" in line]
    assert log(trained(tmp_path, "run")) == whole[0]


def test_what_the_arguments_say_is_saved_and_the_best_is_loaded_at_the_end(tmp_path):
    keep = Keep(last=2, best=("eval_loss", "min", 1))
    saves = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.5}
    trainer = trained(tmp_path, "run", run={"keep": keep}, load_best_model_at_end=True, **saves)
    best = trainer.state.best_global_step
    with Checkpointer(tmp_path / "run") as checkpointer:
        assert checkpointer.steps() == sorted({best, 8, 9})
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_another_global_batch_is_refused(tmp_path):
    trained(tmp_path, "run", Killed(3), run={"every": 1})
    with pytest.raises(Mismatch, match=r"4 samples a step over all ranks, here are 8.*ignore_data_skip"):
        trained(tmp_path, "run", gradient_accumulation_steps=4)


def test_save_total_limit_is_not_obeyed_in_silence(tmp_path):
    with pytest.warns(StateWarning, match="Keep"):
        trained(tmp_path, "run", save_total_limit=2)


def _kinds(stage):
    zero = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    auto = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    )
    return auto | zero


LAYOUTS = {
    "ddp": {"ddp_find_unused_parameters": False},
    "fsdp2": {"shard": True},
    "zero2": {"deepspeed": _kinds(2)},
    "zero3": {"deepspeed": _kinds(3)},
}


def _lives(folder, layout, dropout):
    """Log of a run that went through, and of one that was killed and resumed, on ranks."""
    joined()
    options = {"gradient_accumulation_steps": 1, "dropout": dropout} | LAYOUTS[layout]
    if "deepspeed" in options:
        from tests import deepspeeds

        deepspeeds.joined()
    whole = trained(folder, "whole", **options)
    trained(folder, "run", Killed(7), run={"every": 1}, **options)
    return log(whole), log(trained(folder, "run", **options)), type(whole.model_wrapped).__name__


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("fsdp2", "FSDPGPT2LMHeadModel"),
        pytest.param("ddp", "DistributedDataParallel", marks=pytest.mark.full),
        pytest.param("zero2", "DeepSpeedEngine", marks=pytest.mark.full),
        pytest.param("zero3", "DeepSpeedEngine", marks=pytest.mark.full),
    ],
)
def test_a_resume_on_as_many_ranks_gives_the_same_losses(tmp_path, layout, kind):
    preload = (*LOADED, "tests.deepspeed_loaded") if layout.startswith("zero") else LOADED
    for whole, resumed, model in ranks.run(2, _lives, tmp_path, layout, 0.1, preload=preload, timeout=100):
        assert len(whole) == STEPS
        assert resumed == whole
        assert model == kind


@pytest.mark.full
def test_a_run_of_two_ranks_goes_on_on_one(tmp_path):
    ranks.run(2, _lives, tmp_path, "fsdp2", 0.0, preload=LOADED, timeout=100)
    one, two = (log(trained(tmp_path, root, dropout=0.0)) for root in ("alone", "run"))
    assert [line[:2] for line in two] == [(step, pytest.approx(loss, rel=1e-5)) for step, loss, *_ in one]
