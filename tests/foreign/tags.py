"""Tags that DeepSpeed itself saves, and what its live engine held then: whole masters and moments by name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import nn

from distckpt import TrainState
from tests import deepspeeds


class NormNet(nn.Module):
    """As `deepspeeds.Net`, with BatchNorm's buffers, a name that ends in digits, and nothing tied or frozen."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.norm = nn.BatchNorm1d(5)
        self.stack = nn.ModuleList([nn.Linear(8, 11), nn.Linear(11, 13)])

    def forward(self, x):
        return self.stack[1](torch.tanh(self.stack[0](self.norm(self.emb(x))))).float()


def three_groups(model):
    """The last one has a single element: most ranks own nothing but padding of it."""
    groups = deepspeeds.groups(model)
    groups[1]["params"] = [p for p in groups[1]["params"] if p is not model.scale]
    return [*groups, {"params": [model.scale], "weight_decay": 0.0, "lr": 5e-4}]


def one_group(model):
    return [{"params": list(model.parameters())}]


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-3)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-2, momentum=0.9)


def adagrad(groups):
    return torch.optim.Adagrad(groups, lr=1e-2)


@dataclass(frozen=True)
class Case:
    """How an engine is made. `options`: of its configuration, `zero` of the ZeRO part."""

    size: int
    stage: int
    dtype: str = "fp32"
    zero: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    groups: object = deepspeeds.groups
    optimizer: object = adamw
    net: type = deepspeeds.Net

    def model(self, seed=0):
        return deepspeeds.net(seed, self.net)

    def trained(self, seed=0):
        """(model, optimizer, lr_scheduler) that this case's engine is made of."""
        model = self.model(seed)
        optimizer = self.optimizer(self.groups(model))
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    def engine(self, seed=0):
        model, optimizer, schedule = self.trained(seed)
        options = {"zero": dict(self.zero)} | self.options
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return deepspeeds.engine(model, optimizer, self.stage, self.dtype, lr_scheduler=schedule, **options)


FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}

CASES = {
    "zero0": Case(2, 0),
    "zero0-bf16": Case(2, 0, "bf16"),
    "zero0-fp16": Case(2, 0, "fp16"),
    "zero1": Case(2, 1),
    "zero1-fp16": Case(2, 1, "fp16"),
    "zero1-padding": Case(4, 1, groups=three_groups),
    "zero1-aligned": Case(2, 1, "bf16", zero={"parameter_alignment": True}),
    "zero1-bf16-optimizer": Case(2, 1, "bf16", options=FP32_GRADIENTS),
    "zero2-bf16": Case(3, 2, "bf16"),
    "zero2-round-robin": Case(3, 2, zero={"round_robin_gradients": True}),
    "zero2-norm": Case(2, 2, net=NormNet, groups=one_group),
    "zero2-sgd": Case(2, 2, optimizer=sgd),
    "zero3": Case(2, 3),
    "zero3-bf16": Case(4, 3, "bf16", zero={"stage3_param_persistence_threshold": 50}),
    "zero3-fp16": Case(2, 3, "fp16"),
    "zero3-sub-groups": Case(3, 3, zero={"sub_group_size": 100}, groups=three_groups),
    "zero3-adagrad": Case(2, 3, optimizer=adagrad, net=NormNet, groups=one_group),
    "zero2-round-robin-aligned": Case(
        2, 2, "bf16", zero={"round_robin_gradients": True, "parameter_alignment": True}, groups=three_groups
    ),
    "zero1-bf16-optimizer-padding": Case(4, 1, "bf16", options=FP32_GRADIENTS, groups=three_groups),
}

# -- what a live engine holds, from the flat buffers themselves ------------------------------------------------------


def _pieces(owner):
    """(parameter, its shape, start in it, start in the flat buffer, elements, flat buffer)."""
    if hasattr(owner, "fp32_partitioned_groups_flat"):
        for members, flat in zip(owner.fp16_groups, owner.fp32_partitioned_groups_flat, strict=True):
            at = 0
            for p in members:
                period = p.partition_numel()
                start = torch.distributed.get_rank(p.ds_process_group) * period
                yield p, tuple(p.ds_shape), start, at, max(0, min(period, p.ds_numel - start)), flat
                at += period
        return
    bf16 = hasattr(owner, "bf16_groups")
    groups = owner.bf16_groups if bf16 else owner.round_robin_bit16_groups
    flats = owner.fp32_groups_flat_partition if bf16 else owner.single_partition_of_fp32_groups
    for g, (members, flat) in enumerate(zip(groups, flats, strict=True)):
        low = torch.distributed.get_rank(owner.real_dp_process_group[g]) * flat.numel()
        gaps = [0] * len(members) if bf16 else owner.round_robin_bit16_padding[g]
        offset = 0
        for p, gap in zip(members, gaps, strict=True):
            first, last = max(offset, low), min(offset + p.numel(), low + flat.numel())
            if first < last:
                yield p, tuple(p.shape), first - offset, first - low, last - first, flat
            offset += p.numel() + gap


def _whole_states(owner):
    """(parameter, master, states) where every rank has them whole."""
    for g, group in enumerate(owner.param_groups):
        for i, p in enumerate(group["params"]):
            if hasattr(owner, "fp32_groups"):
                master = owner.fp32_groups[g][i]
                yield owner.fp16_groups[g][i], master, owner.optimizer.state.get(master, {})
            else:
                yield p, p, owner.state.get(p, {})


def held(engine):
    """What this rank holds: (name, state, shape, start, elements) of each piece; state "" is the master."""
    owner = engine.optimizer
    names = {id(p): n for n, p in engine.module.named_parameters()}
    found = []
    if not hasattr(owner, "real_dp_process_group") and not hasattr(owner, "fp32_partitioned_groups_flat"):
        for p, master, state in _whole_states(owner):
            for key, value in {"": master, **state}.items():
                found.append((names[id(p)], key, tuple(value.shape), 0, value.detach().clone().reshape(-1)))
        return found
    for p, shape, start, at, count, flat in _pieces(owner):
        for key, value in {"": flat, **owner.optimizer.state.get(flat, {})}.items():
            if value.dim():
                found.append((names[id(p)], key, shape, start, value.detach()[at : at + count].clone()))
            elif count:
                found.append((names[id(p)], key, (), 0, value.clone().reshape(-1)))
    return found


def joined(of_ranks):
    """(name, state) -> whole tensor, of what the ranks hold."""
    whole, seen = {}, {}
    for pieces in of_ranks:
        for name, key, shape, start, values in pieces:
            flat = whole.setdefault((name, key), torch.full(shape, float("nan"), dtype=values.dtype).reshape(-1))
            flat[start : start + len(values)] = values
            seen[name, key] = shape
    assert not any(flat.isnan().any() for flat in whole.values())
    return {key: flat.reshape(seen[key]) for key, flat in whole.items()}


def rest(engine):
    """Frozen parameters and buffers, whole. Collective."""
    import deepspeed

    still = {n: p for n, p in engine.module.named_parameters() if not p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(still.values())):
        found = {n: p.detach().clone() for n, p in still.items()}
    return found | {n: b.clone() for n, b in engine.module.named_buffers()}


def save(case, folder, tag="first", steps=3):
    """Train, and save a tag as DeepSpeed does. Returns what the rank held then, and the losses of two more steps."""
    engine = case.engine()
    for i in range(steps):
        deepspeeds.step(engine, None, i)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert engine.save_checkpoint(str(folder), tag=tag, client_state={"epoch": 3, "history": [0.5, None]})
        holding, others = held(engine), rest(engine)
        lr, scale = engine.get_lr(), getattr(getattr(engine.optimizer, "loss_scaler", None), "cur_scale", None)
        counts = (engine.global_steps, engine.global_samples, engine.skipped_steps)
        losses = [deepspeeds.step(engine, None, i) for i in range(steps, steps + 2)]
    return {"held": holding, "rest": others, "losses": losses, "lr": lr, "scale": scale, "counts": counts}


def state_of(model, optimizer, schedule=None):
    return TrainState(model=model, optimizer=optimizer, lr_scheduler=schedule, rng=False)
