"""Tags of pipelines and of experts, and checkpoints of ours of the same engines at the same step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch

from distckpt.format.box import Box
from distckpt.loading.stream import Stretch, stream
from distckpt.run.source import open_source
from tests.adapters import engines, test_zero_moe, test_zero_pipeline

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}}


@dataclass(frozen=True)
class Case:
    """How an engine is made. parts: stages of a pipeline, or ranks that share experts out."""

    kind: str
    size: int
    parts: int
    stage: int
    dtype: str = "fp32"
    options: dict = field(default_factory=dict)

    def engine(self, seed=0):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = test_zero_pipeline if self.kind == "pipeline" else test_zero_moe
            return kind.made(self.parts, self.stage, self.dtype, seed=seed, **WARMUP, **self.options)

    def train(self, engine, start, stop):
        return (test_zero_pipeline if self.kind == "pipeline" else engines).train(engine, start, stop)


ODD = {"zero": {"round_robin_gradients": True, "parameter_alignment": True}}
DATA_FIRST = {"use_data_before_expert_parallelism": True}

CASES = {
    "pipeline zero0": Case("pipeline", 4, 2, 0, options={"strided": True}),
    "pipeline zero0 fp16": Case("pipeline", 2, 2, 0, "fp16"),
    "pipeline zero0 bf16-optimizer": Case("pipeline", 4, 2, 0, "bf16"),
    "pipeline zero1": Case("pipeline", 4, 2, 1),
    "pipeline zero1 lion": Case("pipeline", 2, 2, 1, options={"optimizer": "lion", "tied": False}),
    "pipeline zero1 bf16": Case("pipeline", 4, 2, 1, "bf16", options={"strided": True}),
    "pipeline zero1 bf16-optimizer": Case("pipeline", 4, 2, 1, "bf16", options=FP32_GRADIENTS),
    "one stage": Case("pipeline", 2, 1, 1),
    "experts zero0": Case("experts", 4, 2, 0),
    "experts zero0 bf16": Case("experts", 4, 2, 0, "bf16"),
    "experts zero1": Case("experts", 4, 2, 1),
    "experts zero1 apart": Case("experts", 4, 2, 1, options=DATA_FIRST),
    "experts zero1 everywhere": Case("experts", 2, 1, 1, "bf16"),
    "experts zero1 bf16-optimizer": Case("experts", 4, 2, 1, "bf16", options=FP32_GRADIENTS),
    "experts zero2 odd": Case("experts", 4, 2, 2, "bf16", options=ODD),
    "experts zero2 each": Case("experts", 4, 4, 2),
}


def save(case, root):
    """Train; save a tag as DeepSpeed does, a later one, and one checkpoint of ours. Returns losses of later steps."""
    engine = case.engine()
    case.train(engine, 0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.save_checkpoint(f"{root}/tags", tag="first", client_state={"epoch": 3})
        engines.saved(f"{root}/ours", engine)
        losses = case.train(engine, 2, 4)
        engine.save_checkpoint(f"{root}/tags", tag="later", save_latest=False)
    return losses


def content(checkpoint):
    """(dtype, shape, bytes) of each tensor by fqn, under all its names."""
    found = {}
    for fqn, info in checkpoint.manifest.tensors.items():
        data = b"".join(
            bytes(part)
            for _, part in stream(checkpoint, [Stretch.whole(fqn, Box.whole(info.shape), info.dtype)], 1 << 20)
        )
        found[fqn] = info.dtype, info.shape, data
    return found | {alias: found[fqn] for alias, fqn in checkpoint.manifest.aliases.items()}


def order_in(checkpoint):
    """Names by group of the optimizer's parameters."""
    return [group["params"] for group in checkpoint.object("optim")["groups"]]


def ours(root):
    return open_source(f"{root}/ours")


def as_float32(held):
    """Bytes of a tensor, widened."""
    dtype, _, data = held
    if dtype == "float32":
        return data
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype)).float().numpy().tobytes()
