"""distckpt.save and distckpt.load on real ranks: sharded tensors, and what differs between ranks."""

from __future__ import annotations

import torch

import distckpt
from distckpt.errors import Mismatch, Unsupported
from tests import layouts, ranks


def _fsdp(root, world):
    """Model and optimizer as objects, saved by 2 ranks and loaded by `world` into an optimizer without any state."""
    model, optimizer = layouts.build(f"fsdp{world}" if world > 1 else "one")
    if world == 2:
        layouts.make_moments(model, optimizer)
        layouts.fill(layouts.train_state(model, optimizer).capture())
        distckpt.save(root, {"model": model.state_dict(), "optim": _optim_state(model, optimizer)})
    layouts.zero(model, optimizer)
    groups = [{**g, "params": [_name(model, p) for p in g["params"]]} for g in optimizer.param_groups]
    into = {"model": model.state_dict(), "optim": {"state": {}, "param_groups": groups}}
    distckpt.load(root, into)
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        optimizer.state[p] = into["optim"]["state"][_name(model, p)]
        assert type(optimizer.state[p]["exp_avg"]) is type(p.data)
    return layouts.wrong(layouts.train_state(model, optimizer).capture())


def _name(model, parameter):
    return next(n for n, p in model.named_parameters() if p is parameter)


def _optim_state(model, optimizer):
    return {
        "state": {_name(model, p): optimizer.state[p] for g in optimizer.param_groups for p in g["params"]},
        "param_groups": [{**g, "params": [_name(model, p) for p in g["params"]]} for g in optimizer.param_groups],
    }


def test_states_that_only_the_checkpoint_has_are_laid_out_as_their_parameters(tmp_path):
    for world in (2, 3, 1):
        assert ranks.run(world, _fsdp, str(tmp_path), world) == [[]] * world


def _sharded(whole, cuts):
    """ShardedTensor whose rank r holds rows cuts[r] to cuts[r + 1]."""
    import torch.distributed as dist
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
    from torch.distributed._shard.sharding_spec import ShardMetadata

    low, high = cuts[dist.get_rank()], cuts[dist.get_rank() + 1]
    sizes = [high - low, *whole.shape[1:]]
    metadata = ShardMetadata([low, *[0] * (whole.dim() - 1)], sizes, f"rank:{dist.get_rank()}/cpu")
    shards = [Shard(whole[low:high].clone(), metadata)] if high > low else []
    return init_from_local_shards(shards, list(whole.shape))


def _save_sharded(root):
    whole = torch.arange(70.0).view(10, 7)
    distckpt.save(root, {"model": {"t": _sharded(whole, [0, 7, 10]), "whole": torch.ones(2)}})


def _load_sharded(root, cuts):
    into = {"model": {"t": _sharded(torch.zeros(10, 7), cuts), "whole": torch.zeros(2)}}
    distckpt.load(root, into)
    import torch.distributed as dist

    shards = into["model"]["t"].local_shards()
    expected = torch.arange(70.0).view(10, 7)[cuts[dist.get_rank()] : cuts[dist.get_rank() + 1]]
    return torch.equal(torch.cat([s.tensor for s in shards]) if shards else torch.zeros(0, 7), expected)


def test_a_sharded_tensor_is_saved_and_loaded_in_any_cut(tmp_path):
    ranks.run(2, _save_sharded, str(tmp_path))
    assert ranks.run(2, _load_sharded, str(tmp_path), [0, 2, 10]) == [True] * 2
    assert ranks.run(3, _load_sharded, str(tmp_path), [0, 4, 8, 10]) == [True] * 3
    into = {"model": {"t": torch.zeros(10, 7), "whole": torch.zeros(2)}}
    distckpt.load(tmp_path, into)
    assert torch.equal(into["model"]["t"], torch.arange(70.0).view(10, 7))


def _differing(root):
    import torch.distributed as dist

    rank = dist.get_rank()
    tree = {"rng": torch.full((3,), rank), "seed": rank, "same": 1}
    report = distckpt.save(root, tree)
    into = {"rng": torch.full((3,), 9), "seed": 9, "same": 9}
    distckpt.load(root, into)
    assert into["rng"].tolist() == [rank] * 3
    assert into["seed"] == rank
    message = ranks.expect_error(lambda: distckpt.save(root, {"x": object() if rank else 1}), Unsupported)
    assert "rank 1: x: a builtins.object" in message
    return len(report.notes)


def test_what_differs_between_ranks_each_keeps_and_no_other_world_size_takes(tmp_path):
    assert ranks.run(2, _differing, str(tmp_path)) == [2, 2]
    into = {"rng": torch.full((3,), 9), "seed": 9, "same": 9}
    message = ranks.expect_error(lambda: distckpt.load(tmp_path, into), Mismatch)
    assert "seed: each of the 2 ranks saved its own" in message
    assert into["rng"].tolist() == [9] * 3
