"""Commands that run after a commit: which are due, what they are told, and what becomes of them."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.format.checksum import digest
from distckpt.format.layout import StepDir
from distckpt.run.after import After, Export, TrialLoad
from distckpt.run.after_runner import is_due
from distckpt.run.events import note
from distckpt.run.lease import leased
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from tests.run.test_async import until
from tests.run.test_events import named


def state():
    return TrainState(model=torch.nn.Linear(2, 2), rng=False)


def ended(root, count):
    until(lambda: len(named(root, "after")) >= count, 60)
    return named(root, "after")


def python(code, *arguments):
    return (sys.executable, "-c", code, *arguments)


@pytest.mark.parametrize("wait", [True, False])
def test_a_command_runs_on_what_was_committed(tmp_path, wait, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    code = "import os, sys; open(sys.argv[2] + '/told', 'w').write(repr([*sys.argv[1:], os.getcwd(), os.environ.get('RANK')]))"
    after = After(python(code, "{checkpoint}", "{run}", "{step}", "{directory}", "{{}}"), name="tell")
    with Checkpointer(tmp_path, after_commit=[after], wait=wait) as c:
        c.save(7, state())
    (event,) = ended(tmp_path, 1)
    assert (event["name"], event["code"], event["step"], event.get("said")) == ("tell", 0, 7, None)
    directory = "step-00000007"
    expected = [str(tmp_path / directory), str(tmp_path), "7", directory, "{}", os.getcwd(), None]
    assert (tmp_path / "told").read_text() == repr(expected)


def test_what_goes_wrong_is_told_and_harms_nobody(tmp_path):
    commands = [
        After(python("import sys; print('x' * 5000, 'the end'); sys.exit(3)"), name="fails"),
        After(("no-such-program",)),
        After(python("import time; print('at it', flush=True); time.sleep(60)"), timeout=0.5, name="slow"),
        After(python(""), name="last"),
    ]
    with Checkpointer(tmp_path, after_commit=commands) as c:
        c.save(1, state())
    found = {e["name"]: (e["code"], e.get("said", "")) for e in ended(tmp_path, 4)}
    assert found["fails"][0] == 3
    assert found["fails"][1].endswith("the end")
    assert len(found["fails"][1]) <= 1000
    assert found["no-such-program"][0] == 127
    assert found["slow"] == (124, "at it\n\nkilled after 0 s (timeout=)")
    assert found["last"] == (0, "")


def busy(folder, then="pass"):
    """A command that waits for the file `go`."""
    code = f"import os, sys, time\nopen('begun', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.02)\n{then}"
    return {"command": python(code), "folder": str(folder)}


def test_one_at_a_time_and_then_the_newest_and_the_checkpoint_stays_meanwhile(tmp_path):
    after = After(**busy(tmp_path), name="slow")
    with Checkpointer(tmp_path, keep=Keep(last=1), after_commit=[after], wait=True) as c:
        c.save(1, state())
        until(lambda: (tmp_path / "begun").exists())
        assert leased(LocalStore(tmp_path)) == {StepDir(1)}
        for step in (2, 3, 4):
            c.save(step, state())
        assert len(ended(tmp_path, 3)) == 3
        assert all("not done yet" in e["skipped"] for e in named(tmp_path, "after"))
        assert (tmp_path / "step-00000001" / "commit.json").exists()
        (tmp_path / "go").touch()
        assert [e["step"] for e in ended(tmp_path, 5)[3:]] == [1, 4], "the last of a job has its turn"
        c.save(5, state())
        assert ended(tmp_path, 6)[-1]["step"] == 5
    assert not (tmp_path / "step-00000001").exists()
    until(lambda: not leased(LocalStore(tmp_path)))


def test_a_best_that_comes_while_another_is_looked_at_has_its_turn_and_each_only_one(tmp_path):
    commands = [After(**busy(tmp_path, "sys.exit(1)"), on="best", name="slow"), After(python(""), name="each")]
    with Checkpointer(tmp_path, keep=Keep(last=5, best=("loss", "min", 1)), after_commit=commands, wait=True) as c:
        c.save(1, state(), {"loss": 2.0})
        until(lambda: (tmp_path / "begun").exists())
        c.save(2, state(), {"loss": 1.0})
        c.save(3, state(), {"loss": 3.0})
        assert len(ended(tmp_path, 2)) == 2
        (tmp_path / "go").touch()
        told = [(e["name"], e["step"]) for e in ended(tmp_path, 5)[2:]]
        assert told == [("slow", 1), ("each", 3), ("slow", 2)]
        c.save(4, state(), {"loss": 3.0})
        assert [(e["name"], e["step"]) for e in ended(tmp_path, 6)[5:]] == [("each", 4)]


def test_what_hinders_all_of_it_is_told_and_signals_reach_commands(tmp_path):
    code = "import signal, sys; sys.exit(sum(signal.getsignal(n) == signal.SIG_IGN for n in (15, 10, 1)))"
    with Checkpointer(tmp_path, after_commit=[After(python(code))]) as c:
        c.save(1, state())
        assert ended(tmp_path, 1)[0]["code"] == 0
        (tmp_path / "after.lock").unlink()
        (tmp_path / "after.lock").mkdir()
        c.save(2, state())
        assert "it failed: cannot lock" in ended(tmp_path, 2)[1]["skipped"]


def test_what_is_due(tmp_path):
    store, now = LocalStore(tmp_path), time.time()

    def due(after, step, now):
        write_all(store, f"{StepDir(step)}/commit.json", b"")
        return is_due(after, store, StepDir(step), now)

    hourly, by_steps = After(("a",), every="1 h"), After(("b",), every="100 steps")
    assert due(hourly, 1, now)
    assert due(by_steps, 1, now)
    assert not is_due(hourly, store, StepDir(2), now), "it has gone meanwhile"
    for name in ("a", "b"):
        note(store, "after", name=name, step=50, directory="step-00000050", code=0, began=now)
    went_wrong = {"step": 60, "directory": "step-00000060", "code": 1, "began": now - 7200, "commit": digest(b"")}
    note(store, "after", name="a", **went_wrong)  # due as if it had not been, but on this one, whatever the clocks say
    assert not due(hourly, 60, now + 3600)
    assert not due(hourly, 1000, now + 3599)
    assert due(hourly, 51, now + 3600)
    assert due(hourly, 51, now - 1), "the clock was set back"
    assert not due(by_steps, 149, now + 1e6)
    assert due(by_steps, 150, now)
    assert due(by_steps, 49, now), "the run was taken back"


def test_an_export_and_a_trial_load_of_the_best(tmp_path):
    commands = [Export(tmp_path / "{step}", format="hf"), TrialLoad()]
    keep = Keep(last=2, best=("loss", "min", 1))
    with Checkpointer(tmp_path / "run", keep=keep, after_commit=commands) as c:
        c.save(1, state(), {"loss": 1.0}, wait=True)
        found = {e["name"]: e for e in ended(tmp_path / "run", 2)}
        assert {name: (e["code"], e.get("said")) for name, e in found.items()} == {
            f"export to {tmp_path}/{{step}}": (0, None),
            "trial load": (0, None),
        }
        c.save(2, state(), {"loss": 2.0}, wait=True)
        assert ended(tmp_path / "run", 3)[-1]["name"].startswith("export")
    assert [*(tmp_path / "1").glob("*.safetensors")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": "python x.py"}, "a tuple of words"),
        ({"command": ()}, "a tuple of words"),
        ({"command": ("a", "{what}")}, "{checkpoint}, {run}, {step} or {directory}"),
        ({"command": ("a", "{")}, "a brace itself is written twice"),
        ({"command": ("a",), "on": "worst"}, "'commit' or 'best'"),
        ({"command": ("a",), "every": "soon"}, "every='soon'"),
        ({"command": ("a",), "every": "1 epoch"}, "save once an epoch"),
        ({"command": ("a",), "timeout": "1 step"}, "timeout='1 step'"),
    ],
)
def test_a_command_that_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        After(**options)


@pytest.mark.parametrize(
    ("commands", "message"),
    [
        ([print], "after_commit=<built-in function print>: After"),
        ([After(("python", "a.py")), After(("python", "a.py"), every=3)], "two are called 'python a.py'"),
    ],
)
def test_commands_that_cannot_be_told_apart_are_refused(tmp_path, commands, message):
    with pytest.raises(ValueError, match=message):
        Checkpointer(tmp_path, after_commit=commands)


def test_two_programs_of_one_interpreter_are_two(tmp_path):
    names = [After(("python", script)).name for script in ("a.py", "b.py")]
    assert names == ["python a.py", "python b.py"]
    assert len(After(("python", "-c", "x" * 10_000)).name) == 200, "an event holds it as a whole"
