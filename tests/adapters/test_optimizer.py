"""Optimizer state of any torch optimizer: saved by fqn, made where it is lazy, and training goes on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.errors import Mismatch, StateWarning, Unsupported
from tests import ranks

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw_tensor_lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rprop": lambda p: torch.optim.Rprop(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3, history_size=3),
}


def make(name, *, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    model[0].bias.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = trained if name == "lbfgs" else [{"params": trained[:1], "weight_decay": 0.0}, {"params": trained[1:]}]
    return model, OPTIMIZERS[name](groups)


def train(model, optimizer, steps, *, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x = torch.randn(6, 12, generator=generator)

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure).detach()))
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_bit_for_bit_into_a_fresh_optimizer(tmp_path, name):
    model, optimizer = make(name)
    train(model, optimizer, 3, seed=1)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(3, TrainState(model=model, optimizer=optimizer))
        expected = train(model, optimizer, 3, seed=2)
        fresh_model, fresh = make(name, seed=9)
        c.load(TrainState(model=fresh_model, optimizer=fresh))
        assert train(fresh_model, fresh, 3, seed=2) == expected
    for p, q in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["adam", "adamw_fused", "sgd_momentum", "lbfgs"])
def test_state_of_a_used_optimizer_is_replaced_in_place(tmp_path, name):
    model, optimizer = make(name)
    train(model, optimizer, 2, seed=1)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(2, TrainState(model=model, optimizer=optimizer))
        expected = train(model, optimizer, 2, seed=2)
        moments = {id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
        c.load(TrainState(model=model, optimizer=optimizer))
        assert train(model, optimizer, 2, seed=2) == expected
    after = {id(t) for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)}
    assert name == "lbfgs" or after == moments


def test_a_parameter_that_was_never_stepped_has_no_state_after_the_load(tmp_path):
    model, optimizer = make("adam")
    model[2].bias.grad = None
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model, optimizer=optimizer))
        other, stepped = make("adam", seed=4)
        train(other, stepped, 2, seed=1)
        c.load(TrainState(model=other, optimizer=stepped))
    assert set(stepped.state) == {other[2].weight}
    assert stepped.state[other[2].weight]["step"] == 1


def test_sparse_gradients_and_their_optimizer_go_on_bit_for_bit(tmp_path):
    def make_one():
        torch.manual_seed(0)
        table = nn.Embedding(50, 4, sparse=True)
        return table, torch.optim.SparseAdam(table.parameters(), lr=0.1)

    def steps(table, optimizer, rows):
        for row in rows:
            optimizer.zero_grad()
            table(torch.tensor([row, row + 1])).square().sum().backward()
            optimizer.step()

    table, optimizer = make_one()
    steps(table, optimizer, [3, 7])
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(2, TrainState(model=table, optimizer=optimizer))
        fresh_table, fresh = make_one()
        c.load(TrainState(model=fresh_table, optimizer=fresh))
    steps(table, optimizer, [7, 20])
    steps(fresh_table, fresh, [7, 20])
    assert torch.equal(table.weight, fresh_table.weight)


def test_states_in_the_dtype_of_their_parameter_follow_it(tmp_path):
    """As torch's load_state_dict has it; a state in a dtype of its own keeps that."""
    model, optimizer = make("adam")
    train(model.bfloat16(), optimizer, 0, seed=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.state[model[2].bias]["exp_avg"] = torch.full((5,), 0.1)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model, optimizer=optimizer))
        wide, fresh = make("adam", seed=4)
        with pytest.warns(StateWarning, match="precision"):
            c.load(TrainState(model=wide, optimizer=fresh))
        train(wide, fresh, 1, seed=1)
        c.save(2, TrainState(model=wide, optimizer=fresh))
        narrow, other = make("adam", seed=5)
        state = TrainState(model=narrow.bfloat16(), optimizer=other)
        with pytest.raises(Mismatch, match=r"optim\.2\.weight\.exp_avg: saved as float32"):
            c.load(state)
        with pytest.warns(StateWarning, match="precision"):
            c.load(state, cast=True)
    assert fresh.state[wide[0].weight]["exp_avg_sq"].dtype == torch.float32
    assert {v.dtype for v in other.state[narrow[0].weight].values() if v.dim()} == {torch.bfloat16}


def test_asking_for_state_never_steps_the_optimizer(tmp_path):
    model, optimizer = make("adam")
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(0, TrainState(model=model, optimizer=optimizer))
        assert not optimizer.state
        c.load(TrainState(model=model, optimizer=optimizer))
    assert not optimizer.state


def test_groups_are_matched_by_fqn_whatever_their_order(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    saved = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters(), "lr": 0.2}]
    )
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(0, TrainState(model=model, optimizer=saved))
        swapped = torch.optim.SGD(
            [{"params": model[1].parameters()}, {"params": [model[0].bias]}, {"params": [model[0].weight]}], lr=9.0
        )
        c.load(TrainState(model=model, optimizer=swapped))
    assert [g["lr"] for g in swapped.param_groups] == [0.2, 0.1, 0.1]


def test_groups_that_cannot_be_matched_are_refused_with_every_problem(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    saved = torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": [model[1].weight], "lr": 0.2}])
    joined = torch.optim.SGD([{"params": [*model[0].parameters(), model[1].weight]}, {"params": [model[1].bias]}], lr=1)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(0, TrainState(model=model, optimizer=saved))
        text = ranks.expect_error(lambda: c.load(TrainState(model=model, optimizer=joined)), Mismatch)
    assert "group 0 joins parameters of 2 saved groups that differ" in text
    assert "did not have 1.bias (group 1)" in text


def test_state_of_another_kind_of_optimizer_is_refused_and_of_a_near_one_taken(tmp_path):
    model = nn.Linear(3, 2)
    made = {kind: kind(model.parameters(), lr=0.1) for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)}
    for step, optimizer in enumerate(made.values()):
        Checkpointer(tmp_path / str(step), wait=True).save(1, TrainState(model=model, optimizer=optimizer))
    with pytest.raises(Mismatch, match=r"saved from SGD, which has no .*betas.*: AdamW cannot go on"):
        Checkpointer(tmp_path / "0", wait=True).load(TrainState(model=model, optimizer=made[torch.optim.AdamW]))
    with pytest.raises(Mismatch, match=r"saved from Adam, which has no .*momentum.*: SGD cannot go on"):
        Checkpointer(tmp_path / "1", wait=True).load(TrainState(model=model, optimizer=made[torch.optim.SGD]))
    report = Checkpointer(tmp_path / "1", wait=True).load(TrainState(model=model, optimizer=made[torch.optim.AdamW]))
    assert "optim: saved from Adam, loaded into AdamW" in report.notes


def test_a_parameter_of_no_model_is_refused_with_its_place():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(7))], lr=1)
    text = ranks.expect_error(TrainState(model=model, optimizer=optimizer).capture, Unsupported)
    assert "parameter 2 of group 0, shape (7,)" in text


def test_several_models_and_optimizers_have_one_more_name_in_front(tmp_path):
    nets = {"gen": nn.Linear(4, 4), "disc": nn.Linear(4, 1)}
    optimizers = {n: torch.optim.Adam(m.parameters(), lr=0.1) for n, m in nets.items()}
    nets["disc"](nets["gen"](torch.ones(2, 4))).sum().backward()
    for o in optimizers.values():
        o.step()
    state = TrainState(model=nets, optimizer=optimizers)
    names = set(state.capture().tensors)
    assert {"model.gen.weight", "model.disc.bias", "optim.gen.gen.weight.exp_avg", "optim.disc.disc.bias.step"} <= names
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state)
        again = {"gen": nn.Linear(4, 4), "disc": nn.Linear(4, 1)}
        fresh = {n: torch.optim.Adam(m.parameters(), lr=0.5) for n, m in again.items()}
        c.load(TrainState(model=again, optimizer=fresh))
    assert torch.equal(
        fresh["gen"].state[again["gen"].weight]["exp_avg"], optimizers["gen"].state[nets["gen"].weight]["exp_avg"]
    )
    assert fresh["disc"].param_groups[0]["lr"] == 0.1


def _low_bit(name):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.optim as low

    return getattr(low, name)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
@pytest.mark.filterwarnings("ignore")
def test_torchao_low_bit_states_come_back_bit_for_bit(tmp_path, name):
    kind = _low_bit(name)

    def make_one():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
        return model, kind(model.parameters(), lr=1e-2)

    def steps(model, optimizer, n, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(n):
            optimizer.zero_grad()
            model(torch.randn(4, 64, generator=generator)).square().mean().backward()
            optimizer.step()

    model, optimizer = make_one()
    steps(model, optimizer, 2, 1)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(2, TrainState(model=model, optimizer=optimizer))
        fresh_model, fresh = make_one()
        c.load(TrainState(model=fresh_model, optimizer=fresh))
    steps(model, optimizer, 2, 2)
    steps(fresh_model, fresh, 2, 2)
    for p, q in zip(model.parameters(), fresh_model.parameters(), strict=True):
        assert torch.equal(p, q)
    first = fresh.state[fresh_model[0].weight]["exp_avg"]
    assert type(first) is type(optimizer.state[model[0].weight]["exp_avg"])


@pytest.mark.filterwarnings("ignore")
def test_a_state_class_of_another_package_is_never_made(tmp_path):
    """A checkpoint picks no code: the class of a flattened state must be the optimizer's own package's."""
    kind = _low_bit("AdamW8bit")
    model = nn.Linear(64, 128)
    optimizer = kind(model.parameters(), lr=1e-2)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model, optimizer=optimizer))
        plain = torch.optim.AdamW(model.parameters())
        text = ranks.expect_error(lambda: c.load(TrainState(model=model, optimizer=plain)), Mismatch)
    assert "use the optimizer it was saved from" in text


def _sharded_optimizers(root):
    """Under FSDP2 on 3 ranks: save, go on; load into a fresh one, go on: the same bits."""
    wrong = []
    for name in ("adam_amsgrad", "sgd_momentum", "adagrad", "adamw_fused"):

        def make_one():
            model, _ = make("adam")
            model = _shard(model)
            return model, OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])

        model, optimizer = make_one()
        train(model, optimizer, 2, seed=1)
        with Checkpointer(f"{root}/{name}", timeout=20, wait=True) as c:
            c.save(2, TrainState(model=model, optimizer=optimizer))
            fresh_model, fresh = make_one()
            c.load(TrainState(model=fresh_model, optimizer=fresh))
        train(model, optimizer, 2, seed=2)
        train(fresh_model, fresh, 2, seed=2)
        for (n, p), (_, q) in zip(model.named_parameters(), fresh_model.named_parameters(), strict=True):
            wrong += [f"{name}: {n}"] * (not torch.equal(p._local_tensor, q._local_tensor))
    return wrong


def _shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (3,)))


def test_every_sharded_optimizer_goes_on_bit_for_bit(tmp_path):
    assert ranks.run(3, _sharded_optimizers, str(tmp_path)) == [[], [], []]


@pytest.mark.parametrize("saved_as_int", [True, False])
def test_a_step_counted_in_an_int_and_one_in_a_tensor_go_on_from_each_other(tmp_path, saved_as_int):
    """DeepSpeed's own optimizers, which need a compiler, count in an int: this one stands for them."""

    class FusedAdam(torch.optim.AdamW):
        pass

    FusedAdam.__module__ = "deepspeed.ops.adam.fused_adam"
    model = nn.Linear(3, 2)
    kinds = (FusedAdam, torch.optim.AdamW) if saved_as_int else (torch.optim.AdamW, FusedAdam)
    was, now = (kind(model.parameters()) for kind in kinds)
    model(torch.ones(1, 3)).sum().backward()
    was.step()
    if saved_as_int:
        for state in was.state.values():
            state["step"] = 1
    with Checkpointer(tmp_path, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model, optimizer=was))
        report = checkpointer.load(TrainState(model=model, optimizer=now))
    assert {type(s["step"]) for s in now.state.values()} == {torch.Tensor if saved_as_int else int}
    assert all(s["step"] == 1 for s in now.state.values())
    assert any("saved from" in note for note in report.notes)
    if saved_as_int:
        now.step()
