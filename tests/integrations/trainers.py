"""Trainers of transformers, for tests. Heavy: imported by the tests that use it, and by the server of their ranks."""

from __future__ import annotations

import contextlib
import os
import signal

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments, set_seed

from distckpt import Checkpointer
from distckpt.integrations.transformers import CheckpointedTrainer
from tests.integrations.joined import joined, sharded

STEPS = 9


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


def trained(folder, root, *callbacks, run=None, dropout=0.1, shard=False, resume=None, **more):
    """Trainer that has trained in a run: 5 steps an epoch."""
    args = arguments(folder, **more)
    data, model = {"train_dataset": samples(20), "eval_dataset": samples(4)}, small(dropout)
    with Checkpointer(folder / root, timeout=30, **(run or {})) as checkpointer:
        trainer = CheckpointedTrainer(model, args, callbacks=[*callbacks], checkpointer=checkpointer, **data)
        if shard:
            sharded(trainer.accelerator, "GPT2Block")
            trainer.is_fsdp_enabled = True
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train(resume)
    return trainer


def log(trainer):
    """Step, loss, gradient norm and learning rate of each line."""
    names = ("step", "loss", "grad_norm", "learning_rate")
    return [tuple(line[name] for name in names) for line in trainer.state.log_history if "loss" in line]


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


def lives(folder, layout, dropout):
    """Log of a run that went through, and of one that was killed and resumed, on ranks."""
    joined()
    options = {"gradient_accumulation_steps": 1, "dropout": dropout} | LAYOUTS[layout]
    if "deepspeed" in options:
        from tests import deepspeeds

        deepspeeds.joined()
    whole = trained(folder, "whole", **options)
    trained(folder, "run", Killed(7), run={"every": 1}, **options)
    resumed = trained(folder, "run", **options)
    assert resumed.resumed.step == 7
    assert resumed.state.epoch == STEPS / 5  # 20 samples: 2 at a time on each of 2 ranks
    return log(whole), log(resumed), type(whole.model_wrapped).__name__
