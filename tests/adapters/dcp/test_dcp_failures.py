"""What torch.distributed.checkpoint loses in silence: each shown with torch's own storage first, then with ours."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import distckpt
from distckpt.adapters.dcp import StorageReader, StorageWriter
from tests import disks, ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]


# -- a full disk, in a helper thread -----------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB."""
    with disks.disk(tmp_path / "disk", "tmpfs", 1 << 20) as target:
        yield target


def six(numel):
    return {f"t{i}": torch.full((numel,), float(i)) for i in range(6)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_in_a_helper_thread(disk, tmp_path):
    def torch_says_saved(path):
        """Save from two threads, to two files of three tensors each, of which one file gets no room."""
        path.mkdir()
        (path / "__0_0.distcp").symlink_to("/dev/full")
        try:
            dcp.save(six(10), storage_writer=dcp.FileSystemWriter(path, thread_count=2))
        except CheckpointException:
            return False  # the main thread happened to take the file, and told
        return True

    path = next(path for n in range(50) if torch_says_saved(path := tmp_path / str(n)))
    lost = []
    for name in six(10):
        try:
            dcp.load({name: torch.zeros(10)}, storage_reader=dcp.FileSystemReader(path))
        except CheckpointException:
            lost.append(name)
    assert len(lost) == 3, "half of the tensors are lost, and the save succeeded"

    dcp.save(six(10), storage_writer=StorageWriter(disk))
    with pytest.raises(CheckpointException, match="the file system is full"):
        dcp.save(six(1 << 18), storage_writer=StorageWriter(disk))
    assert [p.name for p in disk.glob("step-*")] == ["step-00000000"], "nothing is left of what failed"
    into = six(10)
    into["t5"].zero_()
    dcp.load(into, storage_reader=StorageReader(disk))
    assert into["t5"].tolist() == [5.0] * 10


# -- a rank that dies while a path is saved again ---------------------------------------------------------------


class Dying(dcp.DefaultSavePlanner):
    """Kills its process before it writes anything."""

    def finish_plan(self, new_plan):
        os.kill(os.getpid(), signal.SIGKILL)


def _save_again(root, ours):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))

    def save(step, planner=None):
        tree = {"t": DTensor.from_local(torch.full((2,), float(step)), mesh, [Shard(0)])}
        writer = StorageWriter(root) if ours else dcp.FileSystemWriter(root)
        dcp.save(tree, storage_writer=writer, planner=planner)

    save(1)
    if dist.get_rank():
        save(2, Dying())
    try:
        save(2)
    except (RuntimeError, CheckpointException):
        return
    raise AssertionError("a save without rank 1 succeeded")


@pytest.mark.parametrize("ours", [False, True], ids=["torch", "distckpt"])
def test_a_rank_killed_while_a_path_is_saved_again(tmp_path, ours):
    ranks.run(2, _save_again, str(tmp_path), ours, may_die={1})
    into = {"t": torch.zeros(4)}
    dcp.load(into, storage_reader=StorageReader(tmp_path) if ours else dcp.FileSystemReader(tmp_path))
    if ours:
        assert into["t"].tolist() == [1.0, 1.0, 1.0, 1.0]
    else:
        assert into["t"].tolist() == [2.0, 2.0, 1.0, 1.0], "steps are mixed, and nothing tells"


# -- a flipped bit -----------------------------------------------------------------------------------------------


def flip(file, needle):
    data = bytearray(file.read_bytes())
    data[data.index(needle) + 100] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit(tmp_path):
    saved = {"t": torch.arange(1000, dtype=torch.int32)}
    needle = saved["t"].numpy().tobytes()
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
    flip(tmp_path / "torch" / "__0_0.distcp", needle)
    into = {"t": torch.zeros(1000, dtype=torch.int32)}
    dcp.load(into, storage_reader=dcp.FileSystemReader(tmp_path / "torch"))
    assert int((into["t"] != saved["t"]).sum()) == 1, "one number is wrong, and nothing tells"

    dcp.save(saved, storage_writer=StorageWriter(tmp_path / "ours"))
    flip(next((tmp_path / "ours").glob("step-*/rank-*")), needle)
    with pytest.raises(CheckpointException, match=r"do not match their checksum; they hold .*\bt\b"):
        dcp.load(into, storage_reader=StorageReader(tmp_path / "ours"))


# -- values of each rank under one key --------------------------------------------------------------------------


def _rank_local(root, way):
    rank = dist.get_rank()
    tree = {"rng": torch.full((2,), rank), "seed": 10 + rank}
    into = {"rng": torch.full((2,), 9), "seed": 9}
    if way == "torch":
        dcp.save(tree, storage_writer=dcp.FileSystemWriter(root))
        dcp.load(into, storage_reader=dcp.FileSystemReader(root))
    elif way == "drop-in":
        return ranks.expect_error(lambda: dcp.save(tree, storage_writer=StorageWriter(root)), CheckpointException)
    else:
        distckpt.save(root, tree)
        distckpt.load(root, into)
    return into["rng"].tolist(), into["seed"]


def test_values_of_each_rank_under_one_key(tmp_path):
    first, second = ranks.run(2, _rank_local, str(tmp_path / "torch"), "torch")
    assert first == second, "torch gives one rank's value to both"
    for said in ranks.run(2, _rank_local, str(tmp_path / "drop-in"), "drop-in"):
        assert "rng: rank 0 and rank 1 differ" in said
        assert "seed: rank 0 and rank 1 differ" in said
    assert ranks.run(2, _rank_local, str(tmp_path / "fast"), "fast") == [([0, 0], 10), ([1, 1], 11)]


# -- keys that are no text ---------------------------------------------------------------------------------------


def test_keys_that_are_numbers(tmp_path):
    saved, into = {"x": {1: "one"}}, {"x": {1: ""}}
    dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path / "torch"))
    dcp.load(into, storage_reader=dcp.FileSystemReader(tmp_path / "torch"))
    assert into == {"x": {1: "", "1": "one"}}, "the value comes back under another key, the old one stays"
    into = {"x": {1: ""}}
    distckpt.save(tmp_path / "ours", saved)
    distckpt.load(tmp_path / "ours", into)
    assert into == saved


# -- asking for a state makes a step -----------------------------------------------------------------------------


def test_an_optimizer_asked_for_its_state(tmp_path):
    def fresh():
        model = torch.nn.Linear(2, 1)
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = fresh()
    get_optimizer_state_dict(model, optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}, "before any training"

    model, optimizer = fresh()
    state = distckpt.TrainState(model=model, optimizer=optimizer, rng=False)
    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        assert not optimizer.state
        checkpointer.load(state)
        assert not optimizer.state
    distckpt.save(tmp_path / "direct", {"model": model, "optim": optimizer})
    distckpt.load(tmp_path / "direct", {"model": model, "optim": optimizer})
    assert not optimizer.state
