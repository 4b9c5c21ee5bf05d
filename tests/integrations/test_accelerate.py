"""Accelerate through distckpt: a run that was killed goes on as one that went through."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from tests import ranks
from tests.integrations.together import joined, sharded

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed

from distckpt import Checkpointer, Progress
from distckpt.errors import Mismatch, StateWarning
from distckpt.integrations.accelerate import train_state

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it

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


def train(root, stop, *, die=None, workers=0, shard=False, accumulate=1, loaders=KEPT):
    """Train to step `stop`, saving each; die: raise after that step. (step, samples, loss, mean) of each."""
    set_seed(3)
    torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(**loaders), gradient_accumulation_steps=accumulate
    )
    if shard:
        sharded(accelerator, "Linear")
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    options = {"shuffle": True, "num_workers": workers, "generator": torch.Generator()}
    data = DataLoader(torch.arange(22.0).unsqueeze(1), batch_size=2, **options)
    model, optimizer, schedule, data = accelerator.prepare(model, optimizer, schedule, data)
    assert isinstance(model, FSDPModule) == shard
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


@pytest.mark.parametrize(("die", "workers", "accumulate"), [(4, 0, 1), (11, 0, 1), (13, 2, 2)])
def test_a_resume_goes_on_with_the_same_samples_and_losses(tmp_path, die, workers, accumulate):
    options = {"workers": workers, "accumulate": accumulate}
    whole = train(tmp_path / "whole", 16, **options)
    train(tmp_path / "run", 16, die=die, **options)
    assert train(tmp_path / "run", 16, **options) == whole[die:]
    assert sorted(x for _, samples, *_ in whole[:11] for x in samples) == list(range(22))


def test_a_loader_that_does_not_tell_where_it_is_is_warned_of(tmp_path):
    with pytest.warns(StateWarning, match="use_stateful_dataloader=True"):
        train(tmp_path / "a", 1, loaders={})
    with pytest.warns(StateWarning, match="use_seedable_sampler=True"):
        train(tmp_path / "b", 1, loaders={"use_stateful_dataloader": True})


def _lives(folder, shard):
    joined()
    whole = train(folder / "whole", 9, shard=shard)
    train(folder / "run", 9, die=4, shard=shard)
    return whole[4:], train(folder / "run", 9, shard=shard)


@pytest.mark.parametrize("shard", [True, pytest.param(False, marks=pytest.mark.full)])
def test_a_resume_on_two_ranks_goes_on_with_the_same_samples_and_losses(tmp_path, shard):
    lives = ranks.run(2, _lives, tmp_path, shard, preload=("tests.integrations.loaded",))
    for whole, resumed in lives:
        assert resumed == whole
    assert lives[0][0][0][1] != lives[1][0][0][1]  # each its own samples
    with pytest.raises(Mismatch, match=r"2 ranks.*per_rank={'dataloader': 'first'}"):
        train(tmp_path / "run", 9)
