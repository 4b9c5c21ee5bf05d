"""DeepSpeed engines for tests, on real gloo ranks that need no compiler and start in a second.

The server of the ranks has imported DeepSpeed, and what an engine's constructor would import; the test itself has not.
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import logging
import os

import pytest
import torch
from torch import nn

from distckpt import comm
from tests import ranks

os.environ.setdefault("DS_ACCELERATOR", "cpu")

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)


def preload():
    """Import DeepSpeed. No op of it is said to be there: init_distributed would compile one."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    import deepspeed.runtime.superoffload.superoffload_stage3
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3


run = functools.partial(ranks.run, preload=("tests.deepspeed_loaded",))
"""`ranks.run`, of ranks that have imported DeepSpeed."""


class Net(nn.Module):
    """Odd sizes, two parameter groups, a tied pair, a frozen layer, a buffer, a parameter of one element."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 23)
        self.norm = nn.LayerNorm(23)
        self.still = nn.Linear(23, 23).requires_grad_(False)
        self.down = nn.Linear(23, 8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        if self.training:
            self.seen += 1
        h = self.still(self.norm(nn.functional.gelu(self.up(self.emb(x)))))
        return self.head(self.down(h) * self.scale).float()


def net(seed=0, kind=Net):
    torch.manual_seed(seed)
    return kind()


def groups(model):
    """Two groups with different hyper-parameters: matrices, and the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2]
    rest = [p for p in trained if p.dim() < 2]
    return [{"params": decayed, "weight_decay": 0.1, "lr": 2e-3}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}]


def batch(i):
    """This rank's part of the i-th batch of 12 sequences, the same batch over any number of ranks."""
    x = torch.randint(0, 13, (12, 5), generator=torch.Generator().manual_seed(100 + i))
    place = comm.current()
    return x.chunk(place.world_size)[place.rank]


def step(model, optimizer, i):
    """One step; returns the loss over all ranks. optimizer: None for an engine."""
    x = batch(i)
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), ((x + 1) % 13).flatten())
    if optimizer is None:
        model.backward(loss)
        model.step()
    else:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = loss.detach().double()
    if comm.current().world_size > 1:
        torch.distributed.all_reduce(whole)
    return whole.item() / comm.current().world_size


def config(stage, dtype, size, options):
    """Configuration of an engine: 12 samples a step over all ranks."""
    own = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 12 // size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 10**9,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage} | options.pop("zero", {}),
    }
    if dtype == "bf16":
        own["bf16"] = {"enabled": True}
    if dtype == "fp16":
        own["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2}
    return own | options


def joined():
    """Have DeepSpeed take over the ranks' process group; returns their number."""
    import deepspeed
    import torch.distributed as dist

    preload()
    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    return size


def engine(model, optimizer, stage, dtype="fp32", *, lr_scheduler=None, **options):
    """Engine over a model and an optimizer. Collective. options: of the configuration; `zero`: of its ZeRO part."""
    import deepspeed

    made = config(stage, dtype, joined(), options)
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=made)[0]
