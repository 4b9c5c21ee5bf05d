"""The same model and optimizer under every layout, filled with values that any layout can check."""

from __future__ import annotations

import contextlib
import zlib

import torch
from torch import nn

from distckpt import Progress, TrainState
from distckpt.adapters.dtensor import local_of
from distckpt.format.box import Run

SIZES = {"one": 1, "ddp2": 2, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "hsdp2x2": 4, "tp2": 2, "tp2fsdp2": 4}
FSDP1 = {
    "fsdp1x2": 2,
    "fsdp1x3": 3,
    "fsdp1x4": 4,
    "flat2": 2,  # use_orig_params=False
    "flat3": 3,
    "flat4": 4,
    "hybrid2x2": 4,
    "flathybrid2x2": 4,
    "noshard2": 2,
    "gradop2": 2,
}
"""FullyShardedDataParallel: use_orig_params=True unless it says flat."""
ALL = SIZES | FSDP1


class Holder(nn.Module):
    """One parameter in a module of its own: FSDP1 keeps dtypes, and without original parameters frozen ones, apart."""

    def __init__(self, value, *, requires_grad=True):
        super().__init__()
        self.value = nn.Parameter(value, requires_grad=requires_grad)

    def forward(self):
        return self.value * 1  # a view of what FSDP has gathered must not leave the module


class Net(nn.Module):
    """Primes, ones, a tied pair, frozen and low-precision parameters, a buffer: what reshards badly if done badly."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.up = nn.Linear(8, 26, bias=True)
        self.down = nn.Linear(26, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.emb.weight
        self.wide = nn.Parameter(torch.zeros(3, 128, 64))  # large enough that replicas slice it
        self.one = nn.Parameter(torch.zeros(1, 5, 1))
        self.still = Holder(torch.zeros(7, 3), requires_grad=False)
        self.low = Holder(torch.zeros(5, 2, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))

    def forward(self, x):
        h = self.norm(self.down(torch.relu(self.up(self.emb(x)))))
        return self.head(h) + self.wide.mean() + self.one.sum() + self.low().float().sum()


def build(layout, *, lr=1e-3, optimizer=torch.optim.AdamW):
    """(model, optimizer) of the layout. Collective."""
    torch.manual_seed(7)
    model = Net()
    wrapped = wrap(model, layout)
    trained = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in wrapped.named_parameters() if p.requires_grad]
    apart = [p for n, p in trained if n.removeprefix("module.").startswith(("up.", "low."))]
    rest = [p for _, p in trained if not any(p is q for q in apart)]
    groups = [{"params": apart, "weight_decay": 0.1}, {"params": rest, "lr": 5e-4}]
    return wrapped, optimizer(groups, lr=lr)


def wrap_fsdp1(model, layout):
    import warnings

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    strategy, mesh = ShardingStrategy.FULL_SHARD, None
    if layout.endswith("hybrid2x2"):
        strategy = ShardingStrategy.HYBRID_SHARD
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard"))
    elif layout == "noshard2":
        strategy = ShardingStrategy.NO_SHARD
    elif layout == "gradop2":
        strategy = ShardingStrategy.SHARD_GRAD_OP

    def shard(module):
        return FullyShardedDataParallel(
            module,
            sharding_strategy=strategy,
            device_mesh=mesh,
            use_orig_params=not layout.startswith("flat"),
            device_id=torch.device("cpu"),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD is deprecated
        for name in ("up", "still", "low"):
            setattr(model, name, shard(getattr(model, name)))
        return shard(model)


def wrap(model, layout):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if layout == "one":
        return model
    if layout in FSDP1:
        return wrap_fsdp1(model, layout)
    if layout == "ddp2":
        return nn.parallel.DistributedDataParallel(model)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "tp2":
        return parallelize_module(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    if layout == "tp2fsdp2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model.up, mesh=mesh["dp"])
        fully_shard(model.down, mesh=mesh["dp"])
        return fully_shard(model, mesh=mesh["dp"])
    if layout == "hsdp2x2":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard"))
    else:
        mesh = init_device_mesh("cpu", (SIZES[layout],), mesh_dim_names=("shard",))
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def expected(fqn, shape, dtype):
    """Value that the global tensor of this name has in every layout, by its name alone."""
    if fqn.endswith(".step"):
        fqn = "step"  # parameters of one flat parameter share it
    generator = torch.Generator().manual_seed(zlib.crc32(fqn.encode()))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def fill(state, *, salt=""):
    """Give every tensor of a captured state its expected value."""
    for fqn, tensor in state.tensors.items():
        whole = expected(fqn + salt, tensor.shape, getattr(torch, tensor.dtype))
        for shard in tensor.shards:
            shard.tensor.copy_(_region(whole, shard.region))


def wrong(state, *, salt=""):
    """Fqns whose shards do not have their expected values, bit for bit."""
    found = []
    for fqn, tensor in state.tensors.items():
        whole = expected(fqn + salt, tensor.shape, getattr(torch, tensor.dtype))
        for shard in tensor.shards:
            if not torch.equal(shard.tensor, _region(whole, shard.region)):
                found.append(fqn)
    return found


def _region(whole, region):
    if isinstance(region, Run):
        return whole.flatten()[region.start : region.stop]
    for d, (start, size) in enumerate(zip(region.offsets, region.sizes, strict=True)):
        whole = whole.narrow(d, start, size)
    return whole


def make_moments(model, optimizer):
    """Adam's states for every trained parameter, as one step would make them, without a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.numel() or not (p.dim() == 1 and model_is_fsdp1(model)):  # FSDP1: no element here, no state
                optimizer.state[p] = {
                    "step": torch.tensor(3.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def model_is_fsdp1(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(model, FullyShardedDataParallel)


def zero(model, optimizer):
    """Zero everything, so that what a load leaves out shows."""
    with torch.no_grad():
        for t in [*model.parameters(), *model.buffers()]:
            local = local_of(t) if hasattr(t, "device_mesh") else t.detach()
            local.zero_()
    optimizer.state.clear()


def train_state(model, optimizer, **more):
    return TrainState(model=model, optimizer=optimizer, progress=Progress(), **more)


@contextlib.contextmanager
def quiet():
    """Without StateWarnings: for tests in which an environment changes on purpose."""
    import warnings

    from distckpt.errors import StateWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)
        yield
