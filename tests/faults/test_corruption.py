"""Damage of every kind to every file of a committed checkpoint: found, named, and stepped back from on every rank."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer
from distckpt.errors import Corrupt, NotACheckpoint, StateWarning
from distckpt.format import datafile
from distckpt.format.layout import fqn_of
from distckpt.format.manifest import decode
from distckpt.run.trainstate import TrainState
from tests import layouts, ranks
from tests.faults import damage
from tests.faults.damage import STEP as DIRECTORY
from tests.faults.damage import TWO, each_rank, kind_of
from tests.faults.sharded import Sharded

WHOLE = damage.Whole(Sharded)


def _assert_found(changes, *told):
    assert not (found := damage.problem(WHOLE, changes, *told)), found


def _flipped(data, position, bit=0):
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def _chunks(key):
    data = WHOLE.store._data[key]
    info = next(f for f in decode(WHOLE.store._data[f"{DIRECTORY}/commit.json"], None).files if key.endswith(f.name))
    return datafile.decode_header(data[: info.header], info.size)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_of_a_chunk_is_reported_with_file_and_fqn(rank):
    key = WHOLE.files[f"rank-0000{rank}"]
    chunks = {name: c for name, c in _chunks(key).items() if not name.startswith("__")}
    assert {fqn_of(name) for name in chunks} >= {"model.rows", "optim.rows.exp_avg"}
    for name, chunk in chunks.items():
        for bit, position in enumerate((chunk.start, (chunk.start + chunk.stop) // 2, chunk.stop - 1)):
            _assert_found({key: _flipped(WHOLE.store._data[key], position, bit)}, key, fqn_of(name))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_flipped_bit_of_header_objects_or_checksum_table_is_reported_with_the_file(rank):
    key = WHOLE.files[f"rank-0000{rank}"]
    data, chunks = WHOLE.store._data[key], _chunks(key)
    header = min(c.start for c in chunks.values())
    places = [*range(9), 100, 300, header // 2, header - 1]
    places += [p for name in ("__objects__", "__checksums__") for p in range(chunks[name].start, chunks[name].stop)]
    for position in places:
        _assert_found({key: _flipped(data, position, position % 8)}, key)


@pytest.mark.parametrize("kind", ["trainer_state", "commit.json"])
def test_a_flipped_bit_of_a_json_file_is_reported_with_the_file(kind):
    key = WHOLE.files[kind]
    data = WHOLE.store._data[key]
    for position in sorted({*range(0, len(data), 13), *range(max(0, len(data) - 45), len(data))}):
        _assert_found({key: _flipped(data, position, position % 8)}, key)


ONE_FILE = {
    "truncated by a byte": lambda data: data[:-1],
    "truncated to half": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "longer by a byte": lambda data: data + b"\0",
    "zero-filled": lambda data: bytes(len(data)),
    "zero-filled at its end": lambda data: data[: -len(data) // 3] + bytes(len(data) - len(data[: -len(data) // 3])),
    "deleted": lambda data: None,
}


@pytest.mark.parametrize("damage", ONE_FILE)
@pytest.mark.parametrize("kind", ["rank-00000", "rank-00001", "trainer_state"])
def test_a_file_that_is_cut_zeroed_or_gone_is_reported_by_name(kind, damage):
    key = WHOLE.files[kind]
    _assert_found({key: ONE_FILE[damage](WHOLE.store._data[key])}, key)


@pytest.mark.parametrize("damage", sorted(ONE_FILE.keys() - {"deleted"}))
def test_a_commit_that_is_cut_or_zeroed_is_reported_by_name(damage):
    key = WHOLE.files["commit.json"]
    _assert_found({key: ONE_FILE[damage](WHOLE.store._data[key])}, key)


def test_a_step_whose_commit_is_gone_is_no_checkpoint():
    store = WHOLE.damaged({f"{DIRECTORY}/commit.json": None})
    for error in each_rank(store, lambda checkpointer, rank: checkpointer.load(Sharded(rank, TWO), step=2)):
        assert isinstance(error, NotACheckpoint)
        assert "step 2" in str(error)
    assert each_rank(store, lambda checkpointer, rank: checkpointer.resume(Sharded(rank, TWO)).step) == [1, 1]


@pytest.mark.parametrize("pair", [("rank-00000", "rank-00001"), ("rank-00000", "trainer_state")], ids="-".join)
def test_two_files_that_were_swapped_are_reported(pair):
    first, second = (WHOLE.files[kind] for kind in pair)
    _assert_found({first: WHOLE.store._data[second], second: WHOLE.store._data[first]}, f"{DIRECTORY}/")


@pytest.mark.parametrize("kind", ["rank-00000", "rank-00001", "trainer_state", "commit.json"])
def test_the_file_of_another_step_in_the_place_of_ours_is_reported(kind):
    key = WHOLE.files[kind]
    other = next(k for k in WHOLE.store._data if k.startswith("step-00000001/") and kind_of(k.split("/")[1]) == kind)
    assert kind == "commit.json" or len(WHOLE.store._data[other]) == len(WHOLE.store._data[key])
    _assert_found({key: WHOLE.store._data[other]}, key)


def test_files_of_another_attempt_beside_ours_change_nothing():
    beside = {
        key.replace("step-00000001/", f"{DIRECTORY}/"): data
        for key, data in WHOLE.store._data.items()
        if key.startswith("step-00000001/") and "commit" not in key
    }
    store = WHOLE.damaged(beside)
    assert each_rank(store, lambda checkpointer, rank: checkpointer.resume(Sharded(rank, TWO)).step) == [2, 2]


def test_damage_of_pointers_and_registry_changes_nothing():
    for key in ("last.json", "meta.json"):
        for data in (b"", b"{", b'{"checkpoint": "../../etc", "step": 9}', None):
            store = WHOLE.damaged({key: data})
            assert each_rank(store, lambda c, rank: c.resume(Sharded(rank, TWO)).step) == [2, 2]


def test_when_every_checkpoint_is_damaged_that_is_an_error_and_no_fresh_start():
    changes = {k: _flipped(v, len(v) // 2) for k, v in WHOLE.store._data.items() if k.endswith("commit.json")}
    for error in each_rank(WHOLE.damaged(changes), lambda checkpointer, rank: checkpointer.resume(Sharded(rank, TWO))):
        assert isinstance(error, Corrupt)
        assert "step 1: " in str(error)
        assert "step 2: " in str(error)


class _Large(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name in "abc":
            setattr(self, name, torch.nn.Parameter(torch.arange(600_000.0)))


def test_damage_in_a_large_file_is_narrowed_down_to_the_tensors_of_its_block(tmp_path):
    checkpointer = Checkpointer(tmp_path, wait=True)
    checkpointer.save(1, TrainState(model=_Large(), rng=False))
    path = next(tmp_path.glob("step-*/rank-*"))
    data = bytearray(path.read_bytes())
    data[4096 + 4 * 900_000] ^= 1  # in the middle of b
    path.write_bytes(data)
    with pytest.raises(Corrupt, match=r"hold model\.b$"):
        checkpointer.load(TrainState(model=_Large(), rng=False), step=1)


def test_a_resume_that_falls_back_warns(tmp_path):
    checkpointer = Checkpointer(tmp_path, timeout=1, wait=True)
    for step in (1, 2):
        checkpointer.save(step, TrainState(model=_Large(), rng=False))
    shutil.copy(tmp_path / "step-00000001" / "commit.json", tmp_path / "step-00000002" / "commit.json")
    with pytest.warns(StateWarning, match="step-00000002 is damaged"):
        assert Checkpointer(tmp_path, timeout=1, wait=True).resume(TrainState(model=_Large(), rng=False)).step == 1


def _damage_and_resume(root):
    """On each rank: what loading the damaged step says, then (step resumed, what is wrong, what was passed over)."""
    model = fully_shard(torch.nn.Linear(19, 7), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    state = layouts.train_state(model, None)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        for step in (1, 2):
            layouts.fill(state.capture(), salt=str(step))
            checkpointer.save(step, state)
        if dist.get_rank() == 0:
            path = next(Path(root, "step-00000002").glob("rank-00001.*.safetensors"))
            path.write_bytes(_flipped(path.read_bytes(), 4096 + 5))
        dist.barrier()
        error = ranks.expect_error(lambda: checkpointer.load(state, step=2), Corrupt)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        report = checkpointer.resume(state)
        return error, (report.step, layouts.wrong(state.capture(), salt="1"), report.fell_back_from)


def test_real_ranks_all_fall_back_to_the_same_step(tmp_path):
    (error, resumed), (error1, resumed1) = ranks.run(2, _damage_and_resume, str(tmp_path))
    assert "rank-00001." in error
    assert "model.weight" in error
    assert error == error1
    assert resumed == resumed1
    assert resumed[:2] == (1, [])
    assert "model.weight" in resumed[2][2]
