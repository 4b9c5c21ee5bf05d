"""Copies between formats: nothing lost, nothing slurped, and nothing there before it is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt, RunConflict, StateWarning
from distckpt.run.source import open_source
from distckpt.tools.copy import Source, copy
from tests import layouts, ranks
from tests.foreign.test_dcp import data_at, dcp_save, fresh, load, named_tensors, state_dict_of, trained


def test_a_dcp_directory_becomes_a_run_and_training_goes_on_from_it(tmp_path):
    model, optimizer = trained()
    dcp_save(state_dict_of(model, optimizer) | {"epoch": 3, "evil": os.getcwd}, tmp_path / "dcp")
    with pytest.warns(StateWarning, match=r"evil: cannot be read safely; left out: .*getcwd"):
        report = copy(Source(str(tmp_path / "dcp"), step=40), tmp_path / "run", verify=True)
    assert report.destination == str(tmp_path / "run" / "step-00000040")
    again, its_optimizer = fresh()
    with Checkpointer(tmp_path / "run", wait=True) as c:
        loaded = c.resume(TrainState(model=again, optimizer=its_optimizer), strict=False)
        assert loaded.step == 40
        assert not loaded.unverified
        assert torch.equal(again[0].weight, model[0].weight)
        assert its_optimizer.param_groups[0]["lr"] == 0.01
        c.save(41, TrainState(model=again, optimizer=its_optimizer))
        assert c.steps() == [40, 41]


def _save(root):
    model, optimizer = layouts.build("fsdp2")
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(5, state, metrics={"loss": 0.5})


def _load(root):
    model, optimizer = layouts.build("fsdp2")
    state = layouts.train_state(model, optimizer)
    with Checkpointer(root, timeout=20, wait=True) as c:
        report = c.resume(state)
    return layouts.wrong(state.capture()), report.missing, report.notes


def test_a_run_is_copied_with_the_values_of_its_ranks(tmp_path):
    ranks.run(2, _save, str(tmp_path / "run"))
    copy(tmp_path / "run", tmp_path / "copy")
    before, after = (open_source(tmp_path / name).manifest for name in ("run", "copy"))
    assert (after.tensors, after.rank_objects, after.metrics, after.world_size) == (
        before.tensors,
        before.rank_objects,
        before.metrics,
        2,
    )
    assert before.attempt != after.attempt
    for wrong, missing, notes in ranks.run(2, _load, str(tmp_path / "copy")):
        assert not wrong
        assert not missing
        assert not [note for note in notes if note.startswith("rng")]
    with pytest.raises(RunConflict, match="holds step 5 already"):
        copy(tmp_path / "run" / "step-00000005", tmp_path / "copy")


def test_compressed_records_become_files_as_many_as_there_were(tmp_path):
    zstd = pytest.importorskip("torch.distributed.checkpoint._extension")
    pytest.importorskip("zstandard")
    tensors = {f"w{i}": torch.full((3 << 20,), i, dtype=torch.int32) for i in range(3)}
    writer = FileSystemWriter(str(tmp_path / "dcp"), _extensions=[zstd.ZStandard()])
    dcp_save({"model": tensors}, tmp_path / "dcp", storage_writer=writer)
    copy(tmp_path / "dcp", tmp_path / "run")
    assert len(list((tmp_path / "run" / "step-00000000").glob("rank-*"))) == 1
    model = named_tensors(**{n: torch.zeros_like(t) for n, t in tensors.items()})
    load(TrainState(model=model), tmp_path / "run", strict=False)
    assert all(torch.equal(getattr(model, n), t) for n, t in tensors.items())


def test_a_copy_that_failed_leaves_nothing(tmp_path):
    dcp_save({"model": {"w": torch.arange(1000.0)}}, tmp_path / "dcp")
    path, start = data_at(tmp_path / "dcp", offset=(0,))
    data = bytearray(path.read_bytes())
    data[start] ^= 1
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"model\.w: bytes"):
        copy(tmp_path / "dcp", tmp_path / "run", verify=True)
    path.write_bytes(data[:-300])
    with pytest.raises(Corrupt):
        copy(tmp_path / "dcp", tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*"))
    with pytest.raises(ValueError, match="one of distckpt, dcp"):
        copy(tmp_path / "dcp", tmp_path / "run", to="zarr")


_MEASURED = """
import json, sys
import distckpt.foreign.dcp_write, torch
from distckpt.tools.copy import copy

def resident():
    text = open("/proc/self/status").read().split()
    return int(text[text.index("VmHWM:") + 1]) * 1024

before = resident()
copy(sys.argv[1], sys.argv[2], to="distckpt")
copy(sys.argv[2], sys.argv[3], to="dcp")
print(json.dumps(resident() - before))
"""


def grown(*paths):
    """Bytes that the resident memory of a process grew by, at most, while it copied from the first on to the last."""
    program = [sys.executable, "-c", _MEASURED, *map(str, paths)]
    done = subprocess.run(
        program, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("chunks", "mib", "limit"),
    [(2, 128, 64 << 20), pytest.param(4, 512, 300 << 20, marks=pytest.mark.full)],
    ids=["256 MiB", "2 GiB"],
)
def test_a_copy_takes_little_memory_however_large_the_chunks(tmp_path, chunks, mib, limit):
    dcp_save({"model": {f"w{i}": torch.zeros(mib, 1 << 18) for i in range(chunks)}}, tmp_path / "dcp")
    assert grown(*(tmp_path / name for name in ("dcp", "run", "dcp2"))) < limit
