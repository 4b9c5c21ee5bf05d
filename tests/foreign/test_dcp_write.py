"""Checkpoints written as DCP directories: what torch's own readers make of them."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, RunConflict, StateWarning, StoreError
from distckpt.foreign.dcp_write import write_dcp
from distckpt.foreign.emit import TensorRecord
from distckpt.foreign.open import open_foreign
from distckpt.run.source import open_source
from distckpt.state import as_bytes
from distckpt.tools.copy import copy
from tests import layouts, ranks
from tests.foreign.test_dcp import dcp_load, dcp_save, load, state_dict_of, trained

DTYPES = [torch.float32, torch.bfloat16, torch.uint16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7)], ids=str)
def test_a_record_is_what_torch_loads_and_any_zip_program_tests(shape, dtype, large):
    tensor = (torch.rand(shape) * 9).to(dtype)
    content = bytes(as_bytes(tensor.reshape(-1)))
    record = TensorRecord(str(dtype).removeprefix("torch."), shape, large=large)
    data = record.head + content + record.tail(zlib.crc32(content))
    assert len(data) == record.size
    assert len(record.head) % 64 == 0
    again = torch.load(io.BytesIO(data), weights_only=True)
    assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
    assert bytes(as_bytes(again.reshape(-1))) == content
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_what_is_written_is_what_dcp_saves_of_the_same_dict(tmp_path):
    model, optimizer = trained()
    tree = state_dict_of(model, optimizer) | {
        "epoch": 3,
        "pair": (torch.ones(2), "x"),
        "list": [torch.zeros(1), {"deep": 1}],
        "plain": [1, 2],
        "empty": torch.zeros(0, 3),
        "map": {1: torch.ones(1), "k": None},
        "step": torch.tensor(4),
        "ema": {"fp8._extra_state": {"scale": torch.ones(2), "seen": 3}, "w": torch.ones(2)},
    }
    dcp_save(tree, tmp_path / "theirs")
    write_dcp(open_foreign(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (pickle.loads((tmp_path / n / ".metadata").read_bytes()) for n in ("theirs", "ours"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert ours.storage_data.keys() == theirs.storage_data.keys()
    assert ours.version == theirs.version
    for name in ("theirs", "ours"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}.pt")
    loaded = {name: torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("theirs", "ours")}
    assert repr(sorted(loaded["theirs"].items())) == repr(sorted(loaded["ours"].items()))


def test_tied_parameters_are_written_once_and_read_under_both_names(tmp_path):
    model, optimizer = layouts.build("one")
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    with Checkpointer(tmp_path / "run", wait=True) as c:
        c.save(1, state)
    with pytest.warns(StateWarning, match="rng: each rank has its own, which has no place there"):
        report = copy(tmp_path / "run", tmp_path / "dcp", to="dcp")
    assert any(note.startswith("rng:") for note in report.notes)
    live = {"model": {n: torch.zeros_like(t) for n, t in model.state_dict().items()}}
    dcp_load(live, tmp_path / "dcp")
    assert all(torch.equal(live["model"][n], t) for n, t in model.state_dict().items())
    assert torch.equal(live["model"]["head.weight"], live["model"]["emb.weight"])
    assert open_foreign(tmp_path / "dcp").manifest.aliases == {"model.head.weight": "model.emb.weight"}


def _save(layout, root):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(5, state)


def _load_through_dcp(layout, folder):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    tree = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tree, checkpoint_id=folder)
    state = layouts.train_state(model, optimizer)
    found = layouts.wrong(
        type("Captured", (), {"tensors": {n: t for n, t in state.capture().tensors.items() if n.startswith("model.")}})
    )
    for fqn, members in tree["optim"]["state"].items():
        for name, tensor in members.items():
            local = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if not torch.equal(local, layouts.expected(f"optim.{fqn}.{name}", local.shape, local.dtype)):
                found.append(f"optim.{fqn}.{name}")
    return found


@pytest.mark.parametrize("layout", ["fsdp3", "fsdp1x3"])
def test_dcp_loads_on_other_ranks_what_ours_saved(layout, tmp_path):
    ranks.run(3, _save, layout, str(tmp_path / "run"))
    with layouts.quiet():
        copy(tmp_path / "run", tmp_path / "dcp", to="dcp")
    for wrong in ranks.run(2, _load_through_dcp, "fsdp2", str(tmp_path / "dcp")):
        assert not wrong


def test_flat_runs_are_cut_into_boxes(tmp_path):
    """As FSDP1 saves: each rank a run of elements that begins and ends anywhere in a row."""
    from distckpt.foreign.dcp_write import _chunks
    from distckpt.format.manifest import TensorInfo
    from distckpt.format.partition import FlatEven

    info = TensorInfo((5, 3, 4), "float32", FlatEven((5, 3, 4), 17, 3, 0))
    chunks = list(_chunks("w", info))
    assert all(stretch.region == box and (stretch.start, stretch.stop) == (0, box.numel) for _, box, stretch in chunks)
    seen = torch.zeros(5, 3, 4, dtype=torch.int64)
    for file, box, _ in chunks:
        cells = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
        seen[cells] += 1
        (run,) = info.partition.of_file(file)
        flat = torch.arange(60).reshape(5, 3, 4)[cells].flatten()
        assert run.start <= int(flat[0])
        assert int(flat[-1]) < run.stop
    assert bool((seen == 1).all())


def test_a_directory_is_whole_or_has_no_index(tmp_path, monkeypatch):
    model, _ = trained()
    with Checkpointer(tmp_path / "run", wait=True) as c:
        c.save(1, TrainState(model=model, rng=False))
    file = next((tmp_path / "run" / "step-00000001").glob("rank-*"))
    whole = file.read_bytes()
    at = whole.index(model[0].weight.detach().numpy().tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(Corrupt, match="do not match their checksum"):
        copy(tmp_path / "run", tmp_path / "dcp", to="dcp")
    assert not (tmp_path / "dcp" / ".metadata").exists()
    file.write_bytes(whole)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(StoreError):
        copy(tmp_path / "run", tmp_path / "dcp", to="dcp")
    monkeypatch.setattr(os, "fsync", real)
    assert not (tmp_path / "dcp" / ".metadata").exists()
    copy(tmp_path / "run", tmp_path / "dcp", to="dcp")
    again = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6, bias=False))
    load(TrainState(model=again), tmp_path / "dcp", verify=True)
    assert torch.equal(again[0].weight, model[0].weight)
    with pytest.raises(RunConflict, match="holds a DCP checkpoint already"):
        write_dcp(open_source(tmp_path / "run"), tmp_path / "dcp")
