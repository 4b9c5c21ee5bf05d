"""The `states` of torchtitan's checkpoints: objects shaped as its own, given to distckpt.save and load as they are.

torchtitan itself is not installed here; the classes are written after its components/checkpoint.py, optimizer.py,
lr_scheduler.py, dataloader.py and train.py.
"""

from __future__ import annotations

import functools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt.comm import current
from distckpt.errors import Mismatch
from tests import ranks

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class ModelWrapper:
    """The parts of a model (stages of a pipeline that this rank holds) as one state dict."""

    def __init__(self, parts):
        self.model = parts
        self.cache_state_dict = self._get_state_dict()

    def _get_state_dict(self):
        return {k: v for sd in map(get_model_state_dict, self.model) for k, v in sd.items()}

    def state_dict(self):
        return self.cache_state_dict

    def load_state_dict(self, state_dict):
        options = StateDictOptions(strict=False)
        list(map(functools.partial(set_model_state_dict, model_state_dict=state_dict, options=options), self.model))
        self.cache_state_dict = self._get_state_dict()


class OptimizersContainer(torch.optim.Optimizer):
    """An optimizer for each part, their state dicts flattened into one."""

    def __init__(self, parts):
        self.model_parts = parts
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        func = functools.partial(get_optimizer_state_dict, options=FLAT)
        return {k: v for sd in map(func, self.model_parts, self.optimizers) for k, v in sd.items()}

    def load_state_dict(self, state_dict):
        func = functools.partial(set_optimizer_state_dict, optim_state_dict=state_dict, options=FLAT)
        list(map(func, self.model_parts, self.optimizers))


class LRSchedulersContainer:
    """A scheduler for each optimizer, all alike: the first one's state is all there is."""

    def __init__(self, optimizers):
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)) for o in optimizers.optimizers]

    def step(self):
        for scheduler in self.schedulers:
            scheduler.step()

    def state_dict(self):
        return self.schedulers[0].state_dict()

    def load_state_dict(self, state_dict):
        for scheduler in self.schedulers:
            scheduler.load_state_dict(dict(state_dict))


class ParallelAwareDataloader:
    """A loader of one rank: its state as bytes, under the rank's own key."""

    def __init__(self):
        self.at = current().rank * 100

    def state_dict(self):
        return {f"dp_rank_{current().rank}": pickle.dumps({"at": self.at}), "world_size": current().world_size}

    def load_state_dict(self, state_dict):
        assert state_dict["world_size"] == current().world_size
        self.at = pickle.loads(state_dict[f"dp_rank_{current().rank}"])["at"]


class TrainState:
    """The counters of torchtitan's Trainer, as tensors."""

    def __init__(self):
        self.step = self.ntokens_seen = 0

    def state_dict(self):
        return {"step": torch.tensor(self.step, dtype=torch.int32), "ntokens_seen": torch.tensor(self.ntokens_seen)}

    def load_state_dict(self, state_dict):
        self.step, self.ntokens_seen = state_dict["step"].item(), state_dict["ntokens_seen"].item()


class Part(nn.Module):
    """One part of a model: its layers have the names that they have in the whole."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


class Training:
    """Two parts of a model under FSDP2, and all that torchtitan has in `states`."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.parts = [
            Part({"0": nn.Linear(8, 10), "1": nn.Tanh()}),
            Part({"2": nn.Linear(10, 8), "3": nn.LayerNorm(8)}),
        ]
        if current().world_size > 1:
            mesh = init_device_mesh("cpu", (current().world_size,))
            self.parts = [fully_shard(part, mesh=mesh) for part in self.parts]
        self.optimizers = OptimizersContainer(self.parts)
        self.schedulers, self.loader, self.state = (
            LRSchedulersContainer(self.optimizers),
            ParallelAwareDataloader(),
            TrainState(),
        )

    @property
    def states(self):
        return {
            "model": ModelWrapper(self.parts),
            "optimizer": self.optimizers,
            "dataloader": self.loader,
            "train_state": self.state,
            "lr_scheduler": self.schedulers,
        }

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(6, 8, generator=torch.Generator().manual_seed(self.state.step))
            for part in self.parts:
                x = part(x)
            x.square().mean().backward()
            self.optimizers.step()
            self.schedulers.step()
            self.optimizers.zero_grad()
            self.state.step += 1
            self.state.ntokens_seen += 48
            self.loader.at += 3
        return self

    def whole(self):
        """All of it, as plain tensors and values."""
        tensors = {**ModelWrapper(self.parts).state_dict(), **self.optimizers.state_dict()}
        full = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in tensors.items()}
        kept = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in full.items()}
        return kept, self.state.state_dict(), self.schedulers.state_dict(), self.loader.at


def _save(folder):
    training = Training(0).train(3)
    distckpt.save(folder / "run", training.states)
    return training.train(2).whole()


def _load(folder):
    training = Training(1)
    distckpt.load(folder / "run", training.states)
    return training.train(2).whole()


def test_the_states_are_saved_and_loaded_as_they_are(tmp_path):
    saved = ranks.run(2, _save, tmp_path)
    assert ranks.run(2, _load, tmp_path) == saved
    assert saved[0][-1] != saved[1][-1]


def test_the_position_of_a_loader_is_of_one_rank_and_the_rest_is_resharded(tmp_path):
    saved, _ = ranks.run(2, _save, tmp_path)
    training = Training(1)
    with pytest.raises(Mismatch, match="dataloader"):
        distckpt.load(tmp_path / "run", training.states)
    states = {name: value for name, value in training.states.items() if name != "dataloader"}
    distckpt.load(tmp_path / "run", states, only=tuple(states))
    tensors, counters, schedule, _ = training.train(2).whole()
    assert (counters, schedule) == saved[1:3]
    for name, value in tensors.items():
        if name.startswith("param_groups."):
            assert value == saved[0][name]
        else:
            torch.testing.assert_close(torch.tensor(value), torch.tensor(saved[0][name]), rtol=1e-5, atol=1e-6)


def test_a_model_that_torchtitan_has_flattened_among_the_rest_is_taken_too(tmp_path):
    training = Training(0).train(3)
    states = {k: v for k, v in training.states.items() if k != "model"} | training.states["model"].state_dict()
    distckpt.save(tmp_path / "run", states)
    other = Training(1)
    states = {k: v for k, v in other.states.items() if k != "model"} | other.states["model"].state_dict()
    distckpt.load(tmp_path / "run", states)
    assert other.whole() == training.whole()
