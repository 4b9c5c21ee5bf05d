"""Experts of DeepSpeed's MoE layers: each rank has some, saved under the numbers they have in the whole layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import TrainState
from distckpt.errors import Unsupported
from tests import deepspeeds, ranks
from tests.adapters.engines import assert_equal, captured, held, joined, resumed, saved, train

EXPERT = "model.moe.deepspeed_moe.experts.deepspeed_experts"


class Expert(nn.Sequential):
    """With a buffer."""

    def __init__(self):
        super().__init__(nn.Linear(8, 11), nn.GELU(), nn.Linear(11, 8))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        self.seen += 1
        return super().forward(x)


class Net(nn.Module):
    """Four experts, and capacity for every token: what it computes is the same however they are shared out."""

    def __init__(self, ep_size):
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.moe = MoE(8, Expert(), 4, ep_size, capacity_factor=4.0, eval_capacity_factor=4.0, use_rts=False)
        self.head = nn.Linear(8, 13)

    def forward(self, x):
        return self.head(self.moe(self.emb(x))[0]).float()


def made(ep_size, stage, dtype="fp32", *, seed=0, **options):
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    deepspeeds.joined()
    torch.manual_seed(seed)
    model = Net(ep_size)
    groups = [g | {"name": f"dense {i}"} for i, g in enumerate(deepspeeds.groups(model))]
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(groups))
    return deepspeeds.engine(model, optimizer, stage, dtype, **options)


def _resumes_bit_for_bit(root, cases):
    for i, (ep_size, stage, dtype, options) in enumerate(cases):
        engine = made(ep_size, stage, dtype, **options)
        train(engine, 0, 2)
        saved(f"{root}/{i}", engine)
        wanted = held(TrainState(model=engine))
        losses = train(engine, 2, 4)
        fresh = made(ep_size, stage, dtype, seed=9, **options)
        resumed(f"{root}/{i}", fresh)
        assert_equal(wanted, held(TrainState(model=fresh)))
        assert train(fresh, 2, 4) == losses, (ep_size, stage, dtype)
        resumed(f"{root}/{i}", engine)  # and where training has gone on, into the state that it has
        assert train(engine, 2, 4) == losses, (ep_size, stage, dtype)


ODD = {"zero": {"round_robin_gradients": True, "parameter_alignment": True}}
CASES = {
    "2 ranks": (2, [(1, 1, "bf16", {}), (2, 2, "fp32", {}), (2, 0, "fp32", {})]),
    "4 ranks": (4, [(2, 1, "fp32", {}), (2, 2, "bf16", ODD)]),
}


@pytest.mark.parametrize("name", CASES)
def test_experts_resumed_with_the_same_setup_are_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    size, cases = CASES[name]
    deepspeeds.run(size, _resumes_bit_for_bit, str(tmp_path), cases)


def _save(root):
    engine = made(2, 2)
    train(engine, 0, 2)
    saved(root, engine)
    groups = TrainState(model=engine).capture().objects["optim"].value["groups"]
    return captured(engine), train(engine, 2, 3), [sorted(group.keys() - {"params"}) for group in groups]


def _load(root, ep_size, stage):
    engine = made(ep_size, stage, seed=7)
    names = [group["name"] for group in engine.optimizer.param_groups]
    resumed(root, engine)
    assert [group["name"] for group in engine.optimizer.param_groups] == names
    return captured(engine), train(engine, 2, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def told(root):
    return deepspeeds.run(4, _save, str(root))


@pytest.mark.parametrize(("size", "ep_size", "stage"), [(2, 2, 1), (2, 1, 2), (4, 4, 1), (3, 1, 0)])
def test_they_go_on_over_other_ranks_and_other_shares_of_experts(root, told, size, ep_size, stage):
    whole = joined(held for held, _, _ in told)
    assert all(f"{EXPERT}.{i}.seen" in whole for i in range(4))
    experts = [whole[f"{EXPERT}.{i}.0.weight"] for i in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(experts) for b in experts[:i])
    assert not any({"moe", "name"} & {*keys} for keys in told[0][2])
    others = deepspeeds.run(size, _load, str(root), ep_size, stage)
    found = joined(held for held, _ in others)
    assert found.keys() == whole.keys()
    assert all(torch.equal(t, whole[f]) for f, t in found.items())
    assert others[0][1] == pytest.approx(told[0][1], rel=1e-6)


def _refused():
    engine = made(2, 1)
    engine.num_experts.append(4)  # as AutoEP does for its own layers, which are no MOELayer
    return str(ranks.expect_error(lambda: TrainState(model=engine).capture(), Unsupported))


def test_experts_that_deepspeed_put_in_are_refused():
    assert "AutoEP" in deepspeeds.run(2, _refused)[0]
