"""Queues of real training processes: order, slots, crashes, kills of everything, stops; and what `status` says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from distckpt import cli
from distckpt.queue import spec
from distckpt.queue.progress import rows
from distckpt.queue.runner import Runner, runs_it
from distckpt.queue.standing import State, born, crashes_in_a_row, identity, standing, started_process
from distckpt.run.events import note, read
from distckpt.store.local import LocalStore
from distckpt.tools.queue import lines
from tests.queue.trainer import EVERY
from tests.run.test_async import until

HERE = os.getcwd()


def made(folder, runs, head="slots = 2\nbackoff = 0.2\n"):
    """A queue's file. runs: name -> arguments of the trainer after its root."""
    entries = [
        f'[[run]]\nname = "{name}"\nroot = "{name}"\nmetric = "loss"\nsteps = {arguments[0]}\n'
        f"command = {json.dumps([sys.executable, '-m', 'tests.queue.trainer', name, *map(str, arguments)])}\n"
        f'env = {{ PYTHONPATH = "{HERE}", OMP_NUM_THREADS = "1" }}\n'
        for name, arguments in runs.items()
    ]
    (folder / "q.toml").write_text(head + "".join(entries))
    return folder / "q.toml"


def begun(file, *more):
    command = [sys.executable, "-m", "distckpt.cli", "queue", str(file), "run", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def ended(process, seconds=100):
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
        process.wait()


def done(folder, name):
    """Steps that a run has done, in order."""
    path = folder / name / "done.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def states(file):
    queue = spec.load(file)
    return {run.name: standing(run, queue.restarts).state.value for run in queue.runs}


def kill_everything(queue, file):
    """SIGKILL to the queue and to all that it started, at once, as a power cut would."""
    found = [standing(run, 0).events for run in spec.load(file).runs]
    pids = [e["pid"] for events in found for e in events if e["event"] == "started" and born(e["pid"]) == e["born"]]
    os.kill(queue.pid, signal.SIGKILL)
    for pid in pids:
        os.killpg(pid, signal.SIGKILL)
    queue.communicate(timeout=20)


def commands(folder, runs, head):
    """A queue's file of commands of the shell. runs: name -> command."""
    entry = '[[run]]\nname = "{0}"\nroot = "{0}"\ncommand = ["sh", "-c", {1}]\n'
    (folder / "q.toml").write_text(head + "".join(entry.format(n, json.dumps(c)) for n, c in runs.items()))
    return folder / "q.toml"


def test_runs_in_order_so_many_at_a_time_and_crashed_ones_again(tmp_path):
    made(tmp_path, {"b": (12, 8)})
    trainer = (tmp_path / "q.toml").read_text().partition("[[run]]")[2]
    file = commands(tmp_path, {"a": "sleep 1"}, "slots = 2\nbackoff = 0.2\n")
    text = file.read_text() + f"[[run]]{trainer}"
    file.write_text(text + commands(tmp_path, {"c": "echo $PPID >> ran"}, "").read_text())
    queue = begun(file)
    most = 0
    deadline = time.monotonic() + 90
    while queue.poll() is None and time.monotonic() < deadline:
        most = max(most, Counter(states(file).values())["running"])
        time.sleep(0.05)
    out = ended(queue)
    assert queue.returncode == 0, out
    assert states(file) == dict.fromkeys("abc", "finished")
    assert most == 2
    assert done(tmp_path, "b") == [*range(1, 9), *range(6, 13)], "from its last checkpoint"
    told = [line[line.index("  ") + 2 :] for line in out.splitlines() if "  " in line]
    begins = [line for line in told if "begins" in line]
    assert begins == [f"{name}: begins, attempt 1" for name in "abc"]
    assert told.index("c: begins, attempt 1") > 2, "once another has ended"
    assert "RuntimeError: as it was told to" in (tmp_path / "b" / "logs" / "attempt-0001.log").read_text()
    for line in ("b: ended with 1: resumable; again in", "b: resumes, attempt 2"):
        assert line in out
    again = begun(file)
    assert "c: finished" in ended(again)
    assert len((tmp_path / "ran").read_text().splitlines()) == 1


def _through_kills(tmp_path, names, steps, kills, seed):
    file, chance = made(tmp_path, dict.fromkeys(names, (steps,)), "slots = 4\n"), random.Random(seed)
    for _ in range(kills):
        queue = begun(file)
        until(lambda: "running" in states(file).values(), 30)
        time.sleep(chance.uniform(0.5, 8.0))
        kill_everything(queue, file)
    out = ended(begun(file), 300)
    assert states(file) == dict.fromkeys(names, "finished"), out
    for name in names:
        counts = Counter(done(tmp_path, name))
        assert set(counts) == set(range(1, steps + 1)), "no step is left out"
        repeated = sum(counts.values()) - steps
        assert repeated <= kills * EVERY, "no more than an interval a kill"


@pytest.mark.full
def test_everything_killed_at_once_changes_nothing(tmp_path):
    _through_kills(tmp_path, ["a", "b"], 30, 1, 1)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_marathon_of_two_quartets_through_three_reboots(tmp_path):
    names = [f"{quartet}-{size}" for quartet in ("q1", "q2") for size in ("small", "base", "large")]
    _through_kills(tmp_path, names, 60, 3, 2)


@pytest.mark.full
def test_a_run_that_outlives_the_queue_is_not_started_twice(tmp_path):
    file = made(tmp_path, {"a": (60,)})
    first = begun(file)
    until(lambda: len(done(tmp_path, "a")) > 3, 30)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=20)
    assert states(file) == {"a": "running"}
    out = ended(begun(file))
    assert states(file) == {"a": "finished"}
    assert done(tmp_path, "a") == [*range(1, 61)]
    assert "attempt 2" in out, "nobody saw it end: started once more, it found nothing left to do"


@pytest.mark.full
def test_stopped_runs_save_and_go_on(tmp_path, capsys):
    file = made(tmp_path, {"a": (200,), "b": (200,)})
    queue = begun(file)
    until(lambda: len(done(tmp_path, "a")) > 6 and len(done(tmp_path, "b")) > 6, 60)
    refused = subprocess.run(queue.args, capture_output=True, text=True, timeout=60, check=False)
    assert (refused.returncode, "another process holds it" in refused.stderr) == (4, True)
    assert cli.main(["queue", str(file), "stop"]) == 0
    assert "nothing of the queue runs any more" in capsys.readouterr().out
    out = ended(queue, 30)
    assert "stopping: runs save, and end" in out
    assert states(file) == {"a": "resumable", "b": "resumable"}
    for name in ("a", "b"):
        commits = [e["step"] for e, _ in read(tmp_path / name) if e["event"] == "committed"]
        assert commits[-1] == done(tmp_path, name)[-1], "not a step is lost"


def test_a_run_that_keeps_crashing_fails_and_others_go_on(tmp_path):
    head = "slots = 1\nrestarts = 1\nbackoff = 0.1\n"
    often = "echo x >> often; [ $(wc -l < often) = 3 ] || exit 75"  # as one that the system stops
    file = commands(tmp_path, {"bad": "echo x >> crashed; exit 3", "good": often}, head)
    with file.open("a") as text:
        text.write('[[run]]\nname = "none"\nroot = "none"\ncommand = ["no-such-program"]\n')
    queue = begun(file)
    out = ended(queue)
    assert queue.returncode == 1
    assert states(file) == {"bad": "failed", "good": "finished", "none": "failed"}
    assert (tmp_path / "crashed").read_text() == "x\nx\n"
    assert "none: cannot be started" in out
    file = commands(tmp_path, {"bad": "true", "good": "exit 3"}, head)
    assert "bad: begins, attempt 3" in ended(begun(file, "--retry"))
    assert states(file) == {"bad": "finished", "good": "finished"}


# -- what is derived, from events alone ------------------------------------------------------------------------------


def run_of(tmp_path, steps=100):
    return spec.load(made(tmp_path, {"a": (steps,)}, "restarts = 2\n")).runs[0]


def test_where_a_run_stands(tmp_path):
    run = run_of(tmp_path)
    store = LocalStore(run.root)

    def state():
        return standing(run, 2).state

    assert state() is State.WAITING
    note(store, "started", pid=os.getpid(), born=born(os.getpid()), host=os.uname().nodename)
    assert state() is State.RUNNING
    note(store, "started", pid=os.getpid(), born="of an earlier boot", host=os.uname().nodename)
    assert state() is State.WAITING
    note(store, "committed", step=1)
    assert state() is State.RESUMABLE
    for crashes in (1, 2):
        note(store, "exited", code=-9)
        assert (state(), standing(run, 2).crashes) == (State.RESUMABLE, crashes)
    note(store, "exited", code=75)
    note(store, "exited", code=1)
    assert state() is State.FAILED
    note(store, "started", afresh=True)
    assert state() is State.RESUMABLE
    note(store, "exited", code=76)
    assert state() is State.STOPPED
    note(store, "exited", code=0)
    assert state() is State.FINISHED
    assert born(1 << 22) is None


CRASH = {"event": "exited", "code": 1}


def life(*commits, begins=None):
    """A launch that goes on from a step, and commits others."""
    return [{"event": "launched", **({"step": begins} if begins is not None else {})}, *map(commit, commits)]


def commit(step):
    return {"event": "committed", "step": step}


@pytest.mark.parametrize(
    ("events", "crashes"),
    [
        ([CRASH, CRASH, *life(3), CRASH, {"event": "exited", "code": 75}], 1),
        ([*life(3), CRASH, *life(3, begins=3), CRASH, *life(3, begins=3), CRASH], 3),  # each saves the last step again
        ([*life(3), CRASH, *life(5, 4, begins=3), CRASH], 1),
        ([*life(9), CRASH, *life(4, begins=3), CRASH], 1),  # taken back by hand
        ([*life(0), CRASH], 1),
        ([CRASH, {"event": "exited", "code": -15, "told": True}], 1),
    ],
)
def test_crashes_are_counted_since_a_run_came_further(events, crashes):
    assert crashes_in_a_row(events) == crashes


def test_a_process_that_ended_at_once_does_not_live():
    events = [{"event": "started", "pid": 1 << 22, "host": os.uname().nodename}]  # nothing was left to know it by
    assert started_process(events) is None


@pytest.mark.parametrize("broken", ["events.jsonl/", "launches/0001.json"])
def test_a_run_that_cannot_be_looked_at_has_failed_and_others_go_on(tmp_path, broken, capsys):
    file = made(tmp_path, {"a": (5,), "b": (5,)})
    note(LocalStore(tmp_path / "b"), "exited", code=0)
    path = tmp_path / "a" / broken
    path.parent.mkdir(parents=True)
    path.mkdir() if broken.endswith("/") else path.write_text("{}")
    assert cli.main(["queue", str(file), "status"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown[1:3]] == ["failed", "finished"]
    assert shown[3].startswith("a: ")
    assert broken.strip("/") in shown[3]
    told = []
    assert Runner(spec.load(file), retry=broken.endswith("/"), say=told.append).run() == {
        "a": State.FAILED,
        "b": State.FINISHED,
    }
    assert [line.partition(",")[0] for line in told] == ["a: given up"] * broken.endswith("/")


def test_what_becomes_of_a_run_must_be_written_down_or_it_is_given_up(tmp_path):
    """Or it would be started again and again, for nobody would know that it has finished."""
    file = commands(tmp_path, {"a": "sleep 0.3; rm a/events.jsonl; mkdir a/events.jsonl"}, "slots = 1\n")
    told = []
    assert Runner(spec.load(file), say=told.append).run() == {"a": State.FAILED}
    assert [line.partition(",")[0] for line in told] == ["a: begins", "a: given up"]


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        yield process
        process.kill()


def test_runs_that_live_keep_their_slots_and_gpus_whatever_waits_before_them(tmp_path, sleeper):
    file = commands(tmp_path, dict.fromkeys("abcd", "kill $PPID; sleep 9"), "gpus = [4, 5, 6]\n")
    for name, gpu in (("c", 4), ("b", 6)):
        note(LocalStore(tmp_path / name), "started", gpus=[gpu], **identity(sleeper.pid))
    queue = begun(file)
    until(lambda: (tmp_path / "a").exists(), 30)
    sleeper.kill()
    out = ended(queue)
    assert "a: begins, attempt 1, on GPU 5" in out
    assert not (tmp_path / "d").exists()
    assert states(file) == dict.fromkeys("abcd", "waiting")
    assert "a: ended with -15: waiting" in out, "stopped by the queue, which is no crash"


@pytest.mark.parametrize("name", ["my queue (1).toml", ".очередь", "+"])
def test_a_queues_file_may_have_any_name(tmp_path, name):
    file = commands(tmp_path, {"a": "true"}, "").rename(tmp_path / name)
    assert Runner(spec.load(file), say=lambda _: None).run() == {"a": State.FINISHED}


def test_a_queue_that_another_machine_runs_is_stopped_there(tmp_path, sleeper, capsys):
    file = made(tmp_path, {"a": (5,)})
    with LocalStore(tmp_path).locked("q.toml.lock"):
        (tmp_path / "q.toml.lock").write_text(json.dumps({**identity(sleeper.pid), "host": "elsewhere"}))
        assert cli.main(["queue", str(file), "stop"]) == 4
        assert f"is run by process {sleeper.pid} on elsewhere: stop it there" in capsys.readouterr().err
        (tmp_path / "q.toml.lock").write_text(json.dumps({**identity(sleeper.pid), "born": "earlier"}))
        assert runs_it(spec.load(file)) == 0, "a number that another process has now is not signalled"


def test_the_table(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, 97, 31744, 81920'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run = run_of(tmp_path)
    store = LocalStore(run.root)
    now = time.time()
    note(store, "started", pid=os.getpid(), born=born(os.getpid()), host=os.uname().nodename, gpus=[0])
    for step, loss in ((10, 1.0), (20, 0.5), (30, 0.75)):
        monkeypatch.setattr(time, "time", lambda step=step: now - 40 + step)
        note(store, "staged", launch=1, step=step, samples=80 * step, epoch=step // 10, stall=0.1)
        note(store, "committed", launch=1, step=step, bytes=1, metrics={"loss": loss})
    monkeypatch.setattr(time, "time", lambda: now)
    (row,) = rows(spec.load(tmp_path / "q.toml"))
    assert (row.state, row.step, row.epoch, row.metric, row.best) == ("running", 30, 3, 0.75, 0.5)
    assert row.rate == pytest.approx(80.0)
    assert row.age == pytest.approx(10.0, abs=0.01)
    assert row.eta == pytest.approx(60.0, abs=0.01)
    text = lines([row])[1]
    for part in ("30/100 30%", "0.75", "0.5", "80 samples", "00:00:", "0: 97% 31.0/80 GiB"):
        assert part in text


def test_status_on_the_command_line(tmp_path, capsys, monkeypatch):
    file = made(tmp_path, {"a": (5,), "b": (5,)})
    assert cli.main(["queue", str(file), "status", "--json"]) == 0
    assert [(row["name"], row["state"], row["eta"]) for row in json.loads(capsys.readouterr().out)] == [
        ("a", "waiting", None),
        ("b", "waiting", None),
    ]
    assert cli.main(["queue", str(file), "status"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["a", "waiting", "-/5"]
    assert cli.main(["queue", str(tmp_path / "nowhere.toml"), "status"]) == 4
    monkeypatch.chdir(tmp_path)
    assert cli.main(["queue", str(file), "submit"]) == 4
    assert "no such batch script" in capsys.readouterr().err


def test_an_array_of_what_is_not_finished(tmp_path, monkeypatch, capsys):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" > told\necho Submitted batch job 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    file = made(tmp_path, {"a": (5,), "b c": (5,)})
    note(LocalStore(tmp_path / "a"), "exited", code=0)
    Path("array.sbatch").touch()
    assert cli.main(["queue", str(file), "submit", "--script", "array.sbatch", "--sbatch=--time=1:00"]) == 0
    assert capsys.readouterr().out == "Submitted batch job 7\n"
    told = Path("told").read_text().split()
    assert told[:3] == ["--array=1-1%2", f"--chdir={tmp_path}", "--time=1:00"]
    assert Path(told[-1]).read_text().endswith("tests.queue.trainer 'b c' 5\n")
    note(LocalStore(tmp_path / "a"), "started")
    assert cli.main(["queue", str(file), "submit", "--script", "array.sbatch"]) == 0
    assert len(Path(told[-1]).read_text().splitlines()) == 1, "what is submitted stays, whatever is submitted after it"
    assert len(Path(Path("told").read_text().split()[-1]).read_text().splitlines()) == 2
