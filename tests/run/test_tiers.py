"""A directory in front of a run's root: saves commit there, and are replicated to the root in the background."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt import After, Checkpointer, Keep, Local, TrainState
from distckpt.errors import Corrupt, RunConflict, StateWarning, StoreError, Unsupported
from distckpt.format.checksum import BLOCK
from distckpt.run import outbound, replicate
from distckpt.run.history import History
from distckpt.run.job import Job
from distckpt.run.lease import lease, leased
from distckpt.run.replicate import Replicator, Rules
from distckpt.store.local import LocalStore
from distckpt.store.tiers import Tiers
from tests.run.lives import until
from tests.store import servers


class Training:
    """A small model that is trained and saved."""

    def __init__(self, width=64):
        torch.manual_seed(0)
        self.model = nn.Linear(width, width)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = TrainState(model=self.model, optimizer=self.optimizer)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(4, self.model.in_features)).square().sum().backward()
        self.optimizer.step()

    def content(self):
        moments = [v for state in self.optimizer.state.values() for _, v in sorted(state.items())]
        return [t.clone() for t in (*self.model.parameters(), *moments)]


def train(far, near, steps, training=None, *, wait=False, **options):
    """Save after each of these steps; what the state was after the last."""
    training = training or Training()
    with Checkpointer(far, local=near, timeout=30, **options) as c:
        c.resume(training.state)
        for step in steps:
            training.step()
            c.save(step, training.state, wait=wait)
    return training.content()


def resumed(far, near=None, **options):
    training = Training()
    with Checkpointer(far, local=near, timeout=30, **options) as c:
        report = c.resume(training.state)
    return training.content(), report


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def steps_at(root):
    return sorted({c.directory.step for c in History(LocalStore(root)).valid()})


def events(near):
    return [json.loads(line) for line in (near / "events.jsonl").read_text().splitlines()]


def data_file(root, step):
    return next((root / f"step-{step:08d}").glob("rank-*.safetensors"))


@pytest.mark.parametrize("wait", [False, True])
def test_what_is_saved_lies_in_both_when_the_checkpointer_is_closed(near, far, wait):
    saved = train(far, near, [1, 2], wait=wait)
    for root in (near, far):
        assert steps_at(root) == [1, 2]
        assert json.loads((root / "last.json").read_text())["step"] == 2
    assert same(resumed(far)[0], saved)
    assert data_file(far, 2).read_bytes() == data_file(near, 2).read_bytes()


def test_each_tier_keeps_by_its_own_rules(near, far):
    for step in range(1, 6):  # each sent before the next: what is being sent stays
        train(far, Local(near, keep=Keep(last=2)), [step], wait=True, keep=Keep(last=3))
    assert steps_at(near) == [4, 5]
    assert steps_at(far) == [3, 4, 5]


def test_while_a_save_is_under_way_nothing_is_sent(near, far, monkeypatch):
    monkeypatch.setattr(replicate, "_HELD", 30.0)
    rules = Rules(None, None, None, behind=60.0).to_json()
    addresses = {"near": LocalStore(near).address, "far": LocalStore(far).address}
    told = []
    replicator = Replicator({**addresses, "rules": rules, "apart": None}, told.append)
    replicator.give_way(saving=True)
    with Checkpointer(near) as c:
        c.save(1, Training().state, wait=True)
    replicator.again()
    time.sleep(0.5)
    assert steps_at(far) == []
    replicator.give_way(saving=False)
    replicator.finish(20)
    assert steps_at(far) == [1]
    assert told == []


def test_where_the_near_directory_is_gone_a_resume_reads_the_root_and_goes_on(near, far):
    saved = train(far, near, [1, 2])
    shutil.rmtree(near)
    loaded, report = resumed(far, near)
    assert same(loaded, saved)
    assert report.step == 2
    assert any("read from" in note for note in report.notes)
    train(far, near, [3])
    assert steps_at(far) == [1, 2, 3]
    assert [launch.name for launch in sorted((near / "launches").glob("????.json"))] == [
        f"000{n}.json" for n in (1, 2, 3)
    ]


def test_a_near_resume_reads_nothing_from_the_root(near, far):
    saved = train(far, near, [1, 2])
    for file in far.rglob("*.safetensors"):
        file.write_bytes(b"")
    loaded, report = resumed(far, near)
    assert same(loaded, saved)
    assert not any("read from" in note for note in report.notes)


@pytest.mark.parametrize("harm", ["flip", "cut", "header", "table", "remove", "commit", "object"])
def test_what_is_damaged_near_is_read_from_the_root_and_nothing_else(near, far, harm):
    saved = train(far, near, [1, 2])
    victim = data_file(near, 2)
    if harm == "commit":
        victim = victim.with_name("commit.json")
    if harm == "object":
        victim = next(victim.parent.glob("optim.*.json"))
    data = bytearray(victim.read_bytes())
    at = {"flip": len(data) // 2, "header": 30, "table": len(data) - 2}.get(harm, len(data) // 2)
    data[at] ^= 1
    victim.write_bytes(data[: len(data) // 2] if harm == "cut" else data)
    if harm == "remove":
        victim.unlink()
    places = Tiers(LocalStore(near), LocalStore(far))
    training = Training()
    with Checkpointer(far, local=near, timeout=30) as c:
        assert c.resume(training.state).step == 2
        places = c._places.whole
    assert same(training.content(), saved)
    assert {key for key in places.fetched if key.startswith("step-")} == {f"step-00000002/{victim.name}"}


def test_of_a_disk_that_fails_the_root_has_the_files(near, far, monkeypatch):
    saved = train(far, near, [1, 2])
    read = LocalStore.read

    def fails(store, key, start, buffers):
        if store.root == near and key.startswith("step-00000002/rank-"):
            raise StoreError(f"cannot read {key}: Input/output error")
        read(store, key, start, buffers)

    monkeypatch.setattr(LocalStore, "read", fails)
    loaded, report = resumed(far, near)
    assert (report.step, same(loaded, saved)) == (2, True)
    assert any("read from" in note for note in report.notes)
    shutil.rmtree(far / "step-00000002")
    with pytest.raises(StoreError, match="Input/output error"):
        resumed(far, near)


def test_what_is_damaged_in_both_makes_it_fall_back(near, far):
    train(far, near, [1])
    before = resumed(far)[0]
    train(far, near, [2])
    for root in (near, far):
        victim = data_file(root, 2)
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    with pytest.warns(StateWarning, match="falling back"):
        loaded, report = resumed(far, near)
    assert same(loaded, before)
    assert report.step == 1


def test_what_is_damaged_near_is_not_sent(near, far):
    train(far, near, [1])
    training = Training()
    shutil.rmtree(far / "step-00000001")
    victim = data_file(near, 1)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    c = Checkpointer(far, local=near, timeout=4)
    with pytest.raises(Corrupt):
        c.load(training.state)
    c._saver.replicate()
    time.sleep(0.5)
    with pytest.warns(StateWarning, match="do not match their checksum"):
        c.close()
    assert not (far / "step-00000001" / "commit.json").exists()


def test_what_a_job_could_not_send_the_next_one_sends(near, far):
    saved = train(far, near, [1, 2])
    sent = data_file(far, 2)
    shutil.rmtree(far / "step-00000001")
    (far / "step-00000002" / "commit.json").unlink()
    before = sent.stat().st_ino
    assert resumed(far, near)[1].step == 2
    assert steps_at(far) == [1, 2]
    assert sent.stat().st_ino == before  # it was there: only the commit was missing
    assert same(resumed(far)[0], saved)
    assert [e["bytes"] for e in events(near) if e["event"] == "replicated"][-2] == 0


def test_what_a_killed_replication_left_half_sent_goes_and_what_may_still_be_written_stays(near, far):
    train(far, near, [1], wait=True)
    shutil.rmtree(far / "step-00000001")
    (far / "step-00000001").mkdir()
    old, young = (
        far / "step-00000001/.tmp-0123abcd-rank-00000.aaaaaaaaaaaa.safetensors",
        far / ".tmp-0123abcd-meta.json",
    )
    for path in old, young:
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 120,) * 2)
    resumed(far, near)
    assert not old.exists()
    assert young.exists()
    assert steps_at(far) == [1]


def test_a_step_that_the_root_has_from_another_machine_is_saved_as_its_next_generation(near, far, tmp_path):
    train(far, near, [1, 2])
    training = Training()
    with Checkpointer(far, local=tmp_path / "elsewhere", timeout=30) as c:
        c.resume(training.state, step=1)
        training.step()
        c.save(2, training.state)
    assert sorted(p.name for p in far.glob("step-*")) == ["step-00000001", "step-00000002", "step-00000002.2"]
    loaded, report = resumed(far, near)  # this machine has the step that was left behind: it does not count
    assert same(loaded, training.content())
    assert report.step == 2


def test_a_job_that_was_superseded_from_another_machine_sends_nothing_more(near, far, tmp_path):
    train(far, near, [1])
    training = Training()
    with Checkpointer(far, local=near, timeout=30) as c:
        c.resume(training.state)
        resumed(far, tmp_path / "elsewhere")
        training.step()
        c.save(2, training.state, wait=True)
        with pytest.warns(StateWarning, match="a later launch, elsewhere"):
            c.close()
    assert steps_at(far) == [1]


def test_it_is_warned_of_a_root_that_cannot_be_written_and_saves_go_on(near, far):
    training = Training()
    c = Checkpointer(far, local=near, timeout=4)
    c.resume(training.state)
    (far / "step-00000001").write_text("in the way")
    training.step()
    c.save(1, training.state, wait=True)
    assert steps_at(near) == [1]
    with pytest.warns(StateWarning, match="replicating to"):
        c.close()
    (far / "step-00000001").unlink()
    resumed(far, near)
    assert steps_at(far) == [1]


def test_what_is_left_to_send_is_sent_however_long_the_load_lasts(near, far, monkeypatch):
    train(far, near, [1, 2])
    shutil.rmtree(far / "step-00000002")
    open_launch = Job.open
    monkeypatch.setattr(Job, "open", lambda *given: (time.sleep(2), open_launch(*given)))
    with Checkpointer(far, local=Local(near, bandwidth="20 kB"), timeout=30) as c:
        c.resume(Training().state)
        until(lambda: steps_at(far) == [1, 2], 15)


def test_what_is_being_sent_has_a_lease_for_as_long_as_that_lasts(near, far, monkeypatch):
    train(near, None, [1], Training(700), wait=True)
    monkeypatch.setattr(replicate, "LEASED", 1.2)
    monkeypatch.setattr(replicate, "lease", partial(lease, seconds=1.2))
    monkeypatch.setattr(outbound, "_PIECE", BLOCK)
    rules = Rules(None, None, 2_000_000, 60).to_json()
    stores = [LocalStore(root) for root in (near, far)]
    near_, far_ = (store.address for store in stores)
    sending = Replicator({"near": near_, "far": far_, "rules": rules, "apart": None}, lambda _: None)
    until(lambda: leased(stores[0]))
    held = []
    while steps_at(far) != [1]:
        held.append(bool(leased(stores[0])))
        time.sleep(0.05)
    assert len(held) > 30
    assert held.count(False) <= 1  # it had just been given back
    sending.finish(5)


def test_what_fails_at_the_root_after_a_commit_is_told(near, far):
    train(far, near, [1])
    (far / "meta.json").unlink()
    (far / "meta.json").mkdir()
    with pytest.warns(StateWarning, match="root.*step-00000002 is committed, but last.json or meta.json could not be"):
        train(far, near, [2])
    assert steps_at(far) == [1, 2]


def test_the_two_places_must_differ(near):
    near.mkdir()
    (near.parent / "link").symlink_to(near)
    for same in (near, f"file://{near}", near.parent / "link", near / ".." / near.name):
        with pytest.raises(ValueError, match="is the same directory as root"):
            Checkpointer(near, local=same)
    for no_directory in ("s3://bucket/run", "memory://run", "", 3, True):
        with pytest.raises(Unsupported, match="a directory is expected"):
            Checkpointer(near / "a", local=no_directory)
    with pytest.raises(Unsupported, match="no other process can send there"):
        Checkpointer("memory://run", local=near)
    with pytest.raises(ValueError, match="at least one byte a second"):
        Checkpointer(near / "a", local=Local(near, bandwidth=0))
    with pytest.raises(ValueError, match="a Keep, or None"):
        Checkpointer(near / "a", local=Local(near, keep=3))
    with pytest.raises(ValueError, match="behind"):
        Checkpointer(near / "a", local=Local(near, behind="soon"))
    with pytest.raises(ValueError, match="a size such as"):
        Checkpointer(near / "a", local=Local(near, bandwidth="fast"))


def test_the_code_of_the_page_on_object_stores_runs(tmp_path, monkeypatch):
    bucket = servers.start("moto").bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    page = (Path(__file__).parents[2] / "docs" / "object-stores.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    code = code.replace("s3://bucket", bucket.uri).replace("/nvme", str(tmp_path))
    *lines, load = code.strip().splitlines()
    names = {}
    exec("\n".join(lines), names)
    training = Training()
    with Checkpointer(f"{bucket.uri}/runs/first", timeout=30) as c:
        c.save(1, training.state)
    names["state_dict"] = {"model": Training().model.state_dict()}
    exec(load.replace("state_dict)", "state_dict, strict=False)"), names)
    assert torch.equal(names["state_dict"]["model"]["weight"], training.model.weight)


def test_a_directory_in_front_of_one_root_is_refused_in_front_of_another(near, far, tmp_path):
    train(far, near, [1])
    with (
        pytest.raises(RunConflict, match=r"nvme.*is in front of .*give another local directory"),
        Checkpointer(tmp_path / "other", local=near, timeout=30) as c,
    ):
        c.resume(Training().state)
    assert not (tmp_path / "other" / "launches").exists()


def test_what_needs_a_directory_is_refused_at_a_uri():
    for options in ({"hold": "1 min"}, {"after_commit": [After(("true",))]}):
        with pytest.raises(Unsupported, match="give local="):
            Checkpointer("memory://run", **options)


def test_blocks_that_several_threads_find_damaged_near_are_all_read_from_the_root(near, far, monkeypatch):
    monkeypatch.setattr("distckpt.loading.read.WINDOW", 1 << 20)
    model = nn.Linear(1024, 4096)  # 16 MiB, by windows of one
    with Checkpointer(far, local=near, timeout=30) as c:
        c.save(1, TrainState(model=model, rng=False))
    victim = data_file(near, 1)
    data = bytearray(victim.read_bytes())
    for at in range(1 << 16, len(data) - (1 << 16), 1 << 19):
        data[at] ^= 1
    victim.write_bytes(data)
    saved = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with Checkpointer(far, local=near, timeout=30) as c:
        assert c.load(TrainState(model=model, rng=False)).step == 1
    assert torch.equal(model.weight, saved)
