"""The drop-in on real ranks: async saves, pipeline stages, values that differ, a coordinator that must refuse."""

from __future__ import annotations

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import distckpt
from distckpt.adapters.dcp import StorageReader, StorageWriter
from distckpt.format.layout import StepDir
from distckpt.format.partition import Grid
from distckpt.loading.open import open_checkpoint
from distckpt.store.local import LocalStore
from tests import layouts, ranks
from tests.products.test_state_dicts import build, state_dict


def _async(root, kind):
    model, optimizer, state = build("fsdp2")
    layouts.fill(state.capture())
    if kind == AsyncCheckpointerType.PROCESS:
        _spawnable()
    writer = StorageWriter(root)
    for _ in range(2):
        future = dcp.async_save(state_dict(model, optimizer), storage_writer=writer, async_checkpointer_type=kind)
        future.result(60)
    layouts.zero(model, optimizer)
    layouts.make_moments(model, optimizer)
    distckpt.load(root, state_dict(model, optimizer))
    return layouts.wrong(state.capture())


def _spawnable():
    """DCP's daemon is spawned: it imports anew what its arguments name, and no main program."""
    import __main__

    for name in ("__file__", "__spec__"):
        if hasattr(__main__, name):
            setattr(__main__, name, None)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ["MASTER_ADDR"] = "localhost"


def test_an_asynchronous_save_in_a_thread(tmp_path):
    assert ranks.run(2, _async, str(tmp_path), AsyncCheckpointerType.THREAD) == [[], []]


@pytest.mark.full
def test_an_asynchronous_save_in_a_process(tmp_path):
    assert ranks.run(2, _async, str(tmp_path), AsyncCheckpointerType.PROCESS) == [[], []]


def _regular(root):
    model, optimizer, _ = build("fsdp2")
    dcp.save(state_dict(model, optimizer), storage_writer=StorageWriter(root))


def test_an_even_cut_is_a_few_numbers_in_the_manifest(tmp_path):
    ranks.run(2, _regular, str(tmp_path))
    found = open_checkpoint(LocalStore(tmp_path), StepDir(0)).manifest
    assert all(isinstance(info.partition, Grid) for info in found.tensors.values())
    assert found.tensors["model.up.weight"].partition.to_json() == {"grid": [[[2, 1]]], "file": 0}


def _stage(root):
    """A pipeline stage has parameters that the other has not; optimizers are flattened, as DCP needs them to be."""
    rank = dist.get_rank()
    tree = {
        "model": {f"layer{rank}.weight": torch.full((4,), 1.0 + rank)},
        "optim": {
            f"state.layer{rank}.weight.exp_avg": torch.full((4,), 3.0 + rank),
            f"param_groups.layer{rank}.weight.lr": 0.1,
        },
        f"loader_{rank}": {"position": rank, "seen": torch.full((2,), rank)},
    }
    dcp.save(tree, storage_writer=StorageWriter(root))
    into = {k: {n: v * 0 for n, v in of.items()} for k, of in tree.items()}
    dcp.load(into, storage_reader=StorageReader(root))
    return repr(into) == repr(tree)


def test_what_only_some_ranks_have_is_every_reader_s(tmp_path):
    assert ranks.run(2, _stage, str(tmp_path)) == [True, True]
    into = {
        "model": {f"layer{r}.weight": torch.zeros(4) for r in (1, 0)},
        "optim": {
            "state": {f"layer{r}.weight": {"exp_avg": torch.zeros(4)} for r in (1, 0)},
            "param_groups": [{"lr": 0.0, "params": ["layer0.weight", "layer1.weight"]}],
        },
        **{f"loader_{r}": {"position": 9, "seen": torch.zeros(2, dtype=torch.long)} for r in (1, 0)},
    }
    distckpt.load(tmp_path, into)
    assert into["model"]["layer1.weight"].tolist() == [2.0] * 4
    assert into["optim"]["state"]["layer0.weight"]["exp_avg"].tolist() == [3.0] * 4
    assert into["optim"]["param_groups"][0]["lr"] == 0.1
    assert into["loader_1"] == {"position": 1, "seen": into["loader_1"]["seen"]}
    assert into["loader_1"]["seen"].tolist() == [1, 1]


def _differing(root):
    rank = dist.get_rank()
    writer = StorageWriter(root)
    said = {}
    for name, tree in {
        "rng": {"rng": torch.full((2,), rank), "same": 1},
        "x.seed": {"x": {"seed": rank, "same": 1}, "t": torch.ones(2)},
        "array": {"array": (torch.full((2,), rank), 1)},
    }.items():
        said[name] = ranks.expect_error(lambda: dcp.save(tree, storage_writer=writer), CheckpointException)
    dist.barrier()
    left = [entry.name for entry in LocalStore(root).list("")]
    dcp.save({"a": 1}, storage_writer=writer)
    return said, left


def test_values_that_differ_under_one_name_are_refused_and_leave_nothing_behind(tmp_path):
    for said, left in ranks.run(2, _differing, str(tmp_path)):
        for name, text in said.items():
            assert f"  {name}: rank 0 and rank 1 differ" in text
            assert "distckpt.save, which keeps each rank's" in text
        assert left == []
    distckpt.load(tmp_path, into := {"a": 0})
    assert into == {"a": 1}


def _own_values(root):
    into = {"rng": torch.zeros(2, dtype=torch.long), "seed": 9, "two words": 9}
    rank = dist.get_rank()
    if dist.get_world_size() == 2:
        distckpt.save(root, {"rng": torch.full((2,), rank), "seed": rank, "two words": rank})
        dcp.load(into, storage_reader=StorageReader(root))
        return into["rng"].tolist() == [rank] * 2 and into["seed"] == into["two words"] == rank
    texts = []
    for key, value in into.items():
        read = lambda: dcp.load({key: value}, storage_reader=StorageReader(root))
        texts.append(ranks.expect_error(read, CheckpointException))
    return all("each of the 2 ranks saved its own, which 3 ranks cannot share out" in text for text in texts)


def test_values_that_each_rank_saved_come_back_to_it_and_to_no_other_world_size(tmp_path):
    assert ranks.run(2, _own_values, str(tmp_path)) == [True] * 2
    assert ranks.run(3, _own_values, str(tmp_path)) == [True] * 3


def _sharded(root, cuts):
    from tests.run.test_direct_ranks import _sharded as sharded

    whole = torch.arange(70.0).view(10, 7)
    if dist.get_world_size() == 2:
        dcp.save({"t": sharded(whole, [0, 7, 10])}, storage_writer=StorageWriter(root))
    into = {"t": sharded(whole * 0, cuts)}
    dcp.load(into, storage_reader=StorageReader(root))
    rank = dist.get_rank()
    return torch.equal(into["t"].local_shards()[0].tensor, whole[cuts[rank] : cuts[rank + 1]])


def test_sharded_tensors(tmp_path):
    assert ranks.run(2, _sharded, str(tmp_path), [0, 2, 10]) == [True] * 2
    assert ranks.run(3, _sharded, str(tmp_path), [0, 3, 4, 10]) == [True] * 3


def _uneven(root):
    """13 rows over tensor parallelism 2, then data parallelism 3: torch's offset function is wrong about them."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 13, bias=False))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    text = ranks.expect_error(
        lambda: dcp.save({"model": model.state_dict()}, storage_writer=StorageWriter(f"{root}/dcp")),
        CheckpointException,
    )
    state = distckpt.TrainState(model=model, rng=False)
    layouts.fill(state.capture())
    distckpt.save(f"{root}/direct", {"model": model.state_dict()})
    layouts.zero(model, torch.optim.SGD(model.parameters()))
    distckpt.load(f"{root}/direct", {"model": model.state_dict()})
    return layouts.wrong(state.capture()), text


def test_a_layout_that_dcp_computes_wrong_is_refused_there_and_right_here(tmp_path):
    for wrong, text in ranks.run(6, _uneven, str(tmp_path)):
        assert wrong == []
        assert "overlapping chunks" in text or "computes the layout of this placement wrong" in text


class Failing(dcp.DefaultSavePlanner):
    """Fails on rank 1 once there is something to write, when the other ranks may have written."""

    def resolve_data(self, write_item):
        if dist.get_rank():
            raise OSError("no")
        return super().resolve_data(write_item)


def _fails_on_one(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    tree = {"t": DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Shard(0)])}
    writer = StorageWriter(f"{root}/step-00000001")
    fails = lambda: dcp.save(tree, storage_writer=writer, planner=Failing())
    assert "RANK 1" in ranks.expect_error(fails, CheckpointException)
    dist.barrier()
    left = [entry.name for entry in LocalStore(root).list("step-00000001")]
    dist.barrier()
    dcp.save(tree, checkpoint_id=f"{root}/step-00000002", storage_writer=writer)
    dist.barrier()
    return len(left), [entry.name for entry in LocalStore(root).list("") if entry.size is None]


def test_what_other_ranks_wrote_for_a_save_that_failed_is_removed_by_the_next(tmp_path):
    assert ranks.run(2, _fails_on_one, str(tmp_path)) == [(1, ["step-00000002"])] * 2
