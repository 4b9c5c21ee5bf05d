"""launch/slurm/ on a real cluster: jobs that are told, cancelled, and lose a node end where the uninterrupted one does."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.launches import read_launches
from distckpt.store.local import LocalStore
from launch import train_fsdp
from launch.demo import differing_chunks
from tests import ranks
from tests.launch import slurm

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ROOT / "launch" / "slurm"
START = 90
"""Seconds that a job may take until it trains: two agents and two ranks import torch on a machine that may be busy."""
SMALL = ("--width=48", "--layers=1", "--dropout=0.1", "--text-bytes=400000")


class Submitted:
    """A job of the training program, tiny; its run's directory, its losses and what it says lie in `folder`."""

    def __init__(self, cluster, folder, *, script="multinode.sbatch", steps, options=(), training=(), **variables):
        self.cluster, self.folder, self.steps = cluster, folder, steps
        self.root, self._losses = folder / "run", folder / "losses.jsonl"
        own = [f"--root={self.root}", f"--losses={self._losses}", f"--steps={steps}", "--every=4", *SMALL, *training]
        self._given = [*options, str(SCRIPTS / script), "-m", "launch.train_fsdp", *own]
        self._variables = {"LAUNCH": str(ROOT / "launch"), "PYTHONPATH": str(ROOT), "RESTARTS": "0"} | variables
        self.submit()

    def submit(self):
        """Submit it, as its user would again."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.number = self.cluster.submit(*self._given, cwd=self.folder, PATH=path, **self._variables)

    def rows(self):
        """Every step made so far, in the order of time."""
        text = self._losses.read_text() if self._losses.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def said(self):
        """What it printed."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("train-*.out")))

    def committed(self):
        """Steps that have a commit."""
        return {int(path.parent.name[5:13]) for path in self.root.glob("step-*/commit.json")}

    def half_written(self, since):
        """A step of which files lie there, written since then, and no commit."""
        for path in self.root.glob("step-*"):
            if (path / "commit.json").exists():
                continue
            for file in (*path.glob("rank-*"), *path.glob(".tmp-*")):
                try:
                    if file.stat().st_mtime >= since:
                        return int(path.name[5:13])
                except FileNotFoundError:  # it got its name meanwhile: it is seen next time
                    continue
        return None

    def until_step(self, step):
        """Wait until it has made a step."""
        self.until(lambda: any(row["step"] >= step for row in self.rows()), f"step {step}")

    def until_state(self, *states, restarts=None):
        """Wait until it is in one of these states, and (if given) was started again so often."""

        def is_so():
            job = self.cluster.job(self.number)
            return job["JobState"] in states and restarts in (None, int(job["Restarts"]))

        self.until(
            is_so, f"{states}, restarts {restarts}", seconds=2 * START
        )  # SLURM takes up to 65 s to give up a node

    def until(self, holds, what, seconds=START):
        """Wait for something; whatever fails says what the job said."""
        try:
            self.cluster.until(holds, what, seconds=seconds)
        except BaseException:
            print(self.said()[-6000:])
            raise

    def power_cut_in_a_save(self, node):
        """Cut a node's power while the job saves."""
        since = time.time()
        deadline = time.monotonic() + START
        while not self.half_written(since):
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.001)  # a save of this model takes tens of milliseconds
        self.cluster.off(node)


def _reference(*args):
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return train_fsdp.train(train_fsdp.parse(args))


def check_equal(job, folder, world=2):
    """Every step of the job, made again or not, and its last checkpoint are those of a run that nothing interrupted."""
    base, losses = folder / "reference", folder / "reference.jsonl"
    args = (f"--root={base}", f"--losses={losses}", f"--steps={job.steps}", "--every=100000", *SMALL)
    ranks.run(world, _reference, *args, preload=("launch.train_fsdp",))
    exact = {row["step"]: row["hex"] for row in map(json.loads, losses.read_text().splitlines())}
    assert set(exact) == {row["step"] for row in job.rows()} == set(range(1, job.steps + 1))
    assert not [row["step"] for row in job.rows() if row["hex"] != exact[row["step"]]]
    last = f"step-{job.steps:08d}"
    assert not differing_chunks(job.root / last, base / last)


_ARRAY = """#!/bin/bash
source "$LAUNCH/slurm/requeue.sh"
run_and_requeue bash -c 'echo life $SLURM_RESTART_COUNT; [[ -n $SLURM_RESTART_COUNT ]] || exit 75'
"""


@pytest.fixture
def cluster(tmp_path):
    slurm.require()
    with slurm.Cluster(tmp_path / "cluster", kill_wait=5) as made:
        yield made


@pytest.mark.timeout(400)
def test_a_job_that_is_told_and_then_loses_a_node_in_a_save_ends_as_if_nothing_had_been(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, steps=60)
    job.until_step(6)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job.number))  # what --signal=B:USR1 does, at once
    job.until_state("RUNNING", restarts=1)
    told = max(row["step"] for row in job.rows())
    assert told in job.committed()
    assert re.search(r"SIGUSR1.*ended with 75", job.said(), re.DOTALL)

    job.until_step(told + 1)
    job.power_cut_in_a_save(1)
    cluster.mark_down(1)  # by itself it is noticed after half a minute
    cluster.on(1)
    job.until_state("COMPLETED", restarts=2)
    starts = [int(step) for step in re.findall(r"^step (\d+): \d+ tensors", job.said(), re.MULTILINE)]
    assert starts == [told, max(told, starts[-1])]
    check_equal(job, tmp_path)
    assert not list(tmp_path.glob("exit-*"))


def test_each_task_of_an_array_is_queued_again_by_itself(cluster, tmp_path):
    (tmp_path / "script").write_text(_ARRAY)
    options = ("--array=1-3", "--requeue", "--open-mode=append", "--output=%a.out")
    number = cluster.submit(*options, "script", cwd=tmp_path, LAUNCH=str(ROOT / "launch"))
    cluster.until(lambda: not cluster.run("squeue", "--noheader", "--jobs", str(number)).strip(), "its end", seconds=60)
    for task in (1, 2, 3):
        said = (tmp_path / f"{task}.out").read_text()
        assert re.findall(r"^life ?(.*)$", said, re.MULTILINE) == ["", "1"], said


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_cancelled_job_has_saved_stays_cancelled_and_goes_on_where_it_is_submitted_again(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, steps=60)
    job.until_step(6)
    cluster.run("scancel", str(job.number))
    job.until_state("CANCELLED", restarts=0)
    told = max(row["step"] for row in job.rows())
    assert told in job.committed()
    job.submit()
    job.until_state("COMPLETED", restarts=0)
    assert f"\nstep {told}: " in job.said()
    check_equal(job, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_job_longer_than_its_time_finishes_in_several_lives(cluster, tmp_path):
    job = Submitted(cluster, tmp_path, steps=500, options=("--time=1", "--signal=B:USR1@40"), training=("--every=100",))
    job.until(lambda: job.cluster.state(job.number) == "COMPLETED", "its end", seconds=800)
    assert "SIGUSR1" in job.said()
    check_equal(job, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_an_unplugged_node_trains_on_beside_the_requeued_job_and_nothing_of_it_is_resumed(cluster, tmp_path):
    # slow enough for the second job to begin before the first is done
    job = Submitted(cluster, tmp_path, script="single.sbatch", steps=400, NPROC="1")
    job.until_step(6)
    node = int(cluster.job(job.number)["BatchHost"][1:])
    cluster.unplug(node)
    unplugged_at = max(row["step"] for row in job.rows())
    cluster.mark_down(node)
    job.until_state("RUNNING", restarts=1)
    job.until(lambda: len(read_launches(LocalStore(job.root))) == 2, "the second launch")
    resumed = StepDir.parse(read_launches(LocalStore(job.root))[1].resumed_from).step
    assert resumed > unplugged_at, "it did not go on alone"
    job.until_state("COMPLETED", restarts=1)
    later = [c for c in History(LocalStore(job.root)).valid() if c.directory.step > resumed]
    assert {json.loads((job.root / str(c.directory) / "commit.json").read_text())["launch"] for c in later} == {2}
    cluster.plug(node)
    check_equal(job, tmp_path, world=1)
