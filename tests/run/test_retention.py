"""Retention on real files: what goes, what may never go, and what is left wherever the process ends in between."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import warnings

import pytest
import torch

from distckpt import Checkpointer, Keep, Progress, TrainState
from distckpt.errors import StateWarning, StoreError, Unsupported
from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.launches import open_launch
from distckpt.run.lease import lease, leased
from distckpt.run.sweep import clear_up, leftovers, sweep
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests import ranks
from tests.faults.failpoints import FaultyStore, Fuse
from tests.faults.sharded import Sharded


def state(value=0.0):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, value)
    return TrainState(model=model, rng=False)


def there(root):
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.is_symlink() and p.name.startswith("step"))


def registry(root):
    return {e["path"]: e for e in json.loads((root / "meta.json").read_text())["checkpoints"]}


@pytest.mark.parametrize("wait", [True, False])
def test_after_each_save_what_no_rule_keeps_goes(tmp_path, wait):
    loss = {10: 5.0, 20: 1.0, 30: 3.0, 40: 4.0, 50: 6.0}
    with Checkpointer(tmp_path, keep=Keep(last=2, best=("val_loss", "min", 1)), wait=wait) as c:
        for step, value in loss.items():
            c.save(step, state(), {"val_loss": value})
    assert there(tmp_path) == ["step-00000020", "step-00000040", "step-00000050"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"checkpoint": "step-00000020", "step": 20}
    assert {n: os.readlink(tmp_path / n) for n in ("last", "best")} == {
        "last": "step-00000050",
        "best": "step-00000020",
    }
    assert registry(tmp_path)["step-00000020"]["kept"] == ["one of the 1 best by val_loss (min)"]
    assert sorted(registry(tmp_path)) == there(tmp_path)
    assert json.loads((tmp_path / "meta.json").read_text())["keep"] == {"last": 2, "best": ["val_loss", "min", 1]}
    with Checkpointer(tmp_path) as c:
        assert c.resume(state()).step == 50


def test_each_epoch_has_a_name_that_follows_its_newest(tmp_path):
    progress = Progress()
    with Checkpointer(tmp_path, keep=Keep(per_epoch=True), wait=True) as c:
        for step, epoch in enumerate([0, 0, 1, 1, 2, 2], 1):
            progress.epoch = epoch
            c.save(step, TrainState(model=torch.nn.Linear(2, 2), progress=progress, rng=False))
    links = {p.name: os.readlink(p) for p in tmp_path.glob("epoch-*")}
    assert links == {
        "epoch-0000": "step-00000002",
        "epoch-0001": "step-00000004",
        "epoch-0002": "step-00000006",
    }
    assert [e["epoch"] for e in registry(tmp_path).values()] == [2, 2, 1, 0]  # step 5 is one of the two newest


def test_what_fn_wants_is_recorded_and_kept_by_later_launches_too(tmp_path):
    keep = Keep(last=1, fn=lambda step, metrics: f"accuracy {metrics['acc']}" if metrics["acc"] > 0.5 else None)
    with Checkpointer(tmp_path, keep=keep) as c:
        for step in range(1, 5):
            c.save(step, state(), {"acc": 0.9 if step == 1 else 0.1})
    with Checkpointer(tmp_path, keep=Keep(last=1)) as c:
        c.resume(state())
        c.save(5, state())
    assert there(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]
    assert registry(tmp_path)["step-00000001"]["kept"] == ["asked for when it was saved: accuracy 0.9"]


def test_an_fn_that_says_nonsense_fails_the_save_on_every_rank(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(fn=lambda *_: 7), wait=True) as c:
        with pytest.raises(Unsupported, match="fn returned 7"):
            c.save(1, state())
        assert c.steps() == []


def _train(root):
    import torch.distributed as dist

    rank = dist.get_rank()
    live = Sharded(rank, 2, 0)
    with Checkpointer(root, keep=Keep(last=2, every_steps=4)) as c:
        c.resume(live)
        for step in range(1, 8):
            live.set(step)
            c.save(step, live)
    fresh = Sharded(rank, 2)
    with Checkpointer(root, keep=Keep(last=2, every_steps=4)) as c:
        report = c.resume(fresh)
        assert report.step == 7
        return fresh.is_at(7)


def test_two_ranks_save_in_the_background_and_the_writer_keeps_what_is_asked(tmp_path):
    assert ranks.run(2, _train, str(tmp_path)) == [True, True]
    assert there(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_deletion_that_fails_is_warned_of_and_the_save_stands(tmp_path, monkeypatch):
    delete = LocalStore.delete

    def refuse(self, key):
        if key.startswith("step-00000001/"):
            raise StoreError("not today")
        delete(self, key)

    monkeypatch.setattr(LocalStore, "delete", refuse)
    with Checkpointer(tmp_path, keep=Keep(last=2), wait=True) as c:
        c.save(1, state())
        c.save(2, state())
        with pytest.warns(StateWarning, match="step-00000003 is committed, but what is not kept .* not today"):
            c.save(3, state())
        assert c.steps() == [1, 2, 3]
        monkeypatch.setattr(LocalStore, "delete", delete)
        c.save(4, state())
    assert there(tmp_path) == ["step-00000003", "step-00000004"]


def test_without_rules_nothing_goes(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        for step in range(1, 5):
            c.save(step, state())
    assert len(there(tmp_path)) == 4
    assert not (tmp_path / "best.json").exists()


def test_what_a_rewind_left_behind_goes_with_the_next_save(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(last=5), wait=True) as c:
        for step in (1, 2, 3):
            c.save(step, state())
    with Checkpointer(tmp_path, keep=Keep(last=5), wait=True) as c:
        c.resume(state(), step=1)
        assert len(there(tmp_path)) == 3
        c.save(2, state())
    assert there(tmp_path) == ["step-00000001", "step-00000002.2"]
    with Checkpointer(tmp_path) as c:
        assert c.resume(state()).step == 2


def test_a_name_that_is_used_again_is_not_taken_for_what_it_was(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(last=2), wait=True) as c:
        for step in (1, 2, 3):
            c.save(step, state())
        c.resume(state(), step=2)
        c.save(4, state())  # step 3 goes
        c.resume(state(), step=2)
        c.save(3, state())
        assert c.steps() == [2, 3]


# -- readers ---------------------------------------------------------------------------------------------------------


def test_what_a_reader_has_a_lease_on_stays_until_it_expires(tmp_path):
    with Checkpointer(tmp_path, keep=Keep(last=1), wait=True) as c:
        c.save(1, state())
        with lease(LocalStore(tmp_path), StepDir(1), seconds=60):
            for step in (2, 3, 4):
                c.save(step, state())
            assert there(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]
            assert registry(tmp_path)["step-00000001"]["kept"] == ["a reader has a lease on it"]
        assert not (tmp_path / "leases").exists()
        with lease(LocalStore(tmp_path), StepDir(3), seconds=-1):
            c.save(5, state())
            assert there(tmp_path) == ["step-00000004", "step-00000005"]


def test_a_reader_that_opened_the_commit_in_time_finds_the_files(tmp_path, monkeypatch):
    original = LocalStore.delete
    readers = []

    def delete(self, key):
        if key == "step-00000001/commit.json":  # it has read the commit, and its lease was there before
            readers.append(lease(LocalStore(tmp_path), StepDir(1)))
            readers[0].__enter__()
        original(self, key)

    monkeypatch.setattr(LocalStore, "delete", delete)
    with Checkpointer(tmp_path, keep=Keep(last=2), wait=True) as c:
        for step in (1, 2, 3):
            c.save(step, state())
        assert list((tmp_path / "step-00000001").glob("rank-00000.*"))
        assert c.steps() == [2, 3]
    readers[0].__exit__(None, None, None)
    with Checkpointer(tmp_path) as c:
        c.resume(state())
    assert there(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_load_holds_a_lease_while_it_reads(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
    seen = []

    live = state()
    restore = live.restore
    live.restore = lambda saved: (seen.append(leased(LocalStore(tmp_path))), restore(saved))[1]
    with Checkpointer(tmp_path, wait=True) as c:
        c.load(live)
        assert not leased(LocalStore(tmp_path))
        c.resume(live)
    assert seen == [{StepDir(1)}] * 2
    assert not (tmp_path / "leases").exists()


def test_a_run_that_cannot_be_written_to_is_read_without_a_lease_and_says_so(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())

    def refuse(self, key, *_, **__):
        raise StoreError("read-only")

    monkeypatch.setattr(LocalStore, "write", refuse)
    with Checkpointer(tmp_path, wait=True) as c:
        report = c.load(state())
    assert any("without a lease" in note and "read-only" in note for note in report.notes)


# -- what is left behind ---------------------------------------------------------------------------------------------


def litter(store):
    """Files of a save that was killed: of rank 0's, half a data file; an object; an ack of another rank."""
    for name in (
        "rank-00000.aaaaaaaaaaaa.safetensors",
        "trainer_state.aaaaaaaaaaaa.json",
        "ack-00001.aaaaaaaaaaaa.json",
    ):
        write_all(store, f"step-00000009/{name}", b"?")
    (store.root / "step-00000009/.tmp-0123abcd-rank-00001.aaaaaaaaaaaa.safetensors").write_bytes(b"half")
    (store.root / ".tmp-0123abcd-meta.json").write_bytes(b"half")


def test_a_resume_removes_what_killed_saves_left_behind_and_nothing_else(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
    store = LocalStore(tmp_path)
    litter(store)
    write_all(store, "step-00000001/rank-00000.bbbbbbbbbbbb.safetensors", b"of another attempt")
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000020").mkdir()
    (tmp_path / "step-00000020" / "model.pt").write_text("mine, too")
    with Checkpointer(tmp_path, wait=True) as c:
        assert c.resume(state()).step == 1
    assert there(tmp_path) == ["step-00000001", "step-00000020"]
    assert not list(tmp_path.rglob(".tmp-*")) + list(tmp_path.rglob("*.bbbbbbbbbbbb.*"))
    assert (tmp_path / "step-00000001" / "notes.txt").exists()


def test_without_knowing_that_a_launch_has_ended_only_older_ones_are_swept(tmp_path):
    store = LocalStore(tmp_path)
    open_launch(store, None, 1, "then")
    litter(store)
    history = History(store)
    assert not any(left.over for left in leftovers(history))
    number = open_launch(store, None, 1, "now")
    assert not any(left.over for left in leftovers(history))  # written just before: clocks may differ by so much
    record = tmp_path / "launches" / f"{number:04d}.json"
    os.utime(record, (time.time() + 3600,) * 2)
    found = leftovers(history)
    assert len(found) == 5
    assert all(left.over for left in found)
    removed, problems = sweep(history, found)
    assert (len(removed), problems) == (5, [])
    assert there(tmp_path) == []


def test_what_is_committed_after_all_is_not_swept(tmp_path):
    store = LocalStore(tmp_path)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
        c.save(2, state())
    commit = tmp_path / "step-00000002" / "commit.json"
    content = commit.read_bytes()
    commit.unlink()
    history = History(store)
    found = leftovers(history, alone=True)
    assert {left.prefix for left in found} == {"step-00000002"}
    commit.write_bytes(content)
    assert sweep(history, found) == ([], [])
    assert there(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_damaged_commit_hides_what_it_names_so_nothing_beside_it_is_swept(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, state())
        c.save(2, state())
    commit = tmp_path / "step-00000002" / "commit.json"
    commit.write_bytes(commit.read_bytes()[:-9])
    history = History(LocalStore(tmp_path))
    assert leftovers(history, alone=True) == []


@pytest.mark.parametrize("kind", ["sweep", "retention"])
def test_a_fault_at_any_point_of_a_deletion_leaves_a_run_that_goes_on(kind):
    """The n-th thing asked of the store fails, and all after it, n = 1, 2, ...: whatever was to go, the rest loads."""
    base, live = MemoryStore(), Sharded(0, 1, 0)
    with Checkpointer(base, wait=True) as c:
        for step in (1, 2, 3):
            live.set(step)
            c.save(step, live)
    write_all(base, "step-00000004/rank-00000.aaaaaaaaaaaa.safetensors", b"?")
    for n in itertools.count(1):
        store, fuse = MemoryStore(), Fuse()
        store._data = dict(base._data)
        faulty = FaultyStore(store, fuse)
        with warnings.catch_warnings(), Checkpointer(faulty, keep=Keep(last=2), wait=True, timeout=0.4) as c:
            warnings.simplefilter("ignore", StateWarning)
            if kind == "retention":
                c.resume(live)
                live.set(5)
            fuse.arm(n, forever=True)
            with contextlib.suppress(StoreError):
                clear_up(History(faulty), 99) if kind == "sweep" else c.save(5, live)
            fuse.disarm()
        kept = {found.directory.step for found in History(store).valid()}
        assert len(kept) >= 2
        fresh = Sharded(0, 1, 0)
        with Checkpointer(store, wait=True, timeout=0.4) as c:
            report = c.resume(fresh)
            assert report.step in {max(kept), 5}  # what was complete is rolled forward
            assert fresh.is_at(report.step)
            c.save(9, fresh)
        if not fuse.blown:
            return
