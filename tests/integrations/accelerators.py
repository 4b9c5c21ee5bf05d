"""Training with Accelerate, for tests. Heavy: imported by the tests that use it, and by the server of their ranks."""

from __future__ import annotations

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from distckpt import Checkpointer, Progress
from distckpt.integrations.accelerate import train_state
from tests.integrations.joined import joined, sharded

KEPT = {"use_stateful_dataloader": True, "use_seedable_sampler": True}


class Average:
    """An object of the user's own: a running mean of the loss."""

    def __init__(self):
        self.value = torch.zeros(())

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def seen(batch):
    return batch.flatten().tolist()


def made(layout, loaders, accumulate):
    """An Accelerator: "ddp" (of one rank, none), "fsdp2" or "zero2"."""
    options = {"dataloader_config": DataLoaderConfiguration(**loaders), "gradient_accumulation_steps": accumulate}
    AcceleratorState._reset_state()  # as in a process that has just begun
    if layout == "zero2":
        PartialState(cpu=True)  # else it counts one process, for want of a GPU
        zero = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
        zero |= {"zero_force_ds_cpu_optimizer": False, "train_micro_batch_size_per_gpu": 2}
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero), **options)
    accelerator = Accelerator(cpu=True, **options)
    if layout == "fsdp2":
        sharded(accelerator, "Linear")
    return accelerator


def train(root, stop, *, die=None, workers=0, layout="ddp", accumulate=1, loaders=KEPT):
    """Train to step `stop`, saving each; die: stop after that step, as a crash would. (step, samples, loss, mean) of each."""
    set_seed(3)
    accelerator = made(layout, loaders, accumulate)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    options = {"shuffle": True, "num_workers": workers, "generator": torch.Generator()}
    data = DataLoader(torch.arange(22.0).unsqueeze(1), batch_size=2, **options)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)
    assert isinstance(model, FSDPModule) == (layout == "fsdp2")
    average, progress, found = Average(), Progress(), []
    accelerator.register_for_checkpointing(average)
    with Checkpointer(root, timeout=30, wait=True) as checkpointer:
        state = train_state(accelerator, progress=progress)
        checkpointer.resume(state)
        while progress.global_step < stop:
            for batch in data:
                with accelerator.accumulate(model):
                    loss = model(batch / 22).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                average.value = 0.9 * average.value + 0.1 * loss.detach()
                progress.advance(len(batch))
                found.append((progress.global_step, seen(batch), loss.item(), average.value.item()))
                if accelerator.sync_gradients:
                    checkpointer.save(progress.global_step, state)
                if progress.global_step in {stop, die}:
                    return found
    raise AssertionError


def lives(folder, layout):
    joined()
    if layout == "zero2":
        from tests import deepspeeds

        deepspeeds.joined()
    whole = train(folder / "whole", 9, layout=layout)
    train(folder / "run", 9, die=4, layout=layout)
    return whole[4:], train(folder / "run", 9, layout=layout)
