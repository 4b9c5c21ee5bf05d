"""Copies that meet others, kills, changes and odd destinations: each ends whole, or in one error that says why."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from distckpt.errors import Corrupt, Mismatch, NotACheckpoint, RankFailed, RunConflict, StoreError, Unsupported
from distckpt.reshard import main
from distckpt.run.source import open_source
from distckpt.store.local import LocalStore
from distckpt.tools import copy as copying
from distckpt.tools.copy import Source, copy
from distckpt.tools.formats import DeepSpeed, Safetensors
from distckpt.tools.transfer import Worker
from distckpt.tools.view import Change


@pytest.fixture
def source(tmp_path):
    """A torch.save file with an optimizer that names its parameters by position."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Linear(64, 5))
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


ORDER = (("0.weight", "0.bias"), ("1.weight", "1.bias"))


def hidden(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def as_job(arguments, rank, count, **env):
    """A task of a job, as torchrun starts it."""
    command = [sys.executable, "-W", "ignore", "-m", "distckpt.reshard", *map(str, arguments)]
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


# -- kills -----------------------------------------------------------------------------------------------------------


def _killed_in_a_write(source, destination, at):
    real, count = os.fsync, [0]

    def dying(descriptor):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = dying
    copy(source, destination, "dcp", change=Change(files=3))


@pytest.mark.parametrize("at", range(1, 16, 2))
def test_what_killed_tries_leave_is_cleared_and_never_moved_into_place(at, source, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=_killed_in_a_write, args=(source, out, at))
        process.start()
        process.join(60)
    assert len([p for p in tmp_path.rglob(".tmp-*") if "distcp" in p.name]) <= 1
    if not out.exists():
        copy(source, out, "dcp", change=Change(files=3))
    assert sorted(p.name for p in out.iterdir()) == [".metadata", *(f"__{i}_0.distcp" for i in range(3))]
    assert open_source(out).manifest.tensors


def test_only_the_temporary_files_of_one_key_are_discarded(tmp_path):
    store = LocalStore(tmp_path)
    names = [".tmp-01234567-a", ".tmp-01234567-b-a", ".tmp-0123-a", ".tmp-0123456x-a", "a", ".tmp-01234567-a.txt"]
    for name in names:
        (tmp_path / name).touch()
    store.discard_temporary("a")
    assert {p.name for p in tmp_path.iterdir()} == {*names[1:]}
    store.discard_temporary("nothing/here")


def test_workers_end_with_a_killed_parent(source, tmp_path):
    code = (
        "import sys, time\nfrom distckpt.tools import copy, transfer\n"
        "def wait(*args):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "copy.write_share = wait\n"
        "if __name__ != '__main__': pass\n"
        f"else: copy.copy({str(source)!r}, {str(tmp_path / 'out')!r}, 'dcp', worker=transfer.Worker(processes=2))\n"
    )
    script = tmp_path / "script.py"  # a worker runs its main module again
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        assert parent.stdout.readline() == parent.stdout.readline() == "waiting\n"
        parent.kill()
        assert parent.stdout.read() == ""  # its end: the workers, which have it too, are gone


@pytest.mark.parametrize("more", [(), pytest.param(("--workers", "2", "--world-size", "2"), marks=pytest.mark.full)])
def test_an_interrupt_is_one_line_and_what_was_done_stays(more, source, tmp_path):
    code = (
        "import os, signal, sys\nfrom distckpt.tools import copy, transfer\nfrom distckpt import reshard\n"
        "def interrupt(*args):\n    os.killpg(0, signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        "copy.collect = interrupt\nsys.exit(reshard.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, source, tmp_path / "out", "--to", "dcp", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert (done.returncode, done.stderr) == (130, "interrupted: the same command goes on where it stopped\n")
    assert not (tmp_path / "out").exists()
    assert len(hidden(tmp_path)) == 1


# -- others ----------------------------------------------------------------------------------------------------------


def test_of_two_at_once_the_second_is_told_and_changes_nothing(source, tmp_path):
    plan = copying._Plan(
        copying._Request(Source(str(source)), str(tmp_path / "out"), copying.format_of("dcp"), Change(), 1 << 20)
    )
    with plan.staging.held():
        done = as_job([source, tmp_path / "out", "--to", "dcp", "--memory", "8MB"], 0, 1)
        assert done.returncode == 4
        assert "another process is making this very copy: wait for it" in done.stderr
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("to", ["torch", "distckpt"])
@pytest.mark.full
def test_a_task_that_comes_when_all_is_done_has_nothing_to_do(to, source, tmp_path):
    arguments = [source, tmp_path / "out", "--to", to]
    assert [as_job(arguments, rank, 2).returncode for rank in (0, 1)] == [0, 0]
    assert hidden(tmp_path) == []
    assert as_job(arguments, 0, 2).returncode == 4


def test_a_batch_script_is_a_task_by_itself(source, tmp_path, monkeypatch):
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert main([str(source), str(tmp_path / "alone"), "--to", "dcp", "--world-size", "4", "--timeout", "1"]) == 0
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")  # as srun says it to each of its tasks
    assert main([str(source), str(tmp_path / "shared"), "--to", "dcp", "--world-size", "4", "--timeout", "1"]) == 4


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_source_that_changes_in_the_middle_is_not_believed(processes, source, tmp_path, monkeypatch):
    write = copying.write_share

    def meanwhile(*args):
        write(*args)
        os.utime(source, ns=(1, time.time_ns()))

    if processes == 1:
        monkeypatch.setattr(copying, "write_share", meanwhile)
    else:
        start = multiprocessing.get_context("spawn").Process.start

        def touched(self):
            os.utime(source, ns=(1, time.time_ns()))
            start(self)

        monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", touched)
    with pytest.raises((Corrupt, RankFailed), match=r"x\.pt: was changed while it was being copied"):
        copy(source, tmp_path / "out", "dcp", change=Change(files=2), worker=Worker(processes=processes))
    assert not (tmp_path / "out").exists()


# -- destinations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["my model.pt", "größe.safetensors", ".hidden.pt", "a=b (1).pt", "x" * 230 + ".pt"])
def test_a_file_may_have_any_name(name, source, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy(source, tmp_path / "to" / name, Safetensors() if "safe" in name else "torch", verify=True)
    assert [p.name for p in (tmp_path / "to").iterdir()] == [name]
    assert open_source(tmp_path / "to" / name).manifest.tensors


def test_symlinks_are_followed_to_where_the_copy_is_to_be(source, tmp_path):
    (tmp_path / "empty").mkdir()
    for link, target in (("to-empty", "empty"), ("to-nothing", "nothing")):
        (tmp_path / link).symlink_to(target)
        copy(source, tmp_path / link, "dcp")
        assert (tmp_path / link).is_symlink()
        assert open_source(tmp_path / target).manifest.tensors
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StoreError, match="circle"):
        copy(source, tmp_path / "circle", "dcp")


def test_where_nothing_can_be_moved_to_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "mount"))
    for to in ("dcp", "distckpt"):
        with pytest.raises(StoreError, match=r"mount: is a mount point, .* give a path below it"):
            copy(source, tmp_path / "mount", to)
    for uri in ("s3://bucket/x", "s3://bucket/x.pt"):
        with pytest.raises(Unsupported, match="only distckpt's own format is written to a URI, not Torch"):
            copy(source, uri, "torch")
    with pytest.raises(NotACheckpoint, match="of others, bring the files here"):
        copy("memory://nothing", tmp_path / "out")
    assert hidden(tmp_path) == []


def test_a_dry_run_says_that_the_destination_is_taken(source, tmp_path):
    copy(source, tmp_path / "out", "dcp")
    with pytest.raises(RunConflict, match="out: exists already"):
        copy(source, tmp_path / "out", "dcp", dry_run=True)


@pytest.mark.parametrize("tag", ["latest", "latest_universal", "../up", "/abs", "", "epoch 1", ".hidden"])
def test_a_tag_is_a_plain_name_that_deepspeed_has_no_other_use_for(tag):
    with pytest.raises(ValueError, match="tag "):
        DeepSpeed(1, 2, tag=tag)


# -- what is asked ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--zero-stage", "3"], "--zero-stage is for --to deepspeed, not distckpt"),
        (["out", "--tag", "x", "--to", "dcp"], "--tag is for --to deepspeed, not dcp"),
        (["out.pt", "--world-size", "2"], "--world-size is for --to deepspeed or distckpt or dcp, not torch"),
        (["out", "--shard-size", "1GB"], "--shard-size is for --to hf or safetensors, not distckpt"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(arguments, message, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(source), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rename", r"^0=\9"], r"rename: '\^0' to .* is no regular expression: invalid group reference"),
        (["--dtype", "float8_e8m0fnu"], "dtype 'float8_e8m0fnu': one of"),
        (["--dtype", "float4_e2m1fn_x2"], "dtype 'float4_e2m1fn_x2': one of"),
        (["--timeout", "nan"], "a timeout above 0"),
        (["--name", "ema=model"], "names= speaks of the entry 'ema'"),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, message, source, tmp_path, capsys):
    import re

    assert main([str(source), str(tmp_path / "out"), *arguments]) in {1, 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert hidden(tmp_path) == []


def test_more_that_makes_no_sense(source, tmp_path):
    for wrong in ({"index": 2, "count": 2}, {"processes": 0}, {"index": -1}):
        with pytest.raises(ValueError, match="an index below"):
            Worker(**wrong)
    with pytest.raises(TypeError, match="a tuple of parts"):
        Change(only="model")
    with pytest.raises(ValueError, match="is not divided by a number of files"):
        copy(source, tmp_path / "out.pt", "torch", change=Change(files=3))
    copy(source, tmp_path / "run")
    with pytest.raises(Mismatch, match="is distckpt's own, whose parts have their names"):
        copy(Source(str(tmp_path / "run"), names=(("ema", "model"),)), tmp_path / "out")
    with pytest.raises(NotACheckpoint, match="no such checkpoint: step-00000000 is whole"):
        copy(Source(str(tmp_path / "run"), step=7), tmp_path / "out")
    assert main(["a" * 300, str(tmp_path / "out")]) == 4


def test_a_model_that_cannot_be_read_safely_is_no_copy_without_it(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2), "epoch": 1}, tmp_path / "x.pt")
    with pytest.raises(Unsupported, match=r"model: cannot be read safely: .*Linear.* only= copies the other parts"):
        copy(tmp_path / "x.pt", tmp_path / "out")
    copy(tmp_path / "x.pt", tmp_path / "out", change=Change(only=("epoch",)))
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "y.pt")
    with pytest.raises(NotACheckpoint, match=r"neither tensors nor values that can be read: net: .*Linear"):
        copy(tmp_path / "y.pt", tmp_path / "other")


def test_an_order_names_the_parameters_of_any_source(source, tmp_path, capsys):
    with pytest.raises(Unsupported, match=r"by position .* in groups of \[2, 2\]: say their order"):
        copy(source, tmp_path / "tags", DeepSpeed(1, 2))
    with pytest.raises(Mismatch, match=r"order= has groups of \[1\] names, .* of \[2, 2\] parameters"):
        copy(Source(str(source), order=(("0.weight",),)), tmp_path / "tags", DeepSpeed(1, 2))
    (tmp_path / "order.json").write_text(json.dumps(ORDER))
    more = ["--to", "deepspeed", "--zero-stage", "1", "--world-size", "2", "--rename", "^1=out", "--verify"]
    assert main([str(source), str(tmp_path / "tags"), "--param-order", str(tmp_path / "order.json"), *more]) == 0
    found = open_source(tmp_path / "tags")
    assert [g["params"] for g in found.object("optim")["groups"]] == [
        ["0.weight", "0.bias"],
        ["out.weight", "out.bias"],
    ]
    assert found.manifest.tensors["optim.out.weight.exp_avg"].shape == (5, 64)
