"""What a training script does, with DeepSpeed's save_checkpoint and load_checkpoint or, once installed, with ours."""

from __future__ import annotations

import torch

from tests import deepspeeds


def script(stage, seed=0, *, installed=True, dtype="fp32", **options):
    """What a training script does before its loop."""
    from distckpt.adapters import deepspeed

    if installed:
        deepspeed.install(timeout=20, wait=installed != "async")
    model = deepspeeds.net(seed)
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5**i)
    return deepspeeds.engine(model, optimizer, stage, dtype, lr_scheduler=schedule, **options)


def train(engine, start, stop):
    return [deepspeeds.step(engine, None, i) for i in range(start, stop)]


def weights(engine):
    import deepspeed

    with deepspeed.zero.GatheredParameters([*engine.module.parameters()]):
        return {n: v.detach().clone() for n, v in engine.module.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rates(engine):
    return [group["lr"] for group in engine.optimizer.param_groups]
