"""The drop-in for torch.distributed.checkpoint, driven by torch's own dcp.save and dcp.load."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import distckpt
from distckpt.adapters.dcp import StorageReader, StorageWriter
from distckpt.errors import Unsupported
from distckpt.format.box import Run
from distckpt.format.layout import StepDir
from distckpt.format.partition import Grid, Pieces, divided
from distckpt.loading.open import open_checkpoint
from distckpt.store.local import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def save(state_dict, path, **options):
    dcp.save(state_dict, storage_writer=StorageWriter(path), **options)


def load(state_dict, path, **options):
    reader = StorageReader(path)
    dcp.load(state_dict, storage_reader=reader, **options)
    return reader


def names(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.is_symlink())


def values(k):
    return {
        "model": OrderedDict({"w": torch.full((2, 3), 1.0 * k), "b": torch.arange(k, k + 4)}),
        "step": k,
        "nested": {"list": [torch.ones(2) * k, {"k": k}], "plain": [k, None, "x"], "tuple": (k, torch.ones(1) * k)},
        "array": np.full((2, 2), k, "f4"),
        "bytes": bytes([k]),
        "scalar": torch.tensor(k),
        "none": None,
        "empty": torch.zeros(0, 3),
    }


def flat(value):
    """A tree as text, tensors and arrays by content and dtype."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {value.tolist()}"
    if isinstance(value, dict):
        return {k: flat(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(flat, value))
    return value


def test_values_of_every_kind_come_back_through_dcp_and_through_ours(tmp_path):
    save(values(5), tmp_path)
    by_dcp, by_ours = values(0), values(0)
    load(by_dcp, tmp_path)
    distckpt.load(tmp_path, by_ours)
    assert flat(by_dcp) == flat(values(5))
    assert flat(by_ours) == flat(values(5))


def test_what_ours_saved_dcp_loads(tmp_path):
    distckpt.save(tmp_path, values(5))
    into = values(0)
    load(into, tmp_path)
    assert flat(into) == flat(values(5))


def test_a_state_dict_can_be_made_from_the_checkpoint_alone(tmp_path):
    save(
        {
            "model": {"a.b": torch.ones(2)},
            "optim": {"state": {"a.b": {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.5, "params": ["a.b"]}]},
        },
        tmp_path,
    )
    found = _load_state_dict_from_keys(storage_reader=StorageReader(tmp_path))
    assert flat(found) == flat(
        {
            "model": {"a.b": torch.ones(2)},
            "optim": {"state": {"a.b": {"m": torch.ones(2)}}, "param_groups": [{"lr": 0.5, "params": ["a.b"]}]},
        }
    )


def test_a_path_means_what_it_means_to_distckpt_save(tmp_path):
    for step in (1000, 2000):
        save({"a": step}, tmp_path / f"step-{step:08d}")
    writer = StorageWriter(tmp_path / "elsewhere")
    dcp.save({"a": 3}, checkpoint_id=tmp_path / "step-00003000", storage_writer=writer)
    assert names(tmp_path) == ["step-00001000", "step-00002000", "step-00003000"]
    into = {"a": 0}
    load(into, tmp_path)
    assert into["a"] == 3
    dcp.load(into, checkpoint_id=tmp_path / "step-00001000", storage_reader=StorageReader(tmp_path))
    assert into["a"] == 1000


def test_saving_again_replaces_and_keeps_the_two_newest(tmp_path):
    writer = StorageWriter(tmp_path)
    for a in range(4):
        dcp.save({"a": a}, storage_writer=writer)
    assert names(tmp_path) == ["step-00000000.3", "step-00000000.4"]
    into = {"a": None}
    load(into, tmp_path)
    assert into["a"] == 3


def test_stateful_objects_and_no_dist(tmp_path):
    model = torch.nn.Linear(3, 2)
    save({"model": model}, tmp_path, no_dist=True)
    other = torch.nn.Linear(3, 2)
    load({"model": other}, tmp_path, no_dist=True)
    assert torch.equal(model.weight, other.weight)


def trained(lr=0.1):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def both(model, optimizer, **options):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    options = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }


@pytest.mark.parametrize("saved_flat", [False, True])
@pytest.mark.parametrize("wanted_flat", [False, True])
def test_flattened_optimizers_and_nested_ones_are_one(tmp_path, saved_flat, wanted_flat):
    """torchtitan saves `optim.param_groups.<fqn>.lr`, get_optimizer_state_dict gives `optim.param_groups.0.lr`."""
    model, optimizer = trained()
    save(both(model, optimizer, flatten_optimizer_state_dict=saved_flat), tmp_path)
    model2, optimizer2 = trained(lr=0.5)
    into = both(model2, optimizer2, flatten_optimizer_state_dict=wanted_flat)
    load(into, tmp_path)
    expected = both(model, optimizer, flatten_optimizer_state_dict=wanted_flat)
    assert flat(into) == flat(expected)
    state = distckpt.TrainState(model=model2, optimizer=optimizer2, rng=False)
    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(state)
    assert flat(both(model2, optimizer2)) == flat(both(model, optimizer))


def test_an_optimizer_without_state_is_one(tmp_path):
    """DCP leaves empty dicts out of what it flattens."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    save({"model": model.state_dict(), "optim": optimizer.state_dict()}, tmp_path)
    optimizer.param_groups[0]["lr"] = 0.0
    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(distckpt.TrainState(model=model, optimizer=optimizer, rng=False))
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_tied_tensors_are_stored_once_and_found_under_each_name(tmp_path):
    weight = torch.arange(6.0)
    save({"model": {"a": weight, "b": weight}}, tmp_path)
    found = open_checkpoint(LocalStore(tmp_path), StepDir(0))
    assert found.manifest.aliases == {"model.b": "model.a"}
    into = {"model": {"a": torch.zeros(6), "b": torch.zeros(6)}}
    load(into, tmp_path)
    assert torch.equal(into["model"]["b"], weight)


def test_a_slice_of_a_large_chunk_reads_little(tmp_path):
    """torch's own reader loads the whole saved chunk for any slice of it."""
    distckpt.save(tmp_path, {"t": torch.arange(16 << 20, dtype=torch.float32).view(1024, 16384)})
    into = {"t": torch.zeros(1024, 16384)}
    reader = StorageReader(tmp_path)
    dcp.load(into, storage_reader=reader, planner=OneRow())
    assert into["t"][700].tolist()[:3] == [700 * 16384.0, 700 * 16384 + 1.0, 700 * 16384 + 2.0]
    assert not into["t"][:700].any()
    assert reader.bytes_read < 2_200_000


class OneRow(dcp.DefaultLoadPlanner):
    """Asks for row 700 alone: 64 KiB."""

    def create_local_plan(self):
        from dataclasses import replace

        plan = super().create_local_plan()
        row = torch.Size([700, 0])
        items = [replace(i, dest_offsets=row, storage_offsets=row, lengths=torch.Size([1, 16384])) for i in plan.items]
        return replace(plan, items=items)


def test_flat_runs_are_offered_as_their_boxes(tmp_path):
    """As FSDP1 and ZeRO shard: DCP knows boxes only."""
    from distckpt.state import GlobalTensor, Listed, Shard, State

    whole = torch.arange(35.0)
    pieces = Pieces((5, 7), ((0, Run(0, 10)), (0, Run(10, 35))))

    class Flat:
        unusable = None

        def capture(self):
            shards = tuple(Shard(run, whole[run.start : run.stop]) for _, run in pieces.pieces)
            return State({"model.t": GlobalTensor((5, 7), "float32", Listed(pieces), shards)})

    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, Flat())
    into = {"model": {"t": torch.zeros(5, 7)}}
    load(into, tmp_path)
    assert torch.equal(into["model"]["t"], whole.view(5, 7))


def test_two_values_are_not_loaded_into_one_memory(tmp_path):
    """torch's own reader leaves the one that it read last in both."""
    dcp.save({"a": torch.zeros(3), "b": torch.ones(3)}, storage_writer=StorageWriter(tmp_path))
    into = torch.full((3,), 5.0)
    with pytest.raises(CheckpointException, match="shares memory with"):
        dcp.load({"a": into, "b": into}, storage_reader=StorageReader(tmp_path))
    assert into.tolist() == [5.0] * 3


def test_an_unknown_uri_is_refused_and_not_taken_for_a_directory():
    for make in (StorageReader, StorageWriter):
        with pytest.raises(Unsupported, match="not a URI of"):
            make("hdfs://host/run")


def test_dtypes_are_cast_as_dcp_casts_them(tmp_path):
    save({"t": torch.tensor([1.5, 2.5])}, tmp_path)
    into = {"t": torch.zeros(2, dtype=torch.bfloat16)}
    load(into, tmp_path)
    assert into["t"].tolist() == [1.5, 2.5]


def test_a_writer_can_be_pickled_even_after_a_save_that_failed(tmp_path):
    writer = StorageWriter(tmp_path)
    with pytest.raises(CheckpointException):
        dcp.save({"x": object()}, storage_writer=writer)
    again = pickle.loads(pickle.dumps(writer))
    dcp.save({"x": 1}, storage_writer=again)
    dcp.save({"x": 2}, storage_writer=writer)
    assert names(tmp_path) == ["step-00000000", "step-00000000.2"]


@pytest.mark.parametrize(
    ("state_dict", "said"),
    [
        ({"x": {"y": [1, object()]}}, r"x\.y\[1\]: a builtins.object cannot be saved"),
        ({"x": torch.zeros(2, device="meta")}, "x: is on the meta device"),
        ({"x": torch.zeros(2).to_sparse()}, "x: a torch.Tensor of layout"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_its_name(tmp_path, state_dict, said):
    with pytest.raises(CheckpointException, match=said):
        save(state_dict, tmp_path)
    assert not (tmp_path / "step-00000000").exists()


def test_what_is_missing_or_of_another_shape_is_told(tmp_path):
    save({"x": torch.zeros(2)}, tmp_path)
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: y"):
        load({"y": torch.zeros(2)}, tmp_path)
    with pytest.raises(CheckpointException, match="Size mismatch"):
        load({"x": torch.zeros(3)}, tmp_path)
    with pytest.raises(CheckpointException, match="holds no committed checkpoint"), _logged():
        load({"x": torch.zeros(3)}, tmp_path / "nothing")


def _logged():
    """DCP logs the traceback of what it then raises."""
    import logging
    from contextlib import contextmanager

    @contextmanager
    def silent():
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)

    return silent()


def test_cached_plans_are_refused_rather_than_written_over_an_earlier_save(tmp_path):
    writer = StorageWriter(tmp_path)
    try:
        dcp.save({"x": 1}, storage_writer=writer, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        with pytest.raises(CheckpointException, match="enable_plan_caching"):
            dcp.save({"x": 2}, storage_writer=writer, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
    finally:
        for cache in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
            getattr(dcp.SavePlanner, f"_cached_{cache}").clear()
    into = {"x": 0}
    load(into, tmp_path)
    assert into["x"] == 1


def test_regular_cuts_are_recognised():
    def rows(*cuts):
        from distckpt.format.box import Box

        return [(f, Box((a, 0), (b - a, 3))) for f, a, b in cuts]

    even = divided((5, 3), rows((0, 0, 2), (2, 2, 4), (4, 4, 5)))
    assert isinstance(even, Grid)
    assert even.to_json() == {"grid": [[[3, 2]]], "file": 0}
    for odd in (rows((0, 0, 1), (1, 1, 5)), rows((0, 0, 2), (1, 2, 4), (3, 4, 5)), rows((1, 0, 3), (0, 3, 5))):
        found = divided((5, 3), odd)
        assert isinstance(found, Pieces)
        found.check()
    assert divided((0, 3), []).to_json() == {"file": 0}
    assert divided((5, 3), rows((7, 0, 5))).to_json() == {"file": 7}
