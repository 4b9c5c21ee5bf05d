"""Safetensors as sources: one file, Hugging Face's shards, and what DCP writes in that form."""

from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, FormatError, Mismatch, Unsupported
from distckpt.foreign.open import open_foreign
from tests import ranks
from tests.foreign.test_dcp import load, named_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.tensor(3)}


def target():
    return named_tensors(**{name: torch.zeros_like(t) for name, t in TENSORS.items()})


def wrong(model):
    return [name for name, t in TENSORS.items() if not torch.equal(getattr(model, name), t)]


@pytest.fixture
def shards(tmp_path):
    """A Hugging Face cache: a directory of symlinks into a folder of blobs."""
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    folder.mkdir()
    blobs.mkdir()
    weight_map = {}
    for i, (name, tensor) in enumerate(TENSORS.items(), 1):
        file = f"model-{i:05d}-of-00003.safetensors"
        save_file({name: tensor}, blobs / f"blob{i}")
        (folder / file).symlink_to(blobs / f"blob{i}")
        weight_map[name] = file
    (blobs / "index").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors.index.json").symlink_to(blobs / "index")
    return folder


def test_one_file_is_a_model(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for source in (tmp_path / "model.safetensors", tmp_path):
        model = target()
        assert load(TrainState(model=model), source).unverified == ["model.a", "model.b", "model.c"]
        assert not wrong(model)


def test_a_directory_of_shards_is_read_through_its_symlinks(shards):
    model = target()
    load(TrainState(model=model), shards)
    assert not wrong(model)
    (shards / "model.safetensors.index.json").unlink()
    model = target()
    load(TrainState(model=model), shards)
    assert not wrong(model)


def test_a_resume_begins_from_a_directory_of_shards(shards):
    model = target()
    with Checkpointer(shards, wait=True) as c, pytest.warns(match="another tool saved"):
        c.resume(TrainState(model=model, extra=_Value()))
    assert not wrong(model)


class _Value:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_deleted_shard_is_named_with_its_tensors(shards):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metadata = HuggingFaceStorageReader(str(shards)).read_metadata()
        assert len(metadata.state_dict_metadata) == 3
        (shards / "model-00002-of-00003.safetensors").unlink()
        metadata = HuggingFaceStorageReader(str(shards)).read_metadata()
        assert len(metadata.state_dict_metadata) == 2  # DCP sees a smaller model, and says nothing
    with pytest.raises(Corrupt, match=r"model-00002-of-00003\.safetensors: is gone; .* says that it holds b"):
        load(TrainState(model=target()), shards)
    (shards / "model.safetensors.index.json").unlink()
    with pytest.raises(Corrupt, match=r"of model files 1 to 3, \[2\] are gone"):
        load(TrainState(model=target()), shards)


def test_an_index_does_not_lead_out_of_its_directory(shards):
    (shards / "model.safetensors.index.json").unlink()
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../blobs/blob1"}}))
    with pytest.raises(FormatError, match="not a plain path below"):
        open_foreign(shards)


def test_an_index_that_speaks_of_another_file_is_found_out(shards):
    text = json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-00001-of-00003.safetensors")})
    (shards / "model.safetensors.index.json").unlink()
    (shards / "model.safetensors.index.json").write_text(text)
    with pytest.raises(Corrupt, match=r"model-00001-of-00003\.safetensors: does not hold b, c"):
        open_foreign(shards)


def test_there_is_nothing_to_verify_and_that_is_said(shards):
    with pytest.raises(Unsupported, match="safetensors files carry no checksums"):
        load(TrainState(model=target()), shards, verify=True)


def test_a_file_that_was_cut_or_overwritten_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(Corrupt, match=r"has \d+ bytes; \w is at .*: the file was cut short"):
        open_foreign(path)
    for damaged in (whole[:5], b"\xff" * 64, whole[:8] + b"[" + whole[9:], whole.replace(b'"F32"', b'"F33"')):
        path.write_bytes(damaged)
        with pytest.raises((FormatError, Corrupt), match=r"model\.safetensors: (not a safetensors file|cut short)"):
            open_foreign(path)


def test_a_data_file_of_a_checkpoint_of_ours_says_where_to_look(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=target()))
    file = next((tmp_path / "step-00000001").glob("rank-*"))
    with pytest.raises(FormatError, match="a data file of a distckpt checkpoint: give the run's directory"):
        open_foreign(file)


def _save_sharded(folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    tree = {
        "rows": distribute_tensor(torch.arange(20.0).reshape(5, 4), mesh, [Shard(0)]),
        "columns": distribute_tensor(torch.arange(20.0).reshape(4, 5), mesh, [Shard(1)]),
        "all": distribute_tensor(torch.ones(3), mesh, [Replicate()]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))


def test_what_each_rank_wrote_through_dcp_is_put_together_by_its_offsets(tmp_path):
    ranks.run(2, _save_sharded, str(tmp_path))
    assert len(os.listdir(tmp_path)) == 2
    model = named_tensors(rows=torch.zeros(5, 4), columns=torch.zeros(4, 5), all=torch.zeros(3))
    load(TrainState(model=model), tmp_path)
    assert torch.equal(model.rows, torch.arange(20.0).reshape(5, 4))
    assert torch.equal(model.columns, torch.arange(20.0).reshape(4, 5))
    assert (model.all == 1).all()
    os.unlink(tmp_path / "shard-00002-model-00001-of-00001.safetensors")
    with pytest.raises(Mismatch, match=r"rows: saved with shape \[3, 4\], the state has \[5, 4\]"):
        load(TrainState(model=model), tmp_path)
