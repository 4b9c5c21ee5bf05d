from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from distckpt import ElasticSampler
from distckpt.errors import Mismatch


class Job:
    """One life of a training job: a sampler a rank, and what each global batch held."""

    def __init__(self, world_size, saved=None, **options):
        self.samplers = [ElasticSampler(rank=r, world_size=world_size, **options) for r in range(world_size)]
        for sampler in self.samplers:
            if saved is not None:
                sampler.load_state_dict(json.loads(saved))
        self.share = options["global_batch"] // world_size
        self._epoch = None

    def train(self, steps):
        """Global batches of the next steps: (epoch, indices), as the ranks' loaders fetch them."""
        batches = []
        for _ in range(steps):
            if self._epoch != self.samplers[0].epoch:
                self._epoch, self._loaders = self.samplers[0].epoch, [iter(s) for s in self.samplers]
            parts = [list(itertools.islice(loader, self.share)) for loader in self._loaders]
            assert [len(part) for part in parts] == [self.share] * len(parts)
            batches.append((self._epoch, [i for part in parts for i in part]))
            for sampler in self.samplers:
                sampler.advance()
        return batches

    def save(self):
        states = [json.dumps(s.state_dict()) for s in self.samplers]
        assert len(set(states)) == 1
        return states[0]


def order_of(size, epoch, **options):
    """The whole order of an epoch, tail dropped."""
    sampler = ElasticSampler(size, rank=0, world_size=1, **options)
    while sampler.epoch < epoch:
        sampler.advance()
    return list(sampler)


DIVISORS = [1, 2, 3, 4, 6, 12]
lives = st.lists(st.tuples(st.sampled_from(DIVISORS), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=8)


@settings(deadline=None)
@given(size=st.integers(12, 150), seed=st.integers(0, 2**64 - 1), lives=lives, tail=st.sampled_from(["drop", "pad"]))
def test_saves_kills_and_world_sizes_never_change_what_an_epoch_holds(size, seed, lives, tail):
    """Each life trains `kept` steps, saves, trains `lost` more, and is killed."""
    options = {"size": size, "global_batch": 12, "seed": seed, "tail": tail}
    saved, history = None, []
    for world_size, kept, lost in lives:
        job = Job(world_size, saved, **options)
        history += job.train(kept)
        saved = job.save()
        job.train(lost)
    job = Job(1, saved, **options)
    job.train(0)
    while job.samplers[0].consumed:  # to the end of the last epoch
        history += job.train(1)

    assert history == Job(1, **options).train(len(history))
    for epoch in {epoch for epoch, _ in history}:
        seen = [i for e, batch in history if e == epoch for i in batch]
        if tail == "drop":
            assert len(seen) == len(set(seen)) == size // 12 * 12
        else:
            assert set(seen) == set(range(size))
            assert len(seen) == -(-size // 12) * 12
    epochs = job.samplers[0].epoch
    assert job.samplers[0].dropped == (epochs * (size % 12) if tail == "drop" else 0)
    assert job.samplers[0].repeated == (epochs * (-size % 12) if tail == "pad" else 0)


@settings(deadline=None)
@given(
    size=st.integers(24, 150),
    lives=st.lists(st.tuples(st.sampled_from([4, 6, 12, 24]), st.integers(0, 9)), min_size=1, max_size=8),
    tail=st.sampled_from(["drop", "pad"]),
)
def test_a_changed_global_batch_repeats_and_skips_nothing_but_the_counted_tail(size, lives, tail):
    saved, history = None, []
    for global_batch, steps in lives:
        job = Job(2, saved, size=size, global_batch=global_batch, tail=tail)
        history += job.train(steps)
        saved = job.save()
    sampler = job.samplers[0]
    seen = [i for _, batch in history for i in batch]
    assert len(seen) + sampler.dropped - sampler.repeated == sampler.epoch * size + sampler.consumed
    for epoch in range(sampler.epoch):
        inside = [i for e, batch in history if e == epoch for i in batch]
        assert tail == "pad" or len(inside) == len(set(inside))
        assert tail == "drop" or set(inside) == set(range(size))


@pytest.mark.parametrize("world_size", DIVISORS)
def test_the_order_of_global_batches_is_the_same_for_every_world_size(world_size):
    options = {"size": 100, "global_batch": 12, "seed": 5}
    assert Job(world_size, **options).train(20) == Job(1, **options).train(20)


def test_the_order_is_that_of_numpys_frozen_stream():
    assert order_of(10, 3, global_batch=1, seed=7) == [2, 7, 1, 4, 5, 0, 6, 3, 8, 9]
    assert order_of(10, 0, global_batch=1, seed=2**40 + 7)[:4] == [2, 1, 9, 6]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(order_of(50, epoch, global_batch=1, seed=seed)) for epoch in (0, 1) for seed in (0, 1, 2**32)]
    assert len(set(orders)) == 6


def test_without_shuffle_samples_come_as_they_lie():
    assert order_of(10, 1, global_batch=3, shuffle=False) == list(range(9))


def test_a_data_set_smaller_than_a_padded_batch_goes_round():
    sampler = ElasticSampler(3, global_batch=8, rank=1, world_size=2, tail="pad", shuffle=False)
    assert list(sampler) == [1, 2, 0, 1]
    sampler.advance()
    assert (sampler.epoch, sampler.consumed, sampler.repeated) == (1, 0, 5)


def test_length_is_what_is_left_for_this_rank():
    sampler = ElasticSampler(range(29), global_batch=8, rank=0, world_size=2)
    lengths = []
    for _ in range(4):
        assert len(sampler) == len(list(sampler))
        lengths.append(len(sampler))
        sampler.advance()
    assert lengths == [12, 8, 4, 12]
    assert sampler.dropped == 5
    assert len(ElasticSampler(29, global_batch=8, rank=0, world_size=2, tail="pad")) == 16


def test_an_iterator_is_a_snapshot_of_the_position():
    sampler = ElasticSampler(24, global_batch=6, rank=0, world_size=1)
    whole = list(sampler)
    iterator = iter(sampler)
    first = next(iterator)
    for _ in range(5):  # past the end of the epoch
        sampler.advance()
    assert [first, *iterator] == whole
    assert sampler.epoch == 1
    assert list(sampler) != whole[6:]


class Squares(Dataset):
    def __len__(self):
        return 41

    def __getitem__(self, i):
        return torch.tensor([i, i * i])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_fetches_ahead_loses_nothing_when_killed(workers):
    seen, saved = [], None
    for world_size in (2, 4, 1):
        samplers = [ElasticSampler(Squares(), global_batch=8, rank=r, world_size=world_size) for r in range(world_size)]
        loaders = []
        for sampler in samplers:
            if saved:
                sampler.load_state_dict(saved)
            ahead = {"prefetch_factor": 3} if workers else {}
            loaders.append(DataLoader(Squares(), 8 // world_size, sampler=sampler, num_workers=workers, **ahead))
        for step, parts in enumerate(zip(*loaders, strict=True)):
            seen += [int(i) for part in parts for i in part[:, 0]]
            for sampler in samplers:
                sampler.advance()
            saved = samplers[0].state_dict()
            if world_size > 1 and step == 1:
                break  # killed, with batches fetched that no step has consumed
    assert seen == order_of(41, 0, global_batch=8)
    assert (saved["epoch"], saved["consumed"], saved["dropped"]) == (1, 0, 1)


def test_a_large_data_set_costs_four_bytes_a_sample():
    sampler = ElasticSampler(10**6, global_batch=100, rank=0, world_size=1)
    next(iter(sampler))
    order = sampler._order[1]
    assert (order.dtype, order.nbytes) == (np.int32, 4 * 10**6)


def test_the_ranks_of_one_process_without_torch_distributed_are_one():
    sampler = ElasticSampler(10, global_batch=2)
    assert (sampler.rank, sampler.world_size) == (0, 1)


def test_the_saved_seed_is_adopted():
    saved = ElasticSampler(50, global_batch=5, seed=3, rank=0, world_size=1)
    other = ElasticSampler(50, global_batch=5, seed=4, rank=0, world_size=1)
    other.load_state_dict(saved.state_dict())
    assert list(other) == list(saved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 5}, "world sizes that work: 1, 2, 3, 4, 6, 12"),
        ({"rank": 4}, "rank 4 is not among the 4 ranks"),
        ({"rank": None}, "give rank and world_size together"),
        ({"size": 11}, "fewer than one global batch of 12"),
        ({"size": 0}, "must be positive"),
        ({"global_batch": 0}, "must be positive"),
        ({"seed": -1}, "seed must be in"),
        ({"tail": "keep"}, "tail is 'drop' or 'pad', not 'keep'"),
    ],
)
def test_numbers_that_cannot_work_are_refused(options, message):
    good = {"size": 100, "global_batch": 12, "rank": 0, "world_size": 4}
    ElasticSampler(**good)
    with pytest.raises(ValueError, match=message):
        ElasticSampler(**(good | options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 101}, "size: expected 100, found 101"),
        ({"shuffle": False}, "shuffle: expected True, found False"),
        ({"tail": "pad"}, "tail: expected 'drop', found 'pad'"),
        ({"version": 2}, "version: expected 1, found 2"),
        ({"consumed": -12}, "consumed: expected a count of at most 99, found -12"),
        ({"epoch": "1"}, "epoch: expected a count of at most 4294967295, found '1'"),
        ({"dropped": None}, "dropped: expected a count, found None"),
        ({"consumed": 100}, "consumed: expected a count of at most 99, found 100"),
    ],
)
def test_a_position_that_means_something_else_is_refused_and_changes_nothing(change, message):
    sampler = ElasticSampler(100, global_batch=12, seed=1, rank=0, world_size=4)
    sampler.advance()
    before = sampler.state_dict()
    with pytest.raises(Mismatch, match=message):
        sampler.load_state_dict(before | {"seed": 2, "epoch": 3} | change)
    assert sampler.state_dict() == before
    with pytest.raises(Mismatch, match="repeated: expected a count, found None"):
        sampler.load_state_dict({})
