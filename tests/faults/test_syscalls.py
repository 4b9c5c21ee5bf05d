"""The calls that faults are put into are all that there are."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.errors import StoreError
from distckpt.store.base import read_all, write_all
from distckpt.store.local import LocalStore
from tests import ranks
from tests.faults import syscalls
from tests.faults.failpoints import RANDOM, Fuse


def _state():
    return TrainState(model=torch.nn.Linear(3, 2), rng=False)


def _seen_and_audited(root):
    """Paths that Python itself reports to be opened, listed and changed below root, and points of the same time."""
    audited, fuse = set(), Fuse()
    changes = {
        "open",
        "os.scandir",
        "os.listdir",
        "os.mkdir",
        "os.rmdir",
        "os.remove",
        "os.rename",
        "os.link",
        "os.symlink",
    }

    def hear(event, args):
        if event in changes:
            path = str(args[event in {"os.rename", "os.link", "os.symlink"}])
            audited.update([path] if path.startswith(root) else [])

    sys.addaudithook(hear)
    fuse.arm()
    with syscalls.points(root, fuse), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (1, 2, 3):
            with Checkpointer(root, wait=True, keep=Keep(last=2, best=("loss", "min", 1))) as c:
                state = _state()
                c.resume(state)
                c.save(step, state, {"loss": 1 / step})
    return {point.split(" ")[1] for point in fuse.trace}, {RANDOM.sub("*", os.path.relpath(p, root)) for p in audited}


def test_python_itself_reports_no_file_that_has_no_point(tmp_path):
    ((named, audited),) = ranks.run(1, _seen_and_audited, str(tmp_path))
    assert len(audited) > 20
    assert not audited - named


def test_half_of_a_call_is_done_and_then_the_fault_comes(tmp_path):
    store, data = LocalStore(tmp_path / "run"), bytes(range(100))
    left = []

    def look(_):
        left.extend(p.read_bytes() for p in tmp_path.glob("run/.tmp-*"))
        raise OSError(errno.EIO, "broken")

    fuse = Fuse(look)
    fuse.arm("pwritev .tmp-*-key torn")
    with syscalls.points(tmp_path / "run", fuse), pytest.raises(StoreError, match="broken"):
        write_all(store, "key", data)
    assert left == [data[:50]]


@pytest.mark.parametrize("point", ["pwritev .tmp-*-key torn", "preadv key torn"])
def test_a_call_that_stops_short_goes_on(tmp_path, point):
    store, data, fuse = LocalStore(tmp_path / "run"), bytes(range(101)), Fuse(lambda _: None)
    fuse.arm(point, forever=True)
    with syscalls.points(tmp_path / "run", fuse):
        write_all(store, "key", data)
        assert read_all(store, "key", limit=101) == data
    assert fuse.blown


def test_the_writer_process_has_points_too(tmp_path):
    told = tmp_path / "told"
    planted = syscalls.in_writer(syscalls.plant, str(tmp_path / "run"), str(told), "fsync step-00000002")
    with planted, Checkpointer(tmp_path / "run", timeout=20) as c:
        c.save(1, _state()).wait()
        with pytest.raises(StoreError, match="killed by signal 9"):
            c.save(2, _state()).wait()
    assert Path(told).read_text().splitlines()[-1] == "fsync step-00000002"
