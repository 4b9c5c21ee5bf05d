"""Disks that are full: told on every rank before a byte is written, or where only writing finds it; nothing is lost."""

from __future__ import annotations

import os
import re

import pytest

from distckpt import Checkpointer
from distckpt.errors import DistckptError
from distckpt.store.local import LocalStore
from tests.disks import disk
from tests.faults.sharded import Sharded, on_threads

MB = 1 << 20
FULL = r"free room, or keep fewer checkpoints"


class Large(Sharded):
    """About 2 MiB, of which each of two ranks writes half."""

    SHAPES = {"model.rows": (1000, 256), "optim.rows.exp_avg": (1000, 256), "model.same": (5, 3)}


class Larger(Sharded):
    """About 18 MiB: files that are written past the page cache, into room that is set aside first."""

    SHAPES = {"model.rows": (1152, 2048), "optim.rows.exp_avg": (1152, 2048), "model.same": (5, 3)}


def filled(root, size, kind, *, wait, most=20):
    """Save step after step until the disk is full, then make room and save once more, in the same job.

    Returns, of each rank: (the last step that was saved, what the next one raised).
    """
    hog = root.parent / "hog"

    def work(comm):
        with Checkpointer(root, comm=comm, wait=wait, timeout=30) as c:
            c.resume(kind(comm.rank, size))
            for step in range(1, most):
                free = os.statvfs(root).f_bfree
                comm.all_gather("free", b"")
                if error := _error(lambda step=step: _saved(c, step, kind(comm.rank, size, step))):
                    break
            comm.all_gather("full", b"")
            there = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.name.startswith(".tmp-"))
            assert not there, there
            assert not (root / f"step-{step:08}").exists()
            assert free - os.statvfs(root).f_bfree <= 2  # what events.jsonl says of it
            comm.all_gather("looked", b"")
            hog.unlink(missing_ok=True)
            for last in range(1, step):
                state = kind(comm.rank, size)
                c.load(state, step=last)
                assert state.is_at(last)
            _saved(c, step + 1, kind(comm.rank, size, step + 1))
        with Checkpointer(root, comm=comm, wait=wait, timeout=30) as c:
            state = kind(comm.rank, size)
            assert c.resume(state).step == step + 1
            assert state.is_at(step + 1)
        return step - 1, str(error)

    hog.write_bytes(bytes(3 * sum(4 * a * b for a, b in kind.SHAPES.values()) // 2))
    return on_threads(size, work, timeout=120)


def _saved(c, step, state):
    if made := c.save(step, state):
        made.wait() if hasattr(made, "wait") else None


def _error(fn):
    try:
        fn()
    except DistckptError as e:
        return e


@pytest.mark.parametrize("wait", [True, False], ids=["waited for", "in the background"])
@pytest.mark.parametrize("known", [True, False], ids=["asked before", "found by writing"])
@pytest.mark.parametrize(
    ("on", "size", "kind"),
    [("tmpfs", 2, Large), pytest.param("tmpfs", 1, Large, marks=pytest.mark.full)]
    + [pytest.param("ext4", n, kind, marks=pytest.mark.full) for n in (1, 2) for kind in (Large, Larger)],
)
def test_a_full_disk_costs_the_save_and_nothing_else(tmp_path, monkeypatch, on, size, kind, known, wait):
    if not known:
        monkeypatch.setattr(LocalStore, "room", lambda _: None)  # as with a quota
    with disk(tmp_path / "disk", on, (9 if kind is Large else 80) * MB) as at:
        (at / "run").mkdir()
        results = filled(at / "run", size, kind, wait=wait)
    assert not [r for r in results if not isinstance(r, tuple)], results
    assert len({saved for saved, _ in results}) == 1
    assert results[0][0] >= 2
    for rank, (_, error) in enumerate(results):
        assert re.search(FULL, error), error
        assert ("nothing was written" in error) == known
        assert known or size == 1 or re.search(r"ranks? [01]", error), (rank, error)
