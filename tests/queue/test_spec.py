"""What a queue's file may say, and how it is told what is wrong."""

from __future__ import annotations

import pytest

from distckpt.queue import spec
from distckpt.queue.gpus import Gpu, gpus

RUN = '[[run]]\nname = "a"\nroot = "runs/a"\ncommand = ["true"]\n'


def loaded(tmp_path, text):
    (tmp_path / "q.toml").write_text(text)
    return spec.load(tmp_path / "q.toml")


def test_a_whole_file(tmp_path):
    queue = loaded(
        tmp_path,
        'gpus = [0, 3]\nper_gpu = 2\nrestarts = 1\nbackoff = "2 min"\nenv = { A = "1", B = 2 }\n'
        + RUN
        + 'slots = 2\nsteps = 10\nmetric = "acc"\nmode = "max"\nenv = { B = "3" }\n'
        + RUN.replace('"a"', '"b"').replace("runs/a", "/elsewhere"),
    )
    assert (queue.gpu_of, queue.restarts, queue.backoff) == ((0, 3, 0, 3), 1, 120.0)
    a, b = queue.runs
    assert (a.root, a.slots, a.steps, a.metric, a.mode, a.env) == (
        tmp_path / "runs/a", 2, 10, "acc", "max", {"A": "1", "B": "3"},
    )  # fmt: skip
    assert (str(b.root), b.slots, b.steps, b.env) == ("/elsewhere", 1, None, {"A": "1", "B": "2"})


def test_slots(tmp_path, monkeypatch):
    assert loaded(tmp_path, "slots = 3\n" + RUN).gpu_of == (None,) * 3
    assert loaded(tmp_path, "gpus = 2\n" + RUN).gpu_of == (0, 1)
    monkeypatch.setattr(spec, "gpus", lambda: [Gpu(0, None, None, None), Gpu(1, None, None, None)])
    assert loaded(tmp_path, RUN).gpu_of == (0, 1)
    monkeypatch.setattr(spec, "gpus", list)
    assert loaded(tmp_path, RUN).gpu_of == (None,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"no \[\[run\]\]"),
        ("x = [", "is no TOML"),
        ("slot = 2\n" + RUN, "the queue: 'slot' is unknown; expected are backoff"),
        ("slots = 2\ngpus = 2\n" + RUN, "exclude each other"),
        ("slots = 0\n" + RUN, "slots = 0: a whole number of at least 1"),
        ('gpus = ["a"]\n' + RUN, "gpus = 'a': a whole number of at least 0"),
        ("restarts = true\n" + RUN, "restarts = True"),
        ('backoff = "soon"\n' + RUN, "backoff='soon'"),
        ("run = 3", "run: 3: a list is expected"),
        (RUN.replace("[[run]]", "[run]"), r"write \[\[run\]\], once for each run"),
        ("run = [3]", "run 1: 3: a table is expected"),
        (RUN.replace("root", "rot"), "run 'a': 'rot' is unknown"),
        ('[[run]]\nname = "a"\n', "run 'a': command, root is missing"),
        (RUN.replace('["true"]', '"true"'), "command: 'true': a list is expected"),
        (RUN.replace('["true"]', "[1]"), "a list of words"),
        (RUN + "slots = 2\n", "run 'a' takes 2 slots; there are 1"),
        (RUN + 'mode = "least"\n', "mode = 'least'"),
        (RUN + "steps = 1.5\n", "steps = 1.5"),
        (RUN + "metric = 1\n", "metric: 1: a text is expected"),
        (RUN + "env = 3\n", "env: 3: a table is expected"),
        (RUN + RUN, "two runs have the name 'a'"),
        (RUN + RUN.replace('"a"', '"b"'), "two runs have the root"),
        (RUN + RUN.replace('"a"', '"b"').replace("runs/a", "x/../runs/a"), "two runs have the root"),
        ("gpus = []\n" + RUN, r"gpus = \[\]: a whole number"),
        (RUN + 'env = { "A=B" = 1 }\n', "env: 'A=B': no name or value of a variable"),
        (RUN + 'env = { A = "\\u0000" }\n', "env: 'A': no name or value"),
        (RUN.replace("true", "\\u0000"), "a list of words"),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, text, message, monkeypatch):
    monkeypatch.setattr(spec, "gpus", list)
    with pytest.raises(ValueError, match=message) as caught:
        loaded(tmp_path, text)
    assert "q.toml" in str(caught.value)


def test_what_nvidia_smi_tells(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 97, 31000, 81559'\necho '1, [N/A], 12, [N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus() == [Gpu(0, 97.0, 31000.0, 81559.0), Gpu(1, None, 12.0, None)]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpus() == []
