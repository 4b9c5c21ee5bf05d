"""torchrun.sh and elastic.sh as they are: told, killed in every way, shrinking and growing; each sample exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distckpt import Checkpointer, TrainState
from distckpt.run.preemption import REQUEUE
from launch.gpt import GPT, Shape
from tests.launch.counting import check_each_once

ROOT = Path(__file__).parent.parent.parent
SAMPLES, BATCH, SEQ = 96, 12, 32
EPOCH = SAMPLES // BATCH
"""Steps of one."""


class Run:
    """A run of a program in `folder`, and the scripts started for it, of which none survives the test.

    own: arguments of the program besides, as of two DataLoader workers for each rank.
    """

    def __init__(self, folder, *, steps, every=5, program="tests.launch.counting", own=("--workers=2",)):
        self.folder, self.steps, self.program = folder, steps, program
        self.root, self.losses = folder / "run", folder / "losses.jsonl"
        self._mark = f"DISTCKPT_TEST={secrets.token_hex(8)}"
        text = SAMPLES * SEQ + 1
        self._own = [f"--root={self.root}", f"--losses={self.losses}", f"--steps={steps}", f"--every={every}"]
        self._own += [
            f"--seq={SEQ}",
            f"--text-bytes={text}",
            f"--global-batch={BATCH}",
            "--width=48",
            "--layers=1",
            *own,
        ]

    def start(self, script="torchrun.sh", *given, log="log", **variables):
        """Start a script."""
        own = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "NPROC": "2"}
        own |= {"PYTHONPATH": str(ROOT)} | dict([self._mark.split("=")]) | variables
        command = [ROOT / "launch" / script, *given, "-m", self.program, *self._own]
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | own, start_new_session=True)

    def processes(self, *words):
        """Processes of this run whose command line holds all the words."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self._mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    told = (path / "cmdline").read_bytes().decode()
                    found += [int(path.name)] if all(word in told for word in words) else []
        return sorted(found)

    def ranks(self):
        """Processes that train: of those that run the program, the ones whose parents do not."""
        of_program = [p for p in self.processes(self.program) if p not in self.agents() + self.scripts()]
        return [p for p in of_program if _parent(p) not in of_program]

    def agents(self):
        return self.processes("torch.distributed.run")

    def scripts(self):
        return self.processes("/launch/")

    def rows(self):
        text = self.losses.read_text() if self.losses.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def until(self, holds, what, seconds=90):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.said()[-6000:]}"
            time.sleep(0.02)

    def until_step(self, step, *, world=None):
        """Wait until the newest step made is at least this, and made by so many ranks."""

        def is_so():
            rows = self.rows()
            return rows and rows[-1]["step"] >= step and world in (None, rows[-1]["world"])

        self.until(is_so, f"step {step}, {world} ranks")
        return self.rows()[-1]["step"]

    def committed(self):
        return {int(path.parent.name[5:13]) for path in self.root.glob("step-*/commit.json")}

    def said(self):
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log*")))

    def end(self, process, code, seconds=90):
        """Wait for a script, and for its exit code."""
        try:
            assert process.wait(seconds) == code, self.said()[-6000:]
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {seconds} s\n{self.said()[-6000:]}")

    def kill(self):
        for _ in range(100):
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not self.processes():
                return
            time.sleep(0.05)
        pytest.fail(f"processes {self.processes()} do not die")


def _parent(pid):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path, steps=5 * EPOCH)
    yield made
    made.kill()


def check(run):
    check_each_once(run.losses, run.steps, samples=SAMPLES, global_batch=BATCH)
    assert run.steps in run.committed()
    run.until(lambda: not run.processes(), "the end of every process")


@pytest.mark.timeout(300)
@pytest.mark.full
def test_sigterm_saves_and_a_rank_that_is_killed_is_started_again(run):
    first = run.start()
    run.until_step(6)
    first.send_signal(signal.SIGTERM)
    run.end(first, REQUEUE)
    told = run.rows()[-1]["step"]
    assert told in run.committed()

    second = run.start()
    run.until_step(told + 2)
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.end(second, 0)
    check(run)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["agents", "all"])
def test_whatever_is_killed_the_next_start_goes_on(run, what):
    first = run.start()
    run.until_step(8)
    for pid in run.agents() if what == "agents" else run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    # the workers of an agent that was killed are told to stop, and save
    run.end(first, REQUEUE if what == "agents" else -signal.SIGKILL)
    made = run.rows()[-1]["step"]
    assert not run.processes("torch")
    if what == "agents":
        assert made in run.committed()
    second = run.start()
    run.end(second, 0)
    check(run)


@pytest.mark.full
@pytest.mark.timeout(500)
def test_a_group_shrinks_when_a_node_is_lost_and_grows_when_it_is_back(tmp_path):
    run = Run(tmp_path, steps=300 * EPOCH)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        head = f"127.0.0.1:{probe.getsockname()[1]}"
    options = {"NNODES": "1:2", "NPROC": "1", "PATIENCE": "5"}
    try:
        one = run.start("elastic.sh", head, "test", log="log-1", **options)
        run.until(lambda: run.agents(), "an agent")
        two = run.start("elastic.sh", head, "test", log="log-2", LOST="1", **options)
        lost = run.until_step(20, world=2)
        before = [pid for pid in run.processes() if b"LOST=1" in Path(f"/proc/{pid}/environ").read_bytes()]
        for pid in before:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        two.wait(10)
        alone = run.until_step(lost + 20, world=1)
        three = run.start("elastic.sh", head, "test", log="log-3", **options)
        run.until_step(alone + 20, world=2)
        for process in (one, three):
            process.send_signal(signal.SIGTERM)
        for process in (one, three):
            run.end(process, REQUEUE)
        last = run.rows()[-1]["step"]
        assert last in run.committed()
        check_each_once(run.losses, last // EPOCH * EPOCH, samples=SAMPLES, global_batch=BATCH)
    finally:
        run.kill()


def _export(run, to):
    """Export the newest checkpoint's weights, as its user would; returns what is in the file."""
    command = [sys.executable, "-m", "distckpt.reshard", run.root, to, "--to", "safetensors", "--only", "model"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60, capture_output=True)
    return {name: tensor for file in to.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.full
@pytest.mark.timeout(300)
def test_sharded_saves_by_time_full_exports_now_and_then_and_another_number_of_ranks(tmp_path):
    run = Run(tmp_path, steps=25 * EPOCH, every="2 s")
    try:
        first = run.start()
        run.until(lambda: len(run.committed()) >= 2, "two saves by time")
        assert _export(run, tmp_path / "early")  # while it trains
        first.send_signal(signal.SIGTERM)
        run.end(first, REQUEUE)
        second = run.start(NPROC="3")
        run.end(second, 0)
        assert {row["world"] for row in run.rows()} == {2, 3}
        check(run)
        model = GPT(Shape(width=48, layers=1, seq=SEQ))
        with Checkpointer(run.root) as checkpointer:
            checkpointer.load(TrainState(model=model, rng=False), only=("model",))
        weights = model.state_dict()
        exported = _export(run, tmp_path / "last")
        assert set(exported) <= set(weights)
        assert {tensor.data_ptr() for tensor in weights.values()} == {weights[name].data_ptr() for name in exported}
        assert all(torch.equal(weights[name], tensor) for name, tensor in exported.items())
    finally:
        run.kill()
