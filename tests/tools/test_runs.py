"""`distckpt ls ROOT`: a row a run, and where each stands."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.cli import main
from distckpt.run import events
from distckpt.run.launches import open_launch
from distckpt.store.local import LocalStore


def rows(capsys, root):
    assert main(["ls", str(root), "--json"]) == 0
    return {row["run"]: row for row in json.loads(capsys.readouterr().out)}


def train(root, *steps, fail=False):
    state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
    with Checkpointer(root, wait=True, keep=Keep(last=2)) as c:
        c.resume(state)
        for step in steps:
            c.save(step, state, {"loss": 1.0 / step})
        if fail:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs of every kind, one of them a level deeper."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "done", 1, 2)
    train(root / "demo" / "checkpoints", 7)
    with pytest.raises(KeyboardInterrupt):
        train(root / "failed", 1, fail=True)
    train(root / "stopped", 3)
    events.record(LocalStore(root / "stopped"), "launched", launch=2)
    events.record(LocalStore(root / "stopped"), "stopping", launch=2, step=3, reason="signal", exit_code=75)
    events.record(LocalStore(root / "stopped"), "closed", launch=2)
    open_launch(LocalStore(root / "nothing"), None, 1, "2026-01-01T00:00:00+00:00")
    (root / "broken" / "launches").mkdir(parents=True)
    (root / "broken" / "launches" / "0001.json").write_text("{}")
    (root / "broken" / "step-00000001").mkdir()
    (root / "no run" / "data").mkdir(parents=True)
    (root / "notes.txt").write_text("x")
    return root


def test_each_run_is_a_row_that_tells_where_it_stands(root, capsys):
    found = rows(capsys, root)
    assert {name: row["state"] for name, row in found.items()} == {
        "broken": "unreadable",
        "demo/checkpoints": "finished",
        "done": "finished",
        "failed": "resumable",
        "nothing": "dead",
        "stopped": "resumable",
    }
    assert (found["done"]["step"], found["done"]["checkpoints"]) == (2, 2)
    assert found["done"]["bytes"] > 0
    assert "0001.json" in found["broken"]["problem"]
    assert main(["ls", str(root)]) == 0
    assert "demo/checkpoints" in capsys.readouterr().out


def test_a_run_whose_heart_beats_is_running_and_one_whose_process_is_gone_is_not(tmp_path, capsys):
    state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
    with Checkpointer(tmp_path / "a", wait=True) as c:
        c.resume(state)
        c.save(1, state)
        assert rows(capsys, tmp_path)["a"]["state"] == "running"
    beat = tmp_path / "a" / "launches" / "0001.beat.json"
    said = json.loads(beat.read_text())
    beat.write_text(json.dumps({**said, "ended": False, "pid": 2**22 + 1}))
    (tmp_path / "a" / "events.jsonl").unlink()
    assert rows(capsys, tmp_path)["a"]["state"] == "resumable"


def test_how_the_queue_saw_a_command_end_is_what_counts(root, tmp_path, capsys):
    train(tmp_path / "a", 1)
    for code, state in ((1, "resumable"), (0, "finished")):
        events.record(LocalStore(tmp_path / "a"), "exited", code=code)
        assert rows(capsys, tmp_path)["a"]["state"] == state


def test_ls_of_a_run_says_why_each_is_kept(root, capsys):
    assert main(["ls", str(root / "done"), "--json"]) == 0
    newest, _ = json.loads(capsys.readouterr().out)
    assert newest["kept"] == ["one of the 2 newest", "one of the last 2"]
    assert newest["names"] == ["last"]


def test_a_directory_that_cannot_be_listed_is_a_row(tmp_path, capsys, monkeypatch):
    train(tmp_path / "a", 1)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = rows(capsys, tmp_path)
    assert found["closed"]["state"] == "unreadable"
    assert "Permission denied" in found["closed"]["problem"]
    assert found["a"]["state"] == "finished"


def test_on_a_terminal_lines_are_cut_where_it_ends(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["ls", str(root / "done")]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 40
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["ls", str(root / "done")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 40
    assert lines[1].startswith("step-00000002 (last)")
    assert lines[1].endswith("…")


def test_what_rules_let_go_of_is_told(tmp_path, capsys):
    state = TrainState(model=torch.nn.Linear(2, 2), rng=False)
    with Checkpointer(tmp_path / "run", wait=True) as c:
        for step in (1, 2, 3):
            c.save(step, state)
    meta = tmp_path / "run" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "keep": {"last": 2}}))
    assert main(["ls", str(tmp_path / "run"), "--json"]) == 0
    assert [row.get("goes") for row in json.loads(capsys.readouterr().out)] == [None, None, "no rule keeps it"]
    assert main(["ls", str(tmp_path / "run")]) == 0
    assert "goes: no rule keeps it" in capsys.readouterr().out
    meta.write_text(json.dumps({"keep": {"lats": 2}}))
    assert main(["ls", str(tmp_path / "run")]) == 0
    assert "no such rule: lats" in capsys.readouterr().out
