"""Large models under large parallelisms, as values: what ranks would say of their states, without memory or processes.

A parallelism gives each tensor a layout over the ranks, and says which ranks have the same tensors (a stage's, an
expert group's): those describe the same, and one of each stands for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from distckpt.format.dtype import item_size
from distckpt.format.manifest import FileInfo, Manifest, TensorInfo
from distckpt.format.partition import FlatEven, Grid, Split
from distckpt.state import GlobalTensor, Layout, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.format.partition import Partition

TP, EP, PP, SHARD = 8, 8, 8, 8
"""Ranks of a tensor-parallel, an expert-parallel, a pipeline, a sharding group (the last of HSDP)."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model: its layer (-1: before all, layer count: after), expert, and dimension that TP cuts."""

    shape: tuple[int, ...]
    dtype: str
    layer: int
    expert: int | None = None
    tp: int | None = None


Model = dict[str, Weight]


def llama(layers: int, hidden: int, inner: int, kv: int) -> Model:
    """Fqn -> tensor of a Llama-3's parameters and their two Adam moments, in float32."""
    block = {
        "self_attn.q_proj": ((hidden, hidden), 0),
        "self_attn.k_proj": ((kv, hidden), 0),
        "self_attn.v_proj": ((kv, hidden), 0),
        "self_attn.o_proj": ((hidden, hidden), 1),
        "mlp.gate_proj": ((inner, hidden), 0),
        "mlp.up_proj": ((inner, hidden), 0),
        "mlp.down_proj": ((hidden, inner), 1),
        "input_layernorm": ((hidden,), None),
        "post_attention_layernorm": ((hidden,), None),
    }
    found = {
        f"layers.{i}.{name}.weight": Weight(shape, "float32", i, tp=tp)
        for i in range(layers)
        for name, (shape, tp) in block.items()
    }
    found["embed_tokens.weight"] = Weight((128256, hidden), "float32", -1, tp=0)
    found["norm.weight"] = Weight((hidden,), "float32", layers)
    found["lm_head.weight"] = Weight((128256, hidden), "float32", layers, tp=0)
    return {
        name: weight
        for fqn, weight in found.items()
        for name in (f"model.{fqn}", f"optim.{fqn}.exp_avg", f"optim.{fqn}.exp_avg_sq")
    }


def moe(layers: int = 62, dense: int = 3, experts: int = 256) -> Model:
    """Fqn -> tensor of a DeepSeek-V3-like model's weights in bfloat16: some 46,000."""
    attention = {
        "q_a_proj": ((1536, 7168), None),
        "q_a_layernorm": ((1536,), None),
        "q_b_proj": ((24576, 1536), 0),
        "kv_a_proj_with_mqa": ((576, 7168), None),
        "kv_a_layernorm": ((512,), None),
        "kv_b_proj": ((32768, 512), 0),
        "o_proj": ((7168, 16384), 1),
    }
    found: Model = {}
    for i in range(layers):
        at = f"model.layers.{i}"
        for name, (shape, tp) in attention.items():
            found[f"{at}.self_attn.{name}.weight"] = Weight(shape, "bfloat16", i, tp=tp)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{name}.weight"] = Weight((7168,), "bfloat16", i)
        groups: list[tuple[str, int, int | None]] = [("mlp", 18432, None)]
        if i >= dense:
            found[f"{at}.mlp.gate.weight"] = Weight((256, 7168), "bfloat16", i)
            found[f"{at}.mlp.gate.e_score_correction_bias"] = Weight((256,), "float32", i)
            groups = [("mlp.shared_experts", 2048, None), *((f"mlp.experts.{e}", 2048, e) for e in range(experts))]
        for name, inner, expert in groups:
            for part, shape, tp in (
                ("gate_proj", (inner, 7168), 0),
                ("up_proj", (inner, 7168), 0),
                ("down_proj", (7168, inner), 1),
            ):
                found[f"{at}.{name}.{part}.weight"] = Weight(shape, "bfloat16", i, expert, tp)
    found["model.embed_tokens.weight"] = Weight((129280, 7168), "bfloat16", -1, tp=0)
    found["model.norm.weight"] = Weight((7168,), "bfloat16", layers)
    found["model.lm_head.weight"] = Weight((129280, 7168), "bfloat16", layers, tp=0)
    return found


MODELS: dict[str, Callable[[], Model]] = {
    "Llama-3 8B": lambda: llama(32, 4096, 14336, 1024),
    "Llama-3 70B": lambda: llama(80, 8192, 28672, 1024),
    "Llama-3 405B": lambda: llama(126, 16384, 53248, 1024),
    "MoE": moe,
}


@dataclass(frozen=True, slots=True)
class Sharding:
    """A model under one parallelism: the layout of each tensor, and which class of ranks has it (None: all)."""

    world_size: int
    layouts: dict[str, Layout]
    classes: int
    class_of: Callable[[int], int]
    owner: Callable[[Weight], int | None]

    def state(self, model: Model, of_class: int) -> State:
        """What a rank of a class describes, without its memory."""
        return State(
            {
                fqn: GlobalTensor(w.shape, w.dtype, self.layouts[fqn], ())
                for fqn, w in model.items()
                if self.owner(w) in {None, of_class}
            }
        )


def _even(shape: tuple[int, ...], split: Split, first: int = 0) -> Grid:
    """Cut of the first dimension."""
    return Grid(shape, ((split,), *((),) * (len(shape) - 1)), first)


def fsdp(model: Model, n: int) -> Sharding:
    """Every tensor cut along its first dimension over all ranks."""
    return _plain(n, {fqn: Layout(_even(w.shape, Split(n, 1))) for fqn, w in model.items()})


def hsdp(model: Model, n: int) -> Sharding:
    """Cut over groups of SHARD ranks, replicated over the groups."""
    replicas = (Split(n // SHARD, SHARD),)
    return _plain(n, {fqn: Layout(_even(w.shape, Split(SHARD, 1)), replicas) for fqn, w in model.items()})


def tp_fsdp(model: Model, n: int) -> Sharding:
    """TP along the dimension that a tensor has for it, FSDP along the first; without one, replicated over TP."""

    def layout(w: Weight) -> Layout:
        outer, tp = Split(n // TP, TP), Split(TP, 1)
        if w.tp is None:
            return Layout(_even(w.shape, outer), (tp,))
        splits = ((tp, outer), ()) if w.tp == 0 else ((outer,), (tp,))
        return Layout(Grid(w.shape, splits, 0))

    return _plain(n, {fqn: layout(w) for fqn, w in model.items()})


def ep_fsdp(model: Model, n: int) -> Sharding:
    """Experts dealt to EP groups, each cut over the ranks of its group; everything else over all ranks."""

    def layout(w: Weight) -> Layout:
        if w.expert is None:
            return Layout(_even(w.shape, Split(n, 1)))
        return Layout(_even(w.shape, Split(n // EP, EP), w.expert % EP))

    layouts = {fqn: layout(w) for fqn, w in model.items()}
    return Sharding(n, layouts, EP, lambda rank: rank % EP, lambda w: None if w.expert is None else w.expert % EP)


def pp(model: Model, n: int) -> Sharding:
    """Layers dealt to PP stages, each cut over the ranks of its stage."""
    depth = 1 + max(w.layer for w in model.values())
    each = n // PP

    def stage(w: Weight) -> int:
        return max(0, w.layer) * PP // depth

    layouts = {fqn: Layout(_even(w.shape, Split(each, 1), stage(w) * each)) for fqn, w in model.items()}
    return Sharding(n, layouts, PP, lambda rank: min(PP - 1, rank // each), stage)


def zero1(model: Model, n: int) -> Sharding:
    """All tensors of a dtype one after another in a buffer that is cut evenly."""
    total: dict[str, int] = {}
    offsets = {}
    for fqn, w in model.items():
        offsets[fqn] = total.get(w.dtype, 0)
        total[w.dtype] = offsets[fqn] + prod(w.shape)
    period = {dtype: -(-size // n) for dtype, size in total.items()}
    return _plain(n, {f: Layout(FlatEven(w.shape, period[w.dtype], offsets[f], 0)) for f, w in model.items()})


def zero3(model: Model, n: int) -> Sharding:
    """Each tensor's elements cut evenly."""
    return _plain(n, {f: Layout(FlatEven(w.shape, -(-prod(w.shape) // n), 0, 0)) for f, w in model.items()})


def _plain(n: int, layouts: dict[str, Layout]) -> Sharding:
    return Sharding(n, layouts, 1, lambda _: 0, lambda _: None)


PARALLELISMS: dict[str, Callable[[Model, int], Sharding]] = {
    "FSDP": fsdp,
    "HSDP": hsdp,
    "TP x FSDP": tp_fsdp,
    "EP x FSDP": ep_fsdp,
    "PP": pp,
    "ZeRO-1": zero1,
    "ZeRO-3": zero3,
}


def index_of(model: Model, partitions: Mapping[str, Partition], world_size: int) -> Manifest:
    """Manifest of a checkpoint of a model, a data file a rank."""
    infos = {fqn: TensorInfo(w.shape, w.dtype, partitions[fqn]) for fqn, w in model.items()}
    size = 81920 + sum(item_size(w.dtype) * prod(w.shape) for w in model.values()) // world_size + 1
    files = tuple(FileInfo(f"rank-{r:05d}.0123456789ab.safetensors", size, 81920, "0" * 32) for r in range(world_size))
    return Manifest(1, 1, 1, "0123456789ab", "2026-01-01T00:00:00+00:00", world_size, infos, files)
