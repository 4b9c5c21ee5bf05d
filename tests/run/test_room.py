"""Whether a save has room is asked before it: a refusal comes at once, on every rank, and never where there is room."""

from __future__ import annotations

import errno
import os
import resource
from types import SimpleNamespace

import pytest
import torch

from distckpt import Checkpointer, Keep, Local, TrainState
from distckpt.errors import StoreError
from distckpt.saving import save as saving
from distckpt.saving.room import needed
from distckpt.store.local import LocalStore
from tests.disks import disk
from tests.faults.sharded import Sharded, on_threads
from tests.run.test_async import committed, state

BYTES = sum(4 * a * b for a, b in Sharded.SHAPES.values())


def _error(fn):
    with pytest.raises(StoreError) as caught:
        fn()
    return caught.value


def free(monkeypatch, nbytes):
    """Have every directory say that so many bytes are free."""
    monkeypatch.setattr(LocalStore, "room", lambda _: nbytes)


def files(root):
    return {str(p.relative_to(root)) for p in root.rglob("*")} - {"events.jsonl"}


@pytest.mark.parametrize("wait", [True, False])
def test_a_save_that_has_no_room_is_refused_at_once_on_every_rank_and_nothing_is_written(tmp_path, monkeypatch, wait):
    def work(comm):
        with Checkpointer(tmp_path, comm=comm, wait=wait, timeout=20) as c:
            c.resume(Sharded(comm.rank, 2))
            before = files(tmp_path)
            comm.all_gather("looked", b"")
            error = _error(lambda: c.save(1, Sharded(comm.rank, 2, 1)))
            same = before == files(tmp_path)
            comm.all_gather("refused", b"")
            free(monkeypatch, BYTES)
            c.save(2, Sharded(comm.rank, 2, 2))
        return str(error), error.errno, same

    free(monkeypatch, BYTES - 1)
    first, second = on_threads(2, work)
    assert first == second
    assert first[1:] == (errno.ENOSPC, True)
    assert first[0].startswith(f"step-00000001 needs 3.3 kB, and 3.3 kB are free in LocalStore('{tmp_path}')")
    assert committed(tmp_path) == [2]


@pytest.mark.parametrize("says", ["nothing", "an error"])
def test_a_file_system_that_does_not_tell_is_tried(tmp_path, monkeypatch, says):
    def statvfs(_):
        if says == "an error":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return SimpleNamespace(f_frsize=4096, f_bavail=0, f_bfree=0)

    monkeypatch.setattr(os, "statvfs", statvfs)
    assert LocalStore(tmp_path).room() is None
    with Checkpointer(tmp_path) as c:
        c.save(1, state(1)[0]).wait()
    assert committed(tmp_path) == [1]


def test_what_retention_is_about_to_free_is_not_missed(tmp_path):
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(1 << 18))
    with disk(tmp_path / "disk", "tmpfs", (3 << 20) + (300 << 10)) as at:
        with Checkpointer(at, keep=Keep(last=2)) as c:
            for step in range(8):
                c.save(step, TrainState(model=model, rng=False))
        assert committed(at) == [6, 7]


def test_frozen_weights_that_an_earlier_checkpoint_has_need_no_room(tmp_path, monkeypatch):
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(256, 256), "head": torch.nn.Linear(256, 1)})
    model["base"].requires_grad_(False)
    with Checkpointer(tmp_path) as c:
        c.save(1, TrainState(model=model)).wait()
        free(monkeypatch, 4 << 10)
        c.save(2, TrainState(model=model)).wait()
    assert committed(tmp_path) == [1, 2]


@pytest.mark.filterwarnings(
    "ignore::distckpt.errors.StateWarning"
)  # what replication sees of an attempt that goes away
def test_of_nodes_with_disks_of_their_own_one_that_is_full_is_told_on_every_rank(tmp_path, monkeypatch):
    def room(store):
        return BYTES // 4 if store.root == tmp_path / "node-1" else BYTES

    def work(comm):
        local = Local(tmp_path / f"node-{comm.rank}")
        with Checkpointer(tmp_path / "far", local=local, comm=comm, timeout=20) as c:
            c.resume(Sharded(comm.rank, 2))
            error = _error(c.save(1, Sharded(comm.rank, 2, 1)).wait)
            left = list((tmp_path / f"node-{comm.rank}").rglob("rank-*"))
            comm.all_gather("refused", b"")
            monkeypatch.setattr(LocalStore, "room", lambda _: BYTES // 2 + 100)  # each has half of it
            c.save(2, Sharded(comm.rank, 2, 2)).wait()
        return str(error), left

    monkeypatch.setattr(LocalStore, "room", room)
    results = on_threads(2, work, timeout=60)
    assert not [r for r in results if not isinstance(r, tuple)], results
    for error, left in results:
        assert "rank 1: step-00000001 needs 1.6 kB, and 829 B are free in" in error
        assert not left


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_needed_is_what_is_written(tmp_path, monkeypatch, size):
    told = []

    def counted(tensors, partitions, ranks):
        whole = needed(tensors, partitions)
        told.append((whole, [needed(tensors, partitions, [rank]) for rank in range(size)]))
        assert sum(told[-1][1]) == whole
        return whole

    monkeypatch.setattr(saving, "needed", counted)

    def work(comm):
        with Checkpointer(tmp_path, comm=comm, wait=True) as c:
            c.resume(Sharded(comm.rank, size))
            c.save(1, Sharded(comm.rank, size, 1))

    assert on_threads(size, work) == [None] * size
    written = [len(p.read_bytes()) for p in sorted(tmp_path.glob("step-*/rank-*"))]
    assert len(set(map(str, told))) == 1
    assert told[0][0] == BYTES
    assert all(0 < file - 4096 - need < 1000 for file, need in zip(written, told[0][1], strict=True))


def test_a_file_larger_than_one_may_be_says_so(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.ones(1 << 16))
    with Checkpointer(tmp_path, wait=True) as c:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 << 10, limits[1]))
        try:
            error = _error(lambda: c.save(1, TrainState(model=model)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.errno == errno.EFBIG
        assert "raise `ulimit -f`" in str(error)
        assert not list(tmp_path.glob("step-*"))
        c.save(2, TrainState(model=model))
    assert committed(tmp_path) == [2]
