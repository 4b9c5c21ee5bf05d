"""Every command, given what it should not be given: one line that says what is wrong, an exit code, no traceback."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import distckpt
from distckpt import Checkpointer, Keep, TrainState
from distckpt.cli import COMMANDS, main

RUN = {
    "ls": ["{}"],
    "show": ["{}"],
    "show --tensor": ["{}", "--tensor", "model.weight"],
    "show --svg": ["{}", "--svg", "out.svg"],
    "diff": ["{}", "good"],
    "diff of the second": ["good", "{}"],
    "verify": ["{}"],
    "verify --all": ["{}", "--all", "--quick"],
    "prune": ["{}", "--last", "1", "--delete"],
    "gc": ["{}", "--delete", "--idle", "1 h"],
    "repair": ["{}"],
    "report": ["{}", "-o", "out.html"],
    "export": ["{}", "-o", "exported"],
    "import": ["{}", "imported"],
    "cp": ["{}", "copied"],
    "reshard": ["{}", "resharded"],
}
"""Commands that want a run, or a checkpoint of one."""
OTHERS = {"watch": ["{}", "--once"], "queue": ["{}", "status"], "selftest": ["{}"], "preflight": ["{}"]}

NOWHERE = ["missing", "empty", "file", "other", "dangling", "loop", "good/step-00000077", "memory://nothing", "a\nb"]
"""Where there is no run."""
NO_PATH = [
    "hdfs://host/run",
    "s3://",
    "s3://bucket/../run",
    "file://host/run",
    "s3://me:secret@bucket/run",
    "",
    "x" * 5000,
]
"""What cannot be one."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and what resembles one."""
    place = tmp_path_factory.mktemp("bad")
    state = TrainState(model=torch.nn.Linear(8, 8), rng=False)
    with Checkpointer(place / "good", keep=Keep(last=2), wait=True) as c:
        for step in (1, 2):
            c.save(step, state, {"loss": 1.0 / step})
    for name in ("half", "damaged", "short"):
        shutil.copytree(place / "good", place / name, symlinks=True)
    for path in place.glob("half/*/commit.json"):
        path.unlink()
    for path in place.glob("damaged/*/commit.json"):
        path.write_bytes(path.read_bytes()[:-5])
    for path in place.glob("short/*/rank-*"):
        path.write_bytes(path.read_bytes()[:50])
    (place / "empty").mkdir()
    (place / "file").write_text("x")
    (place / "other").mkdir()
    (place / "other" / "notes.txt").write_text("x")
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere")
    return place


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of it, to be in."""
    shutil.copytree(place, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def asked(capsys, command, arguments, path):
    """(code, stdout, stderr) of a command; that its error is one line, and that --json says the same as JSON."""
    line = [command.split()[0], *(a.replace("{}", path) for a in arguments)]
    code = main(line)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "secret" not in out + err
    if code and not out:
        assert err.count("\n") == 1, err
        assert err.startswith(f"distckpt {line[0]}: "), err
        assert main([*line, "--json"]) == code
        said = json.loads(capsys.readouterr().out)
        assert said["code"] == code
        assert said["error"] in err
        assert said["kind"]
    else:
        assert err == ""
    return code, out, err


def untouched(here):
    return sorted(str(p.relative_to(here)) for p in here.rglob("*"))


def test_every_command_is_tried():
    assert {name.split()[0] for name in (RUN | OTHERS)} == set(COMMANDS)


@pytest.mark.parametrize("command", RUN)
def test_where_there_is_no_run_it_says_so_and_leaves_nothing(command, here, capsys):
    before = untouched(here)
    for path in NOWHERE:
        code, out, err = asked(capsys, command, RUN[command], path)
        assert (code, out) == (3, ""), (path, err)
        if path not in {"dangling", "a\nb"}:
            assert path.removeprefix("good/") in err
    assert untouched(here) == before


@pytest.mark.parametrize("command", RUN)
def test_what_is_no_path_is_refused(command, here, capsys):
    before = untouched(here)
    for path in NO_PATH:
        code, out, _ = asked(capsys, command, RUN[command], path)
        assert (code, out) == (2 if not path else 4 if path.startswith("x") else 1, ""), path
    assert untouched(here) == before


@pytest.mark.parametrize("command", RUN)
@pytest.mark.parametrize("kind", ["half", "damaged", "short"])
def test_half_written_and_damaged_runs_end_no_command_with_a_traceback(command, kind, here, capsys):
    code, out, err = asked(capsys, command, RUN[command], kind)
    assert code in {0, 1, 3}
    assert out or err
    if kind == "short" and command in {
        "show --tensor",
        "diff",
        "diff of the second",
        "verify",
        "export",
        "cp",
        "reshard",
    }:
        assert code == 1
    if kind == "half" and command not in {"ls", "prune", "gc", "report"}:
        assert code == 3


@contextlib.contextmanager
def no_rights():
    """Be somebody else, where this is root, whom nothing is refused."""
    for name in COMMANDS:  # whose own files somebody else may not be able to read
        importlib.import_module(f"distckpt.tools.{name}{'_' * (name == 'import')}")
    for name in ("sections", "stats", "shardmap", "transfer"):
        importlib.import_module(f"distckpt.tools.{name}")
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture
def closed(place):
    """A run that may not be listed, one of which no file may be read, and one that may not be written to."""
    base = Path("/tmp") if os.geteuid() == 0 else place
    folder = base / f"distckpt-rights-{os.getpid()}"
    folder.mkdir(mode=0o755)
    modes = {}
    try:
        for name in ("unlisted", "unread", "read-only"):
            shutil.copytree(place / "good", folder / name, symlinks=True)
        modes = {folder / "unlisted": 0, **{p: 0 for p in (folder / "unread").rglob("*") if p.is_file()}}
        modes |= {p: 0o555 for p in (folder / "read-only").rglob("*") if p.is_dir()} | {folder / "read-only": 0o555}
        for path, mode in modes.items():
            path.chmod(mode)
        yield folder
    finally:
        for path in modes:
            path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("command", RUN)
def test_what_the_file_system_refuses_is_told(command, closed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(closed)
    arguments = [str(closed / "read-only") if a == "good" else a for a in RUN[command]]
    with no_rights():
        for name in ("unlisted", "unread"):
            code, out, err = asked(capsys, command, arguments, str(closed / name))
            assert (code, out) == (4, ""), err
            assert "ermission denied" in err
    with no_rights():
        code, out, err = asked(capsys, command, arguments, str(closed / "read-only"))
        writes = {"show --svg", "report", "prune", "repair", "export", "import", "cp", "reshard"}
        assert code == (4 if command in writes else 0), (out, err)


@pytest.mark.parametrize(("command", "path", "code"), [
    ("watch", "missing", 3), ("watch", "file", 3), ("watch", "s3://bucket/run", 1), ("watch", "s3://me:secret@b/run", 1),
    ("watch", "", 2), ("queue", "missing", 4), ("queue", "empty", 4), ("queue", "file", 2), ("selftest", "no_colon", 2),
    ("preflight", "s3://", 1), ("preflight", "hdfs://host/run", 1), ("preflight", "", 2),
    ("preflight", "file", 1),
])  # fmt: skip
def test_the_other_commands_too(command, path, code, here, capsys):
    assert asked(capsys, command, OTHERS[command], path)[0] == code


OPTIONS = {
    "show --step": ["x", "1.5", ""],
    "verify --step": ["x", ""],
    "report --verify": ["x", ""],
    "prune --last": ["x", "0", "-1", ""],
    "prune --every-steps": ["x", "0"],
    "prune --best": ["loss", "loss:least", "loss:min:0", ":min", "loss:min:1:2"],
    "prune --bytes": ["much", "-1", ""],
    "prune --newest-for": ["soon", "", "nan"],
    "gc --idle": ["soon", "-1 h", ""],
    "gc --copies": ["soon", ""],
    "repair --best": ["loss", "loss:least"],
    "watch --interval": ["x", "0", "-1", "nan", "inf", "1e300", ""],
    "selftest --steps": ["x", "-1"],
    "selftest --ranks": ["x", "0"],
    "selftest --timeout": ["x", "0", "nan"],
    "preflight --bytes": ["much", "-1", ""],
    "preflight --keep": ["x", "0", "-1"],
    "preflight --writers": ["x", "0"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_wrong_value_of_an_option_is_wrong_usage(option, here, capsys):
    command, name = option.split()
    target = "module:function" if command == "selftest" else "good"
    for value in OPTIONS[option]:
        assert main([command, target, f"{name}={value}"]) == 2, value
        out, err = capsys.readouterr()
        assert not out
        assert err
        assert "Traceback" not in err


@pytest.mark.parametrize("command", [name for name in RUN if name not in {"export", "import", "cp", "reshard"}])
def test_what_every_command_says_as_json_is_json(command, here, capsys):
    line = [command.split()[0], *(a.replace("{}", "good") for a in RUN[command]), "--json"]
    assert main(line) == 0
    json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_numbers_that_are_not_finite_are_json_too(tmp_path, capsys):
    for name, value in (("a", float("inf")), ("b", 1.0)):
        distckpt.save(tmp_path / name, {"t": torch.tensor([value])})
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["apart"][0]["max_abs"] == "inf"
