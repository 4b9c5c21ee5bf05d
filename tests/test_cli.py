"""The command line, as a new user would use it: what it says, its exit codes, and that it never shows a traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, Keep, Progress, TrainState
from distckpt.cli import COMMANDS, main
from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.lease import leased
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore

HERE = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of four checkpoints: two epochs, a metric that is best in the second."""
    root = tmp_path_factory.mktemp("cli") / "run"
    progress = Progress()
    state = TrainState(model=torch.nn.Linear(8, 8), progress=progress, rng=False)
    with Checkpointer(root, keep=Keep(last=9, best=("val_loss", "min", 1), per_epoch=True), wait=True) as c:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], 1):
            progress.epoch = step // 3
            c.save(step, state, {"val_loss": loss})
    return root


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def said(capsys, *arguments, code=0):
    """Text of a command that must end with this exit code; of a failure, its one line on stderr."""
    got = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert got == code, (got, out, err)
    assert "Traceback" not in out + err
    if code >= 3:
        assert err.count("\n") == 1
        assert not out
    return out + err


def told(capsys, *arguments, code=0):
    return json.loads(said(capsys, *arguments, "--json", code=code))


def damage(path):
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)


def steps(root):
    return sorted(c.directory.step for c in History(LocalStore(root)).valid())


def half_written(root):
    write_all(LocalStore(root), "step-00000009/rank-00000.aaaaaaaaaaaa.safetensors", b"half")
    return root / "step-00000009"


# -- ls, show ----------------------------------------------------------------------------------------------------------


def test_ls_lists_what_there_is_and_what_each_is(run, capsys):
    half_written(run)
    commit = run / "step-00000001" / "commit.json"
    commit.write_bytes(commit.read_bytes()[:-5])
    rows = {row["path"]: row for row in told(capsys, "ls", run)}
    assert {path: row["status"] for path, row in rows.items()} == {
        "step-00000009": "incomplete",
        "step-00000004": "committed",
        "step-00000003": "committed",
        "step-00000002": "committed",
        "step-00000001": "damaged",
    }
    assert rows["step-00000002"]["names"] == ["best", "epoch-0000"]
    assert (rows["step-00000004"]["epoch"], rows["step-00000004"]["metrics"]) == (1, {"val_loss": 2.5})
    assert "step-00000002 (best) (epoch-0000)" in said(capsys, "ls", run)


@pytest.mark.parametrize("path", [".", "last", "step-00000004", "epoch-0001"])
def test_show_takes_a_run_a_step_or_a_name(run, capsys, path):
    assert told(capsys, "show", run / path)["step"] == 4


def test_show_tells_what_a_checkpoint_holds(run, capsys):
    found = told(capsys, "show", run, "--step", 2, "--tensors")
    assert found["tensors"]["model.weight"] == [[8, 8], "float32"]
    assert found["bytes_of_parts"] == {"model": 4 * 72}
    assert found["objects"]["trainer_state"]["epoch"] == 0
    assert "metrics: val_loss=1.0" in said(capsys, "show", run / "best")


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_reads_every_byte_and_names_what_is_damaged(run, capsys):
    assert "whole" in said(capsys, "verify", run)
    damage(next((run / "step-00000003").glob("rank-*")))
    assert "whole" in said(capsys, "verify", run)
    text = said(capsys, "verify", run, "--all", code=1)
    assert "step-00000003: DAMAGED" in text
    assert "model." in text
    (found,) = told(capsys, "verify", run / "step-00000003", code=1)
    assert len(found["problems"]) == 1
    assert not leased(LocalStore(run))


def test_verify_tells_what_is_gone_cut_short_or_changed(run, capsys):
    next((run / "step-00000002").glob("rank-*")).unlink()
    next((run / "step-00000003").glob("trainer_state*")).write_text("{}")
    file = next((run / "step-00000004").glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-3])
    found = {v["path"]: v["problems"] for v in told(capsys, "verify", run, "--all", code=1)}
    assert "no such key" in found["step-00000002"][0]
    assert "trainer_state" in found["step-00000003"][0]
    assert "bytes, the commit says" in found["step-00000004"][0]
    assert found["step-00000001"] == []


# -- prune, gc, repair -------------------------------------------------------------------------------------------------


def test_prune_says_why_and_removes_only_when_told(run, capsys):
    text = said(capsys, "prune", run, "--last", 1)
    assert "remove step-00000001: no rule keeps it" in text
    assert "keep   step-00000003: one of the 2 newest" in text
    assert "would remove 2" in text
    assert steps(run) == [1, 2, 3, 4]
    found = told(capsys, "prune", run, "--last", 1, "--delete")
    assert found["removed"] == ["step-00000001", "step-00000002"]
    assert steps(run) == [3, 4]
    assert not (run / "best.json").exists()
    assert not (run / "epoch-0000").is_symlink()
    assert json.loads((run / "meta.json").read_text())["keep"]["last"] == 9  # the run's own rules stay


def test_prune_goes_by_the_run_s_own_rules_and_asks_for_some_where_there_are_none(run, capsys):
    assert "would remove 0" in said(capsys, "prune", run)
    (run / "meta.json").unlink()
    assert "give some, such as --last 3" in said(capsys, "prune", run, code=2)


def test_prune_takes_every_rule(run, capsys):
    rules = ["--every-steps", 2, "--per-epoch", "--best", "val_loss:max:1", "--newest-for", "1 s", "--bytes", "1 TB"]
    assert told(capsys, "prune", run, *rules)["keeps"]["step-00000002"]
    assert "nothing" not in said(capsys, "prune", run, "--best", "acc:max:2")
    assert "no checkpoint has a number 'acc'" in said(capsys, "prune", run, "--best", "acc:max:2")


def test_gc_leaves_what_may_still_commit_and_removes_it_once_nothing_lives(run, capsys):
    directory = half_written(run)
    found = told(capsys, "gc", run)
    assert [(left["key"].partition("/")[0], left["over"]) for left in found["found"]] == [("step-00000009", False)]
    assert "stays" in said(capsys, "gc", run, "--delete")
    assert directory.exists()
    for path in directory.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)
    assert "remove" in said(capsys, "gc", run)
    assert directory.exists()
    said(capsys, "gc", run, "--delete")
    assert not directory.exists()
    assert steps(run) == [1, 2, 3, 4]


def test_gc_does_not_touch_the_saves_of_a_job_that_lives(run, capsys):
    state = TrainState(model=torch.nn.Linear(8, 8), progress=Progress(), rng=False)
    with Checkpointer(run) as c:
        c.resume(state)
        directory = half_written(run)
        for path in directory.iterdir():
            os.utime(path, (time.time() + 60,) * 2)
        found = told(capsys, "gc", run, "--idle", "1 s", "--delete")
        assert found["alive"]
        assert directory.exists()


def test_gc_removes_copies_that_were_interrupted_long_ago(run, capsys):
    old, new, other = (
        run.parent / name for name in (".run.0123456789ab.partial", ".run.ba9876543210.partial", ".runs.0a.partial")
    )
    for path in (old, new, other):
        (path / "data").mkdir(parents=True)
        (path / "data" / "file").write_bytes(b"x" * 100)
    for path in [old, *old.rglob("*")]:
        os.utime(path, (time.time() - 3 * 86400,) * 2)
    assert told(capsys, "gc", run)["copies"] == [str(old)]
    said(capsys, "gc", run, "--delete")
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)


def test_repair_writes_pointers_and_registry_anew(run, capsys):
    before = {name: (run / name).read_bytes() for name in ("last.json", "best.json")}
    for name in ("last.json", "last", "best", "epoch-0000"):
        (run / name).unlink()
    (run / "best.json").write_text('{"checkpoint": "step-00000007", "step": 7}')
    text = said(capsys, "repair", run)
    assert "best: step-00000002 (was step-00000007)" in text
    assert {name: (run / name).read_bytes() for name in before} == before
    assert {n: os.readlink(run / n) for n in ("last", "best", "epoch-0000")} == {
        "last": "step-00000004",
        "best": "step-00000002",
        "epoch-0000": "step-00000002",
    }
    for name in ("meta.json", "best.json", "best"):
        (run / name).unlink()
    said(capsys, "repair", run, "--best", "val_loss:max")
    assert (run / "best").resolve().name == "step-00000001"
    assert len(json.loads((run / "meta.json").read_text())["checkpoints"]) == 4


# -- preflight ---------------------------------------------------------------------------------------------------------


def test_preflight_checks_a_directory_and_leaves_nothing_there(run, capsys, tmp_path):
    found = {c["check"]: c["state"] for c in told(capsys, "preflight", run)}
    assert found["room"] == found["hard links"] == found["write"] == "ok"
    assert "yet to be made" in said(capsys, "preflight", tmp_path / "a" / "b")
    assert not list(run.glob(".distckpt*")) + list(tmp_path.glob(".distckpt*"))
    assert not (tmp_path / "a").exists()


def test_preflight_fails_where_a_run_could_not_go_on(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in said(capsys, "preflight", tmp_path / "file" / "run", code=1)
    assert "FAIL" in said(capsys, "preflight", run, "--bytes", "1 PB", code=1)
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    assert "hard links" in said(capsys, "preflight", run, code=1)


def test_preflight_tells_of_the_scheduler(run, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 7205))
    assert "SLURM job 7 ends in 72" in said(capsys, "preflight", run)


# -- what goes wrong ---------------------------------------------------------------------------------------------------

LOOKING = [["ls"], ["show"], ["verify"], ["verify", "--all"], ["prune", "--last", "1"], ["gc"], ["repair"]]


@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
def test_where_there_is_nothing_it_says_so_in_one_line(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").write_text("x")
    for name in ("missing", "empty", "file", "other"):
        text = said(capsys, command[0], tmp_path / name, *command[1:], code=3)
        assert str(tmp_path / name) in text
    assert main([*command[:1], "hdfs://host/run", *command[1:]]) == 1
    assert "not a URI of" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show"], ["verify"]], ids=" ".join)
def test_a_half_written_or_unknown_step_is_told(command, run, capsys):
    half_written(run)
    assert "did not finish" in said(capsys, *command, run / "step-00000009", code=3)
    assert "does not exist" in said(capsys, *command, run / "step-00000077", code=3)
    assert "no checkpoint of step 77" in said(capsys, *command, run, "--step", 77, code=3)
    assert "is not step 3" in said(capsys, *command, run / "last", "--step", 3, code=3)


@pytest.mark.parametrize("command", LOOKING[:1] + LOOKING[4:], ids=" ".join)
def test_a_checkpoint_where_a_run_is_meant_is_told(command, run, capsys):
    assert "give its parent" in said(capsys, command[0], run / "last", *command[1:], code=3)


@pytest.mark.parametrize("content", [b"", b"{}", b"\0" * 100, b'{"format": 99}'])
def test_a_damaged_commit_ends_no_command_with_a_traceback(content, run, capsys):
    (run / "step-00000004" / "commit.json").write_bytes(content)
    assert said(capsys, "ls", run)
    assert told(capsys, "show", run)["step"] == 3
    assert said(capsys, "verify", run, "--all", code=1)
    said(capsys, "verify", run / "step-00000004", code=1)
    assert "set aside" in said(capsys, "prune", run, "--last", 1)
    assert said(capsys, "gc", run)
    assert "damaged" in said(capsys, "repair", run, code=1)
    assert (run / "last").resolve().name == "step-00000003"


def test_a_newer_format_is_named(run, capsys):
    from distckpt.format.sealed import seal, unseal

    commit = run / "step-00000004" / "commit.json"
    commit.write_bytes(
        seal({**{k: v for k, v in unseal(commit.read_bytes(), None).items() if k != "digest"}, "format": 2})
    )
    for command in LOOKING:
        assert "format version 2" in said(capsys, command[0], run, *command[1:], code=1)


def test_a_damaged_launch_record_and_odd_caches_are_told_or_passed_over(run, capsys):
    for name in ("meta.json", "last.json", "best.json"):
        (run / name).write_bytes(b"\xff[")
    assert said(capsys, "ls", run)
    said(capsys, "repair", run)
    assert json.loads((run / "last.json").read_text())["step"] == 4
    (run / "launches" / "0001.json").write_text("{}")
    for command in LOOKING:
        assert "0001.json" in said(capsys, command[0], run, *command[1:], code=1)


def test_wrong_usage_is_told_with_the_usage(run, capsys):
    for arguments in (["nonsense"], [], ["ls"], ["prune", run, "--last", "x"], ["ls", run, "--nonsense"]):
        assert "usage:" in said(capsys, *arguments, code=2)
    for rules in (["--last", 0], ["--bytes", "much"], ["--newest-for", "soon"], ["--best", "val_loss:least"]):
        assert said(capsys, "prune", run, *rules, code=2)
    assert "usage:" in said(capsys, "--help")
    for name in COMMANDS:
        assert "usage:" in said(capsys, name, "--help")


def test_a_refusal_of_the_file_system_is_one_line(run, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(run))

    monkeypatch.setattr(os, "scandir", refuse)
    assert "Permission denied" in said(capsys, "ls", run, code=4)


def test_an_output_that_nobody_reads_to_the_end_is_no_error(run):
    line = f"{sys.executable} -m distckpt ls {run} --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# -- how fast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["ls"], ["show"], ["verify"], ["prune"], ["gc"], ["repair"], ["preflight"]], ids=" ".join
)
def test_no_command_needs_torch_or_numpy(run, arguments):
    program = (
        "import sys; from distckpt.cli import main; code = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'numpy') if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, str(run)], cwd=HERE, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_ls_takes_less_than_three_tenths_of_a_second_of_cpu(run):
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "distckpt", "ls", str(run)], cwd=HERE, check=True, capture_output=True, timeout=60
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3


def test_a_pruned_run_is_resumed_from(run, capsys):
    said(capsys, "prune", run, "--last", 1, "--delete")
    state = TrainState(model=torch.nn.Linear(8, 8), progress=Progress(), rng=False)
    with Checkpointer(run) as c:
        assert c.resume(state).step == 4
        assert c.save(5, state, wait=True).directory == str(StepDir(5))


def test_what_would_be_written_into_a_checkpoint_or_below_a_step_s_name_is_refused(run, tmp_path, capsys):
    """A step within a run's step is one that did not finish to `ls`, and goes with `gc`; a file in one goes with it."""
    for destination in (run / "step-00000009", tmp_path / "copy" / "step-00000004", run / "last"):
        assert "is the name of a step" in said(capsys, "cp", run / "last", destination, code=4)
    assert "lies in a checkpoint" in said(capsys, "export", run, "-o", run / "step-00000004" / "x.pt", code=4)
    assert not (tmp_path / "copy").exists()
    assert not (run / "step-00000004" / "x.pt").exists()


def test_what_is_asked_for_is_what_is_exported(run, tmp_path, capsys):
    assert "is not step 3" in said(capsys, "export", run / "step-00000004", "--step", 3, "-o", tmp_path / "x", code=3)
    assert "~" in said(capsys, "export", run, "-o", "~/x.pt", code=2)
    assert "more than nothing" in said(capsys, "export", run, "-o", tmp_path / "x", "--shard-size", 0, code=2)
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_closed_is_no_traceback(run):
    shell = f"exec {sys.executable} -m distckpt ls {run} >&-"
    done = subprocess.run(["/bin/sh", "-c", shell], cwd=HERE, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
