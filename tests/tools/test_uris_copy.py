"""`python -m distckpt.reshard` from and to URIs, against a real server: nothing half there, and nothing done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import distckpt
from distckpt import Checkpointer, TrainState
from distckpt.cli import main as cli
from distckpt.errors import Corrupt, NotACheckpoint, RanksMissing, RunConflict, Unsupported
from distckpt.reshard import main
from distckpt.run.history import History
from distckpt.run.source import open_source
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from distckpt.store.object import ObjectStore
from distckpt.tools import in_place
from distckpt.tools.copy import copy
from distckpt.tools.transfer import Worker
from distckpt.tools.view import Change
from tests.run.test_frozen import WIDTH, train


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two steps in a directory."""
    _, state = trained(3)
    with Checkpointer(tmp_path_factory.mktemp("source") / "run", wait=True) as c:
        for step in (4, 5):
            c.save(step, state, {"loss": 0.5})
    return str(c._store.root)


@pytest.fixture
def to(bucket, request):
    """A URI of its own for each test."""
    return f"{bucket.uri}/{request.node.name.replace('[', '-').replace(']', '')}"


def trained(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 32)).sum().backward()
    optimizer.step()
    return model, TrainState(model=model, optimizer=optimizer, rng=False)


def weights(where):
    model, state = trained(1)
    with Checkpointer(f"memory://{time.monotonic()}", wait=True) as c:
        c.load(state, source=where)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def names(uri, prefix="step-00000005"):
    return [entry.name for entry in ObjectStore(uri).list(prefix)]


def task(rank, count, *arguments):
    """A task of a job, as torchrun starts it."""
    env = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "distckpt.reshard", *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_goes_to_a_uri_and_back_divided_anew(source, to, tmp_path, capsys):
    assert main([source, to, "--world-size", "3", "--verify"]) == 0
    assert f"wrote {to}/step-00000005: 3 files" in capsys.readouterr().out
    assert sum(name.startswith("rank-") for name in names(to)) == 3
    assert not [name for name in names(to) if name.startswith("ack-")], "what only the copy needed is gone"
    assert cli(["verify", to]) == 0
    assert main([f"{to}/step-00000005", str(tmp_path / "back"), "--verify"]) == 0
    capsys.readouterr()
    assert main([to, f"{to}-other", "--only", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["destination"] == f"{to}-other/step-00000005"
    wanted = weights(source)
    assert all(torch.equal(weights(where), wanted) for where in (to, f"{to}/step-00000005", tmp_path / "back"))
    assert open_source(to).manifest.metrics == {"loss": 0.5}


def test_another_step_is_added_and_training_goes_on_from_the_newest(source, to):
    for step in (4, 5):
        assert main([source, to, "--step", str(step)]) == 0
    _, state = trained(1)
    with Checkpointer(to, wait=True) as c:
        assert c.resume(state).step == 5
        c.save(6, state)
        assert c.steps() == [4, 5, 6]
    with pytest.raises(RunConflict, match="or is a run that jobs have resumed"):
        copy(source, to)


def test_a_dry_run_prints_the_plan_and_writes_nothing(source, to, capsys):
    assert main([source, to, "--world-size", "2", "--dry-run", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 2
    assert ObjectStore(to).list("") == []


def test_what_is_there_already_is_never_touched(source, to):
    copy(source, to)
    before = names(to)
    for dry_run in (False, True):
        with pytest.raises(RunConflict, match="holds step 5 already"):
            copy(source, to, change=Change(files=2), dry_run=dry_run)
    assert names(to) == before


def test_what_goes_up_in_several_parts_is_read_from_a_uri_as_it_goes(to):
    saved, found = ({"model": {"w": torch.full((9 << 20,), value, dtype=torch.uint8)}} for value in (7, 0))
    distckpt.save(to, saved)
    assert main([to, f"{to}-other", "--verify"]) == 0
    distckpt.load(f"{to}-other", found)
    assert torch.equal(found["model"]["w"], saved["model"]["w"])


# -- several at once ---------------------------------------------------------------------------------------------------


def test_tasks_share_the_files_through_the_store(source, to):
    for index in (1, 0):  # the first finishes it
        copy(source, to, change=Change(files=4), worker=Worker(index, 2))
    copy(source, to, change=Change(files=4), worker=Worker(1, 2))  # comes late, and has nothing to do
    assert torch.equal(weights(to), weights(source))


@pytest.mark.full
def test_tasks_and_workers_are_processes(source, to):
    tasks = [task(rank, 2, source, to, "--world-size", "4", "--timeout", "60") for rank in range(2)]
    workers = task(0, 1, source, f"{to}-workers", "--world-size", "4", "--workers", "2")
    told = [t.communicate(timeout=300)[0] for t in (*tasks, workers)]
    assert [t.returncode for t in (*tasks, workers)] == [0, 0, 0], told
    assert torch.equal(weights(to), weights(f"{to}-workers"))


def test_a_lost_task_is_named_and_the_same_command_goes_on(source, to):
    with pytest.raises(RanksMissing, match=r"workers \[1\] have not written"):
        copy(source, to, change=Change(files=4), worker=Worker(0, 2, timeout=0.3))
    assert "commit.json" not in names(to)
    copy(source, to, change=Change(files=4))
    assert torch.equal(weights(to), weights(source))


def test_of_two_that_make_the_same_copy_at_once_one_says_that_it_is_there(source, to):
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(copy, source, to, change=Change(files=4)) for _ in range(2)]
    problems = [str(problem) for one in both if (problem := one.exception())]
    assert len(problems) < 2
    assert all("holds step 5 already" in problem for problem in problems)
    assert torch.equal(weights(to), weights(source))


def test_a_step_that_another_commits_meanwhile_is_left_to_it(source, to, monkeypatch):
    publish = in_place.InPlace.publish

    def late(self):
        self.data.create("step-00000005/commit.json", b"another's")
        publish(self)

    monkeypatch.setattr(in_place.InPlace, "publish", late)
    with pytest.raises(RunConflict, match="committed it first"):
        copy(source, to)


# -- kills and damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["make", "complete", "publish"])
def test_a_killed_one_is_no_checkpoint_and_goes_on_where_it_stopped(at, source, to, monkeypatch):
    real, count = getattr(in_place.InPlace, at), []

    def stop(self, *more):
        count.append(1)
        if at != "make" or len(count) == 3:
            raise KeyboardInterrupt
        real(self, *more)

    with monkeypatch.context() as patch:
        patch.setattr(in_place.InPlace, at, stop)
        with pytest.raises(KeyboardInterrupt):
            copy(source, to, change=Change(files=4))
    with pytest.raises(NotACheckpoint):
        open_source(to)
    acked = sum(name.startswith("ack-") for name in names(to))
    assert acked == (2 if at == "make" else 4)
    made = []
    make = in_place.InPlace.make
    monkeypatch.setattr(in_place.InPlace, "make", lambda self, output: (made.append(output), make(self, output)))
    copy(source, to, change=Change(files=4))
    assert len(made) == 4 - acked, "what was finished is not written again"
    assert torch.equal(weights(to), weights(source))
    assert History(ObjectStore(to)).directories() == [open_source(to).directory]


def test_what_a_copy_that_is_not_made_again_left_is_for_gc(source, to, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(in_place.InPlace, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            copy(source, to)
    assert cli(["gc", to]) == 0
    assert "stays" in capsys.readouterr().out
    time.sleep(1.1)
    assert cli(["gc", to, "--idle", "1 s", "--delete"]) == 0
    assert ObjectStore(to).list("") == []


def test_bytes_that_are_not_what_was_written_are_found_and_written_again(source, to, monkeypatch):
    make, damaged = in_place.InPlace.make, []

    def damage(self, output):
        make(self, output)
        data = bytearray(output.size)
        self.data.read(output.name, 0, [memoryview(data)])
        data[4096] ^= 1
        write_all(self.data, output.name, bytes(data))
        damaged.append(output.name)

    with monkeypatch.context() as patch:
        patch.setattr(in_place.InPlace, "make", damage)
        with pytest.raises(Corrupt, match="do not match their checksum"):
            copy(source, to, verify=True)
    assert damaged
    with pytest.raises(NotACheckpoint):
        open_source(to)
    copy(source, to, verify=True)
    assert torch.equal(weights(to), weights(source))


# -- what is not there -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dcp", "torch", "safetensors", "deepspeed"])
def test_other_formats_go_to_directories(name, source, to, capsys):
    more = ["--zero-stage", "1", "--world-size", "2"] if name == "deepspeed" else []
    assert main([source, to, "--to", name, *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "only distckpt's own format is written to a URI" in line
    with pytest.raises(Unsupported):
        copy(source, f"{to}/x.pt", "torch")


def test_wrong_uris_are_one_line(source, to, bucket, capsys):
    for arguments, message in (
        ([f"{to}/nothing", f"{to}/there"], "neither a run of distckpt nor one of its steps"),
        (["s3://no-such-bucket/run", to], "there is no such bucket"),
        ([source, "s3://no-such-bucket/run"], "there is no such bucket"),
        ([source, "hdfs://host/run"], "not a URI of"),
        (["s3://", to], "names no bucket"),
    ):
        assert main(arguments) in {1, 3, 4}
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line, arguments


# -- distckpt cp -------------------------------------------------------------------------------------------------------


def test_cp_brings_a_run_up_and_down_again_and_sends_nothing_twice(source, to, tmp_path, monkeypatch, capsys):
    make, made = in_place.InPlace.make, []
    monkeypatch.setattr(in_place.InPlace, "make", lambda self, output: (made.append(output), make(self, output)))
    for _ in range(2):
        assert cli(["cp", source, to, "--all"]) == 0
    assert len(made) == 2, "a file of each of two checkpoints"
    assert "is there already" in capsys.readouterr().out
    assert cli(["cp", to, f"{to}-other"]) == 0
    for where, name in ((f"{to}/last", "last"), (f"{to}-other", "other")):
        assert cli(["cp", where, str(tmp_path / name)]) == 0
    assert cli(["diff", source, str(tmp_path / "other")]) == 0
    assert History(ObjectStore(to)).directories() == History(LocalStore(source)).directories()
    assert open_source(str(tmp_path / "other")).manifest.metrics == {"loss": 0.5}


def test_cp_goes_on_where_it_was_killed(source, to, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(in_place.InPlace, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(["cp", source, to]) == 130
    monkeypatch.setattr(in_place.InPlace, "make", lambda *_: pytest.fail("it is there already"))
    assert cli(["cp", source, to]) == 0
    assert torch.equal(weights(to), weights(source))


def test_cp_sends_frozen_weights_once(to, tmp_path):
    train(tmp_path / "run", (1, 2))
    assert cli(["cp", str(tmp_path / "run"), to, "--all"]) == 0
    assert sum(file.size for file in open_source(to).manifest.files if "/" not in file.name) < WIDTH * WIDTH * 4
    assert cli(["verify", to, "--all"]) == 0
    assert cli(["export", to, "-o", str(tmp_path / "m.safetensors")]) == 0
    assert load_file(tmp_path / "m.safetensors").keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert cli(["cp", to, str(tmp_path / "back"), "--all"]) == 0
    assert cli(["diff", str(tmp_path / "run"), str(tmp_path / "back")]) == 0


def test_cp_of_what_is_not_there_is_one_line(source, to, capsys):
    for arguments, code in (([f"{to}/nothing", to], 3), (["s3://no-such-bucket/run", to], 4)):
        assert cli(["cp", *arguments]) == code
        assert len(capsys.readouterr().err.splitlines()) == 1
