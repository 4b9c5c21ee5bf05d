"""Full state dicts: what torch gathers, in any layout, without its crash and without a second copy."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from torch import nn

from distckpt import Checkpointer, TrainState, full_state_dict
from distckpt.errors import RankFailed, StateWarning, StoreError, Unsupported
from tests import layouts, ranks


def _gather(layout):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    captured = TrainState(model=model, optimizer=optimizer, rng=False).capture()
    layouts.fill(captured)
    before = {f: [s.tensor.clone() for s in t.shards] for f, t in captured.tensors.items()}
    full = full_state_dict(model, optimizer, timeout=20)
    after = TrainState(model=model, optimizer=optimizer, rng=False).capture().tensors
    assert all(torch.equal(a, s.tensor) for f in before for a, s in zip(before[f], after[f].shards, strict=True))
    return full


@pytest.mark.parametrize("layout", ["one", "ddp2", "fsdp3", "tp2fsdp2", "fsdp1x3", "flat2", "hybrid2x2"])
def test_rank_0_has_the_whole_of_everything_and_the_others_nothing(layout):
    full, *others = ranks.run(layouts.ALL[layout], _gather, layout)
    assert not any(others)
    bare = layouts.Net()
    assert not any(bare.load_state_dict(full["model"]))
    for name, tensor in full["model"].items():
        own = "emb.weight" if name == "head.weight" else name
        assert torch.equal(tensor, layouts.expected(f"model.{own}", tensor.shape, tensor.dtype)), name
    assert full["model"]["head.weight"] is full["model"]["emb.weight"] or torch.equal(
        full["model"]["head.weight"], full["model"]["emb.weight"]
    )
    state = full["optim"]["state"]
    assert sum(len(group["params"]) for group in full["optim"]["param_groups"]) == len(state) == 9
    for fqn, states in state.items():
        assert states.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, tensor in states.items():
            assert torch.equal(tensor, layouts.expected(f"optim.{fqn}.{name}", tensor.shape, tensor.dtype))


def _torch_gathers_the_same():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, optimizer = layouts.build("fsdp2")
    layouts.make_moments(model, optimizer)
    layouts.fill(TrainState(model=model, optimizer=optimizer, rng=False).capture())
    options = StateDictOptions(full_state_dict=True)
    wanted = get_model_state_dict(model, options=options)
    moments = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    full = full_state_dict(model, optimizer, timeout=20)
    if full:
        assert {k: v.tolist() for k, v in wanted.items()} == {k: v.tolist() for k, v in full["model"].items()}
        ours = {f: {n: t.tolist() for n, t in s.items()} for f, s in full["optim"]["state"].items()}
        assert ours == {f: {n: t.tolist() for n, t in s.items()} for f, s in moments.items()}
    whole = [full.get("optim")]
    torch.distributed.broadcast_object_list(whole)
    optimizer.state.clear()
    set_optimizer_state_dict(model, optimizer, whole[0], options=options)
    assert not layouts.wrong(TrainState(model=model, optimizer=optimizer, rng=False).capture())


def test_torch_gathers_the_same_and_takes_it_back():
    ranks.run(2, _torch_gathers_the_same)


def _offloading_crashes_there():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model, _ = layouts.build("fsdp1x2")
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def test_torch_s_own_offloading_of_fsdp1_fails_on_the_cpu_where_ours_does_not():
    """If this test fails, torch has mended `FlatParamHandle.to_cpu`: say so in docs, and take the test out."""
    with pytest.raises(ranks.RankError):
        ranks.run(2, _offloading_crashes_there, timeout=30)
    assert ranks.run(2, _gather, "fsdp1x2")[0]


def _stream(file, with_optimizer):
    model, optimizer = layouts.build("fsdp1x2")
    layouts.make_moments(model, optimizer)
    layouts.fill(TrainState(model=model, optimizer=optimizer, rng=False).capture())
    assert full_state_dict(model, optimizer if with_optimizer else None, file=file, timeout=20) == {}


def test_a_file_of_the_model_opens_anywhere_under_the_bare_model_s_names(tmp_path):
    ranks.run(2, _stream, str(tmp_path / "m.safetensors"), False)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(layouts.Net().state_dict()) - {"head.weight"}
        for name in file.keys():  # noqa: SIM118  it cannot be iterated
            tensor = file.get_tensor(name)
            assert torch.equal(tensor, layouts.expected(f"model.{name}", tensor.shape, tensor.dtype))
    model = layouts.Net()
    with Checkpointer(tmp_path / "run", wait=True) as checkpointer, layouts.quiet():
        checkpointer.load(TrainState(model=model, rng=False), source=tmp_path / "m.safetensors")
    assert not layouts.wrong(TrainState(model=model, rng=False).capture())


def test_a_file_with_the_optimizer_is_resumed_from(tmp_path):
    ranks.run(2, _stream, str(tmp_path / "all.safetensors"), True)
    model, optimizer = layouts.build("one")
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(tmp_path / "run", wait=True) as checkpointer, layouts.quiet():
        checkpointer.load(state, source=tmp_path / "all.safetensors")
    captured = state.capture()
    assert not layouts.wrong(captured)
    assert sum(name.endswith(".exp_avg") for name in captured.tensors) == 9


def _unwritable(file):
    model, optimizer = layouts.build("fsdp2")
    return ranks.expect_error(lambda: full_state_dict(model, optimizer, file=file, timeout=20), StoreError)


def test_a_file_that_cannot_be_written_is_told_to_every_rank_at_once(tmp_path):
    (tmp_path / "here").mkdir()
    for text in ranks.run(2, _unwritable, str(tmp_path / "here")):
        assert "rank 0" in text
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def _grown(size_mb):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(size_mb // 4)))
    fully_shard(model)
    full_state_dict(nn.Linear(2, 2), timeout=20)  # what is made once
    before = _peak(reset=True)
    full = full_state_dict(model, timeout=20)
    return (_peak() - before) >> 20, len(full.get("model", ()))


def _peak(*, reset=False):
    """Most resident bytes so far; or, reset, those of now."""
    if reset:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) << 10


def test_no_rank_holds_more_than_one_tensor_beyond_what_was_asked():
    """160 MB in tensors of 4 MB: rank 0 holds them and a few MB more, the other rank a few MB."""
    (first, tensors), (other, _) = ranks.run(2, _grown, 160)
    assert tensors == 40
    assert 160 <= first < 160 + 24
    assert other < 24


class Factored(torch.optim.Optimizer):
    """A state that is not laid out like the parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = torch.zeros(3)


def _own_states():
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(8, 8)
    fully_shard(model)
    return ranks.expect_error(lambda: full_state_dict(model, Factored(model.parameters()), timeout=20), Unsupported)


def test_states_of_one_rank_s_shard_are_refused_by_name():
    assert "optim.@rank0.bias.rows" in ranks.run(2, _own_states)[0]


class Told(nn.Linear):
    """A module that keeps a value of its own, and a tensor, beside its parameters."""

    said = 0

    def get_extra_state(self):
        return {"said": self.said, "tensor": torch.full((2,), float(self.said))}

    def set_extra_state(self, state):
        self.said = state["said"]


def _differing():
    import torch.distributed as dist

    model = nn.parallel.DistributedDataParallel(Told(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + dist.get_rank())
    model.module.said = 5 + dist.get_rank()
    with pytest.warns(StateWarning, match="has the first's") if dist.get_rank() == 0 else nullcontext():
        full = full_state_dict(model, optimizer, timeout=20)
    return full and (full["model"]["_extra_state"], full["optim"]["param_groups"][0]["lr"])


def test_of_what_differs_between_ranks_it_has_rank_0_s():
    (extra, lr), nothing = ranks.run(2, _differing)
    assert (extra["said"], extra["tensor"].tolist(), lr, nothing) == (5, [5.0, 5.0], 1.0, {})


def _different_calls():
    import torch.distributed as dist

    model, optimizer = layouts.build("fsdp1x2")
    layouts.make_moments(model, optimizer)
    given = (model, optimizer) if dist.get_rank() else (model,)
    return ranks.expect_error(lambda: full_state_dict(*given, timeout=20), Unsupported)


def test_a_rank_that_was_given_something_else_fails_on_every_rank_at_once():
    assert all("rank 0 should hold" in said for said in ranks.run(2, _different_calls, timeout=15))


def test_the_full_way_says_what_it_costs(caplog):
    with caplog.at_level(logging.WARNING, "distckpt"):
        full_state_dict(nn.Linear(500, 500))
    assert "rank 0 gathers and holds 0.00 GB; sharded saves gather nothing" in caplog.text


def _dies(killed):
    import os
    import signal

    from torch.distributed.fsdp import fully_shard

    from distckpt.comm import TorchComm
    from distckpt.errors import RanksMissing

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    fully_shard(model)
    comm = TorchComm(5)
    if comm.rank == killed:
        swap = comm.swap

        def die(what, outgoing, incoming):
            if what.endswith("2.weight"):
                os.kill(os.getpid(), signal.SIGKILL)
            swap(what, outgoing, incoming)

        comm.swap = die
    return ranks.expect_error(lambda: full_state_dict(model, comm=comm), (RanksMissing, RankFailed))


def test_a_rank_that_dies_in_it_is_named():
    text = ranks.run(2, _dies, 1, may_die=(1,))[0]
    assert "gathering model.2.weight: rank 1 did not answer" in text
