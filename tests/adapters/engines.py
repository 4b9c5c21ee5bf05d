"""Engines over the model of tests.deepspeeds, with torch's optimizers; saved, resumed and compared."""

from __future__ import annotations

import torch

from distckpt import Checkpointer, TrainState
from tests import deepspeeds
from tests.layouts import _region, quiet


class Lion(torch.optim.Optimizer):
    """One moment, no step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(torch.sign(moment * slow + p.grad * (1 - slow)), alpha=-group["lr"])
                    moment.mul_(fast).add_(p.grad, alpha=1 - fast)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad([p for g in groups for p in g["params"]], lr=1e-2),
    "lion": Lion,
}


def made(stage, dtype="fp32", optimizer="adamw", *, seed=0, kind=deepspeeds.Net, decay=None, **options):
    model = deepspeeds.net(seed, kind)
    made_optimizer = OPTIMIZERS[optimizer](deepspeeds.groups(model))
    schedule = None
    if decay:
        schedule = torch.optim.lr_scheduler.LambdaLR(made_optimizer, lambda i: decay**i)
    return deepspeeds.engine(model, made_optimizer, stage, dtype, lr_scheduler=schedule, **options)


def train(engine, start, stop):
    return [deepspeeds.step(engine, None, i) for i in range(start, stop)]


def held(state):
    return {f: [s.tensor.clone() for s in t.shards] for f, t in state.capture().tensors.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for fqn, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[fqn], strict=True)), fqn


def resumed(root, engine, **options):
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        return checkpointer.resume(TrainState(model=engine, rng=False), **options)


def saved(root, engine, step=2):
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(step, TrainState(model=engine, rng=False), check_replicas=True)


def captured(engine):
    """What this rank holds of each tensor."""
    tensors = TrainState(model=engine, rng=False).capture().tensors
    return {f: (t.shape, [(s.region, s.tensor.clone()) for s in t.shards]) for f, t in tensors.items()}


def joined(of_ranks):
    """Whole tensors of what ranks hold; what several hold must be equal."""
    whole = {}
    for of_rank in of_ranks:
        for fqn, (shape, shards) in of_rank.items():
            tensor = whole.setdefault(fqn, torch.full(shape, float("nan")))
            for region, part in shards:
                place = _region(tensor, region)
                assert place.isnan().all() or torch.equal(place, part.view(place.shape)), fqn
                place.copy_(part.view(place.shape))
    assert not any(t.isnan().any() for t in whole.values())
    return whole
