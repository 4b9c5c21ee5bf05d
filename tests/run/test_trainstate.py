"""Everything that a training job must not lose comes back: schedulers, scaler, generators, positions, gradients, extras."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from distckpt import Checkpointer, Progress, TrainState
from distckpt.errors import Mismatch, StateWarning, Unsupported
from tests import layouts, ranks


class Box:
    """A value with a state_dict, as users write them."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(())), torch.randn(3).tolist()


def test_generators_of_python_numpy_and_torch_go_on_where_they_were(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState())
        expected = [draw() for _ in range(3)]
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        c.load(TrainState())
        assert [draw() for _ in range(3)] == expected


def test_generators_are_left_alone_when_not_asked_for(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState())
        torch.manual_seed(5)
        expected = float(torch.rand(()))
        torch.manual_seed(5)
        c.load(TrainState(rng=False))
        assert float(torch.rand(())) == expected


def _draw_after(root, save):
    import torch.distributed as dist

    rank = dist.get_rank() if dist.is_initialized() else 0
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    with Checkpointer(root, timeout=20, wait=True) as c:
        if save:
            c.save(1, TrainState())
            return draw()
        with layouts.quiet():
            report = c.load(TrainState())
        return draw(), report.notes


def test_each_rank_has_generators_of_its_own(tmp_path):
    expected = ranks.run(2, _draw_after, str(tmp_path), True)
    assert expected[0] != expected[1]
    assert [drawn for drawn, _ in ranks.run(2, _draw_after, str(tmp_path), False)] == expected


def test_at_another_world_size_generators_are_derived_alike_each_time_and_reported(tmp_path):
    saved = ranks.run(2, _draw_after, str(tmp_path), True)
    first, again = (ranks.run(3, _draw_after, str(tmp_path), False) for _ in range(2))
    assert first == again
    drawn = [d for d, _ in first]
    assert len({str(d) for d in [*drawn, *saved]}) == 5
    assert all("rng: derived for 3 ranks from the states of 2" in notes for _, notes in first)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 / (1 + s)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
    ],
)
def test_learning_rates_go_on(tmp_path, make):
    def fresh():
        optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
        return optimizer, make(optimizer)

    def rates(optimizer, scheduler, n):
        found = []
        for _ in range(n):
            optimizer.step()
            scheduler.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = make(optimizer)
    rates(optimizer, scheduler, 4)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(4, TrainState(model=model, optimizer=optimizer, lr_scheduler=scheduler))
        expected = rates(optimizer, scheduler, 5)
        again = torch.optim.SGD(model.parameters(), lr=0.1)
        other = make(again)
        c.load(TrainState(model=model, optimizer=again, lr_scheduler=other))
        again.step()  # the scheduler warns when it is stepped before the optimizer ever was
        assert rates(again, other, 5) == expected


def test_scaler_progress_and_extras_with_tensors_come_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    progress = Progress(global_step=7, epoch=2, samples_seen=900)
    nested = {
        1: torch.arange(5), "deep": [{"w": torch.ones(2, 2, dtype=torch.bfloat16)}, (3, {4})],
        "array": np.array([[1.5, 2.5]]), "scalar": np.array(3), 1.5: None, "1": torch.zeros(1),
    }  # fmt: skip
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(7, TrainState(scaler=scaler, progress=progress, ema=Box(nested)))
        other, counters, box = torch.amp.GradScaler("cpu"), Progress(), Box(None)
        c.load(TrainState(scaler=other, progress=counters, ema=box))
    assert other.state_dict() == scaler.state_dict()
    assert counters == progress
    found = box.state
    assert torch.equal(found[1], nested[1])
    assert torch.equal(found["1"], nested["1"])
    assert torch.equal(found["deep"][0]["w"], nested["deep"][0]["w"])
    assert found["deep"][1] == (3, {4})
    assert found["array"].tolist() == [[1.5, 2.5]]
    assert found["scalar"].shape == ()
    assert list(found) == list(nested)


def test_a_part_without_state_dict_is_refused_by_name():
    with pytest.raises(Unsupported, match="trainer_state: a int has no state_dict"):
        TrainState(progress=3)
    with pytest.raises(Unsupported, match="ema: 'a/b' cannot be a name"):
        TrainState(ema={"a/b": Box(1)})


@pytest.mark.parametrize("name", ["optim", "grad", "environment", "trainer_state", "ack-00000", "a/b", "é", "x" * 101])
def test_an_extra_value_cannot_take_the_name_of_another_part_or_of_a_file(name):
    with pytest.raises(Unsupported, match=r"give the extra value another|cannot be a name"):
        TrainState(optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters()), **{name: Box({})})


def test_a_model_or_an_optimizer_that_is_none_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"model: a list; an nn.Module"):
        TrainState(model=[nn.Linear(2, 2)])
    with pytest.raises(Unsupported, match=r"optim.gen: a Linear; an Optimizer"):
        TrainState(optimizer={"gen": nn.Linear(2, 2)})


def test_objects_that_are_missing_or_unexpected_are_named(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(one=Box(1), two=Box(2)))
        text = ranks.expect_error(lambda: c.load(TrainState(one=Box(1), three=Box(3))), Mismatch)
    assert "three: missing from the checkpoint" in text
    assert "two: in the checkpoint, but not in the state" in text


def test_a_changed_environment_is_warned_of(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(config={"lr": 1}, code_version="abc", tokenizer="byte"))
        with pytest.warns(StateWarning) as seen:
            report = c.load(TrainState(config={"lr": 2}, code_version="abc", tokenizer="bpe"))
    texts = sorted(str(w.message) for w in seen)
    assert len(texts) == 2
    assert "config: was {'lr': 1}, is {'lr': 2}" in texts[0]
    assert "tokenizer" in texts[1]
    assert any("config" in note for note in report.notes)


def test_a_tokenizer_is_compared_by_its_vocabulary(tmp_path):
    class Tokenizer:
        name_or_path = "mine"

        def __init__(self, vocabulary):
            self.get_vocab = lambda: vocabulary

    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(tokenizer=Tokenizer({"a": 0})))
        c.load(TrainState(tokenizer=Tokenizer({"a": 0})))
        with pytest.warns(StateWarning, match="tokenizer"):
            c.load(TrainState(tokenizer=Tokenizer({"a": 1})))


class Extra(nn.Module):
    """A module with extra state, as FP8 layers have."""

    def __init__(self, value=None):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.value = value

    def get_extra_state(self):
        return {"amax": self.value, "history": torch.ones(3) * 2}

    def set_extra_state(self, state):
        self.value = state["amax"]
        self.history = state["history"]


def test_extra_state_of_modules_comes_back(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=nn.Sequential(Extra(3.5), nn.Linear(2, 2))))
        model = nn.Sequential(Extra(), nn.Linear(2, 2))
        c.load(TrainState(model=model))
        assert model[0].value == 3.5
        assert model[0].history.tolist() == [2, 2, 2]
        text = ranks.expect_error(lambda: c.load(TrainState(model=nn.Sequential(nn.Linear(2, 2)))), Mismatch)
    assert "extra state of modules that the model has not: ['0']" in text


def _gradients(root, load):
    """DDP with no_sync: each rank has gradients of its own."""
    import torch.distributed as dist

    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    state = TrainState(model=model, gradients=True)
    with Checkpointer(root, timeout=20, wait=True) as c:
        if load:
            c.load(state)
        else:
            with model.no_sync():
                model(torch.full((1, 3), float(1 + dist.get_rank()))).sum().backward()
            c.save(1, state)
    return [p.grad.tolist() for p in model.parameters()]


def test_accumulated_gradients_come_back_on_the_rank_that_had_them(tmp_path):
    saved = ranks.run(2, _gradients, str(tmp_path), False)
    assert saved[0] != saved[1]
    assert ranks.run(2, _gradients, str(tmp_path), True) == saved


def _value_of_one_rank(root):
    """A value that rank 0 alone has, as some keep their bookkeeping."""
    import torch.distributed as dist

    own = {"v": Box({"n": 5})} if dist.get_rank() == 0 else {}
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(1, TrainState(**own))
        for box in own.values():
            box.state = None
        c.load(TrainState(**own))
        return [box.state for box in own.values()]


def test_a_value_that_one_rank_alone_has_comes_back_there(tmp_path):
    assert ranks.run(2, _value_of_one_rank, str(tmp_path)) == [[{"n": 5}], []]


def test_a_choice_for_per_rank_values_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'first' is the only choice"):
        Checkpointer(tmp_path, wait=True).load(TrainState(), per_rank={"v": "last"})


def _gradients_refused(root):
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    with Checkpointer(root, timeout=20, wait=True) as c:
        return ranks.expect_error(lambda: c.load(TrainState(model=model, gradients=True)), Mismatch)


def test_gradients_of_each_ranks_own_are_refused_at_another_world_size(tmp_path):
    ranks.run(2, _gradients, str(tmp_path), False)
    for text in ranks.run(3, _gradients_refused, str(tmp_path)):
        assert "grad" in text
        assert "each of the 2 ranks had values of its own" in text


def _unreduced(root):
    """FSDP2 that accumulates without reducing: the gradients are not in `p.grad`."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(model[0])
    fully_shard(model)
    state = TrainState(model=model, gradients=True)
    with Checkpointer(root, timeout=20, wait=True) as c:
        model.set_requires_gradient_sync(False)
        model(torch.ones(1, 3)).sum().backward()
        text = ranks.expect_error(lambda: c.save(1, state), Unsupported)
        model.set_requires_gradient_sync(True)
        model(torch.ones(1, 3)).sum().backward()
        expected = [p.grad.full_tensor() for p in model.parameters()]
        c.save(2, state)
        model.zero_grad()
        c.load(state)
        return text, all(
            torch.equal(p.grad.full_tensor(), e) for p, e in zip(model.parameters(), expected, strict=True)
        )


def test_gradients_that_fsdp_has_not_reduced_are_refused_and_not_lost_unsaid(tmp_path):
    for text, same in ranks.run(2, _unreduced, str(tmp_path)):
        assert "FSDP holds a gradient that it has not reduced" in text
        assert same


def _loader(root, action, workers):
    import warnings

    warnings.simplefilter("ignore")
    from torch.utils.data.distributed import DistributedSampler
    from torchdata.stateful_dataloader import StatefulDataLoader

    from distckpt.comm import current

    place = current()
    sampler = DistributedSampler(range(60), place.world_size, place.rank, shuffle=False)
    loader = StatefulDataLoader(list(range(60)), batch_size=2, sampler=sampler, num_workers=workers)
    with Checkpointer(root, timeout=30, wait=True) as c:
        if action == "save":
            batches = iter(loader)
            taken = [next(batches).tolist() for _ in range(3)]
            c.save(1, TrainState(dataloader=loader))
            return taken, [b.tolist() for b in batches]
        if action == "refused":
            return ranks.expect_error(lambda: c.load(TrainState(dataloader=loader)), Mismatch)
        c.load(TrainState(dataloader=loader), per_rank={"dataloader": "first"})
        return [b.tolist() for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_goes_on_where_each_rank_was(tmp_path, workers):
    saved = ranks.run(2, _loader, str(tmp_path), "save", workers)
    assert ranks.run(2, _loader, str(tmp_path), "load", workers) == [rest for _, rest in saved]


def test_a_stateful_dataloader_is_refused_at_another_world_size_with_the_numbers(tmp_path):
    ranks.run(2, _loader, str(tmp_path), "save", 0)
    assert (
        "6 samples beyond the 12 already consumed would be skipped"
        in ranks.run(3, _loader, str(tmp_path), "refused", 0)[0]
    )
    assert "6 of the 12 samples already consumed would repeat" in ranks.run(1, _loader, str(tmp_path), "refused", 0)[0]
    assert len(ranks.run(1, _loader, str(tmp_path), "load", 0)[0]) == 27


def test_every_part_says_at_once_what_does_not_fit_and_nothing_changes(tmp_path):
    from distckpt import ElasticSampler

    def parts(width, size):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(width)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sampler = ElasticSampler(size, global_batch=2, rank=0, world_size=1)
        return model, TrainState(model=model, optimizer=optimizer, sampler=sampler, progress=Progress())

    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, parts(1, 10)[1])
        model, state = parts(2, 20)
        before = [p.detach().clone() for p in model.parameters()]
        text = ranks.expect_error(lambda: c.load(state), Mismatch)
        c.save(2, state)
    assert "model.1.weight: missing from the checkpoint" in text
    assert "optim: the saved optimizer did not have 1.weight, 1.bias (group 0)" in text
    assert "size: expected 20, found 10" in text
    assert "unexpected" not in text
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
