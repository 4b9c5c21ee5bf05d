"""FSDP1: what it captures is where it lies, nothing is gathered for it, and training resumes bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.errors import Mismatch, Unsupported
from tests import ranks
from tests.layouts import quiet

CPU = torch.device("cpu")


def shard(module, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD is deprecated
        return FullyShardedDataParallel(module, **({"device_id": CPU, "use_orig_params": True} | options))


def strategy(name):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import ShardingStrategy

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rep", "shard")) if name.startswith("HYBRID") else None
    return {"sharding_strategy": ShardingStrategy[name], "device_mesh": mesh}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.inner = nn.Sequential(nn.Linear(6, 13), nn.Tanh(), nn.Linear(13, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x):
        self.count += 1
        return self.head(self.inner(self.emb(x)))


def net(seed=0, **options):
    torch.manual_seed(seed)
    model = Net()
    model.inner = shard(model.inner, **options)
    return shard(model, **options)


def step(model, optimizer, i):
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randint(0, 11, (4,), generator=generator)
    loss = nn.functional.cross_entropy(model(x).float(), (x + 1) % 11)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


# -- training goes on as if nothing had happened ----------------------------------------------------------------------


def _resumes_bit_for_bit(root, how, orig, mixed):
    from torch.distributed.fsdp import MixedPrecision

    precision = MixedPrecision(param_dtype=torch.bfloat16) if mixed else None
    options = strategy(how) | {"use_orig_params": orig, "mixed_precision": precision}
    model = net(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        for i in range(2):
            step(model, optimizer, i)
        checkpointer.save(2, TrainState(model=model, optimizer=optimizer))
        wanted = [step(model, optimizer, i) for i in range(2, 5)]
    fresh = net(seed=9, **options)
    fresh_optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.5)
    with torch.no_grad():
        fresh(torch.zeros(1, dtype=torch.int64))  # leaves the root's parameters gathered: they must not be used again
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.resume(TrainState(model=fresh, optimizer=fresh_optimizer))
    assert [step(fresh, fresh_optimizer, i) for i in range(2, 5)] == wanted
    ours, theirs = TrainState(model=model).capture(), TrainState(model=fresh).capture()
    for fqn, tensor in ours.tensors.items():
        for a, b in zip(tensor.shards, theirs.tensors[fqn].shards, strict=True):
            assert torch.equal(a.tensor, b.tensor), fqn


@pytest.mark.parametrize(
    ("how", "size"), [("FULL_SHARD", 3), ("SHARD_GRAD_OP", 2), ("HYBRID_SHARD", 4), ("NO_SHARD", 2)]
)
@pytest.mark.parametrize("orig", [True, False])
def test_training_resumed_with_the_same_layout_is_the_uninterrupted_run_bit_for_bit(tmp_path, how, size, orig):
    ranks.run(size, _resumes_bit_for_bit, str(tmp_path), how, orig, False)


def test_so_is_training_in_mixed_precision(tmp_path):
    ranks.run(2, _resumes_bit_for_bit, str(tmp_path), "FULL_SHARD", True, True)


# -- capture ------------------------------------------------------------------------------------------------------


def _captures_in_silence(orig):
    import torch.distributed as dist

    model = net(use_orig_params=orig)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, 0)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    group = dist.group.WORLD
    before = group._get_sequence_number_for_group()
    handles = {h._handle.flat_param for h in (model, model.inner)}
    flats = {f._local_shard.untyped_storage().data_ptr() for f in handles}
    moments = {v.untyped_storage().data_ptr() for s in optimizer.state.values() for v in s.values()}
    captured = state.capture()
    assert group._get_sequence_number_for_group() == before, "capture made a collective"
    dist.barrier()
    assert group._get_sequence_number_for_group() == before + 1, "collectives are not counted"
    for fqn, tensor in captured.tensors.items():
        for held in tensor.shards:
            where = held.tensor.untyped_storage().data_ptr()
            if fqn == "model.count":
                assert where == model.count.untyped_storage().data_ptr()
            else:
                assert where in (flats if fqn.startswith("model.") else moments), f"{fqn} was copied"


@pytest.mark.parametrize("orig", [True, False])
def test_capture_makes_no_collective_and_no_copy(orig):
    ranks.run(2, _captures_in_silence, orig)


def _between_forward_and_backward(root):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, 0)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    x = torch.arange(4)
    loss = model(x).float().square().mean()
    held = {f: [s.tensor.clone() for s in t.shards] for f, t in state.capture().tensors.items()}
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, state)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.numel())
    optimizer.step()
    now = state.capture().tensors
    assert any(not torch.equal(a, s.tensor) for f in held for a, s in zip(held[f], now[f].shards, strict=True))
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.resume(state)
    assert all(
        torch.equal(a, s.tensor) for f in held for a, s in zip(held[f], state.capture().tensors[f].shards, strict=True)
    )


def test_a_save_between_forward_and_backward_disturbs_nothing(tmp_path):
    ranks.run(2, _between_forward_and_backward, str(tmp_path))


def _offloaded(root):
    from torch.distributed.fsdp import CPUOffload

    model = net(cpu_offload=CPUOffload(offload_params=True))
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model))
    plain = Net()
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.load(TrainState(model=plain))
    torch.manual_seed(0)
    assert torch.equal(plain.inner[0].weight, Net().inner[0].weight)


def test_parameters_offloaded_to_the_cpu_are_saved(tmp_path):
    """Of a model that has not trained yet: FSDP1 trains with offloading on an accelerator only."""
    ranks.run(2, _offloaded, str(tmp_path))


# -- odd parameters -------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """channels_last weights, a parameter that is never used, one that FSDP is told to ignore, a tiny one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2).to(memory_format=torch.channels_last)
        self.pointwise = nn.Conv2d(5, 4, 1).to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.randn(7))
        self.tiny = nn.Parameter(torch.randn(1))
        self.mine = nn.Linear(4, 2)

    def forward(self, x):
        return self.mine(self.pointwise(self.conv(x)).mean((2, 3))) * self.tiny


def _odd(seed, wrapped, orig):
    torch.manual_seed(seed)
    model = Odd()
    if wrapped:
        model = shard(model, ignored_modules=[model.mine], use_orig_params=orig)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _save_odd(root, orig):
    model, optimizer = _odd(0, True, orig)
    plain, plain_optimizer = _odd(0, False, orig)
    for net_, opt in ((model, optimizer), (plain, plain_optimizer)):
        generator = torch.Generator().manual_seed(3)  # the same batch on every rank: the mean is that of one
        for _ in range(2):
            net_(torch.randn(2, 3, 4, 4, generator=generator)).square().mean().backward()
            opt.step()
            opt.zero_grad()
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(2, TrainState(model=model, optimizer=optimizer, rng=False))
    again, again_optimizer = _odd(1, True, orig)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.resume(TrainState(model=again, optimizer=again_optimizer, rng=False))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[p].keys() == again_optimizer.state[q].keys()
        assert all(torch.equal(v, again_optimizer.state[q][k]) for k, v in optimizer.state[p].items())
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        whole = {n: p.detach().clone() for n, p in model.named_parameters()}
    return whole, plain_optimizer.state_dict()["state"]


def _load_odd(root):
    plain, optimizer = _odd(1, False, True)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.load(TrainState(model=plain, optimizer=optimizer, rng=False))
    return {n: p.detach() for n, p in plain.named_parameters()}, optimizer.state_dict()["state"]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("orig", [True, False])
def test_permuted_unused_ignored_and_tiny_parameters_come_back(tmp_path, size, orig):
    """Weights as FSDP gathers them; moments against training without it, on batches that are the same on every rank."""
    weights, moments = ranks.run(size, _save_odd, str(tmp_path), orig)[0]
    (loaded, loaded_moments), *_ = ranks.run(1, _load_odd, str(tmp_path))
    assert weights.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], wanted) for name, wanted in weights.items())
    assert not loaded["conv.weight"].is_contiguous()
    assert [*weights].index("unused") not in moments  # FSDP gives it a gradient of zeros, and so a state
    for i, state in moments.items():
        for name, wanted in state.items():
            assert torch.allclose(loaded_moments[i][name], wanted, rtol=1e-4, atol=1e-7), (i, name)


# -- optimizers -------------------------------------------------------------------------------------------------------


class Counting(torch.optim.Optimizer):
    """Counts steps in a Python int, as many an optimizer outside torch does."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    state = self.state[p]
                    state["steps"] = state.get("steps", 0) + 1
                    p.data.add_(p.grad, alpha=-group["lr"] / state["steps"])


class Factored(torch.optim.Optimizer):
    """Keeps one number for every four elements: a state that is cut as the shard lies, not element by element."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    flat = p.grad.flatten()
                    blocks = torch.stack([b.square().mean() for b in flat.split(4)])
                    old = self.state[p].get("blocks")
                    self.state[p]["blocks"] = blocks if old is None else old * 0.9 + blocks
                    p.data.add_(p.grad, alpha=-group["lr"])


def _train(root, kind, n):
    model = net()
    optimizer = kind(model.parameters())
    for i in range(n):
        step(model, optimizer, i)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(n, state)
    return model, optimizer


def _resume(root, kind, step_=None, expect=None):
    fresh = net(seed=4)
    optimizer = kind(fresh.parameters())
    state = TrainState(model=fresh, optimizer=optimizer, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        if expect is None:
            checkpointer.resume(state, step=step_)
            return fresh, optimizer
        return ranks.expect_error(lambda: checkpointer.load(state), expect)


def _int_states(root):
    _train(root, Counting, 3)
    fresh, optimizer = _resume(root, Counting)
    assert {s["steps"] for s in optimizer.state.values()} == {3}
    assert len(optimizer.state) == sum(p.numel() > 0 for p in fresh.parameters())


def _int_states_elsewhere(root):
    _, optimizer = _resume(root, Counting)
    return sorted({s["steps"] for s in optimizer.state.values()})


def test_states_that_are_numbers_are_joined_over_ranks_that_each_know_some(tmp_path):
    ranks.run(4, _int_states, str(tmp_path))
    assert ranks.run(2, _int_states_elsewhere, str(tmp_path)) == [[3], [3]]


def _blocks(root):
    _, trained = _train(root, Factored, 2)
    fresh, optimizer = _resume(root, Factored)
    for a, b in zip(trained.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(a["blocks"], b["blocks"])
    assert len(optimizer.state) == sum(p.numel() > 0 for p in fresh.parameters())


def _blocks_refused(root):
    return _resume(root, Factored, expect=Mismatch)


def _model_alone(root):
    fresh = Net()
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        return checkpointer.load(TrainState(model=fresh), only=("model",)).loaded


def test_states_that_are_not_elementwise_are_kept_and_not_resharded(tmp_path):
    ranks.run(3, _blocks, str(tmp_path))
    for text in ranks.run(2, _blocks_refused, str(tmp_path)):
        assert "optim.emb.weight.blocks" in text
        assert "cannot be resharded" in text
    assert "model.emb.weight" in ranks.run(1, _model_alone, str(tmp_path))[0]


def _sharded_by(kind):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    return shard(model) if kind == "fsdp1" else fully_shard(model)


def _local(p):
    return p.to_local() if hasattr(p, "to_local") else p


def _low_bit(root, kind, save):
    from torchao.optim import AdamW8bit

    model = _sharded_by(kind)
    optimizer = AdamW8bit(model.parameters(), lr=0.01)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    if not save:
        with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
            return ranks.expect_error(lambda: checkpointer.load(state), Mismatch)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))

    def train():
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, state)
    train()
    wanted = [_local(p).detach().clone() for p in model.parameters()]
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.resume(state)
    train()
    return all(torch.equal(a, _local(b)) for a, b in zip(wanted, model.parameters(), strict=True))


@pytest.mark.parametrize("kind", [pytest.param("fsdp1", marks=pytest.mark.full), "fsdp2"])
def test_blocks_of_8_bit_states_are_kept_where_the_layout_is_unchanged_and_refused_where_it_is_not(tmp_path, kind):
    assert ranks.run(2, _low_bit, str(tmp_path), kind, True) == [True, True]
    assert "optim.0.weight.exp_avg: is not laid out" in ranks.run(3, _low_bit, str(tmp_path), kind, False)[0]
    assert "optim.0.weight.exp_avg: is not laid out" in ranks.run(1, _low_bit_on_one, str(tmp_path))[0]


def _low_bit_on_one(root):
    from torchao.optim import AdamW8bit

    model = nn.Sequential(nn.Linear(128, 128, bias=False))
    state = TrainState(model=model, optimizer=AdamW8bit(model.parameters()), rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        return ranks.expect_error(lambda: checkpointer.load(state), Mismatch)


def _differing_steps(root):
    model = net(use_orig_params=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        return ranks.expect_error(
            lambda: checkpointer.load(TrainState(model=model, optimizer=optimizer, rng=False)), Mismatch
        )


def test_a_flat_parameter_cannot_take_parameters_that_have_made_different_numbers_of_steps(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    optimizer.state[model.inner[0].weight]["step"].fill_(7)
    with Checkpointer(tmp_path, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model, optimizer=optimizer, rng=False))
    assert "use_orig_params=True" in ranks.run(2, _differing_steps, str(tmp_path))[0]


def _gradients():
    model = net()
    state = TrainState(model=model, gradients=True, rng=False)
    state.capture()
    model(torch.arange(4)).sum().backward()
    return ranks.expect_error(state.capture, Unsupported)


def test_accumulated_gradients_are_refused_by_name():
    assert "accumulated gradients of FSDP1" in ranks.run(2, _gradients)[0]


# -- what a rank without elements cannot know ---------------------------------------------------------------------------


class Some(torch.optim.Optimizer):
    """Keeps state for every other parameter only: one rank's guess from its own parameters is wrong for others."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self):
        for group in self.param_groups:
            for i, p in enumerate(group["params"]):
                if i % 2 and p.numel():
                    self.state[p] = {"seen": torch.full_like(p, i), "count": torch.tensor(float(i))}


def _some(root):
    model = net()
    optimizer = Some(model.parameters())
    optimizer.step()
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model, optimizer=optimizer, rng=False))


def _some_elsewhere(root):
    model = net(seed=3)
    optimizer = Some(model.parameters())
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.resume(TrainState(model=model, optimizer=optimizer, rng=False))
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        state = optimizer.state.get(p, {})
        assert bool(state) == bool(i % 2 and p.numel())
        assert not state or bool((state["seen"] == i).all() and state["count"] == i)


@pytest.mark.parametrize(("saved", "wanted"), [(4, 2), (3, 4)])
def test_a_wrong_guess_of_a_rank_without_elements_does_no_harm(tmp_path, saved, wanted):
    ranks.run(saved, _some, str(tmp_path))
    ranks.run(wanted, _some_elsewhere, str(tmp_path))


def _nothing(root):
    model = Net()
    model.nothing = nn.Parameter(torch.zeros(0, 3))
    model.inner = shard(model.inner)
    model = shard(model)
    optimizer = Some(model.parameters())
    optimizer.step()
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.resume(state)


def test_a_parameter_without_elements_is_saved_where_ranks_differ(tmp_path):
    ranks.run(4, _nothing, str(tmp_path))


def _irregular(root):
    import torch.distributed as dist

    group = dist.new_group([0, 1, 3])
    state = TrainState(rng=False)
    if dist.get_rank() != 2:
        model = net(process_group=group)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step(model, optimizer, 0)
        state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, state)
        if dist.get_rank() != 2:
            held = {f: [s.tensor.clone() for s in t.shards] for f, t in state.capture().tensors.items()}
            step(model, optimizer, 1)
        checkpointer.resume(state)
    if dist.get_rank() != 2:
        now = state.capture().tensors
        assert all(torch.equal(a, s.tensor) for f in held for a, s in zip(held[f], now[f].shards, strict=True))


def _whole(root):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.load(TrainState(model=model, optimizer=optimizer, rng=False))
    return len(optimizer.state)


def test_ranks_in_no_regular_order_are_listed(tmp_path):
    ranks.run(4, _irregular, str(tmp_path))
    assert ranks.run(1, _whole, str(tmp_path)) == [5]


def _two_groups(root):
    import torch.distributed as dist

    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = net(process_group=groups[dist.get_rank() % 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, 0)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model, optimizer=optimizer, rng=False))


def test_groups_that_each_shard_the_same_model_are_replicas(tmp_path):
    ranks.run(4, _two_groups, str(tmp_path))
    assert ranks.run(1, _whole, str(tmp_path)) == [5]


# -- every kind of optimizer state that torch names by position ----------------------------------------------------------


def test_torch_s_own_state_dict_with_parameters_named_by_position_is_resumed_from(tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW([{"params": [*model.inner.parameters()]}, {"params": [model.emb.weight], "lr": 0.5}])
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    ranks.run(2, _from_positions, str(tmp_path))
    assert "named by position" in ranks.run(2, _from_positions_into_flat, str(tmp_path))[0]


def _positions(orig):
    model = net(use_orig_params=orig)
    inner = [*model.inner.parameters()]
    rest = [p for p in model.parameters() if not any(p is q for q in inner)]
    optimizer = torch.optim.AdamW([{"params": inner}, {"params": rest}], lr=0.1)
    return model, optimizer


def _from_positions(root):
    model, optimizer = _positions(True)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(f"{root}/run", timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.load(state, source=f"{root}/last.pt")
    assert optimizer.param_groups[1]["lr"] == 0.5
    saved = torch.load(f"{root}/last.pt")
    names = ["inner.0.weight", "inner.0.bias", "inner.2.weight", "inner.2.bias", "emb.weight"]
    for i, name in enumerate(names):
        tensor = state.capture().tensors[f"optim.{name}.exp_avg"]
        for held in tensor.shards:
            whole = saved["optimizer"]["state"][i]["exp_avg"].flatten()
            assert torch.equal(held.tensor, whole[held.region.start : held.region.stop])


def _from_positions_into_flat(root):
    model, optimizer = _positions(False)
    with Checkpointer(f"{root}/run", timeout=20, wait=True) as checkpointer, quiet():
        state = TrainState(model=model, optimizer=optimizer, rng=False)
        return ranks.expect_error(lambda: checkpointer.load(state, source=f"{root}/last.pt"), Mismatch)
