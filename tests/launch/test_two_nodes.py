"""ZeRO-3 with offload on two nodes: saved locally, sent to an object store; killed; resumed elsewhere from that alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from distckpt.run.history import History
from distckpt.store.object import ObjectStore
from tests import deepspeeds
from tests.launch.test_torchrun import ROOT, Run
from tests.store import servers

STEPS = 16


def _reference(args):
    """The same training, which nothing interrupts."""
    deepspeeds.joined()
    from launch import train_deepspeed

    train_deepspeed.train(train_deepspeed.parse(args))


def _sent(bucket):
    """Steps that the object store has."""
    return sorted(c.directory.step for c in History(ObjectStore(bucket.uri, bucket.options)).valid())


def _distckpt(bucket, *words):
    """Run a command line of the package on the bucket; returns what it prints."""
    command = [sys.executable, "-m", *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | bucket.environment, capture_output=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.decode()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_job_of_two_nodes_that_is_killed_goes_on_elsewhere_from_the_object_store_alone(tmp_path):
    bucket = servers.start("moto").bucket()
    near, elsewhere = tmp_path / "near", tmp_path / "elsewhere"
    own = [f"--root={bucket.uri}", "--keep=3", f"--local-dir={near}", "--keep-local=2", "--stage=3", "--offload"]
    run = Run(tmp_path, steps=STEPS, every=2, program="tests.launch.offloaded", own=own)
    variables = bucket.environment | {"DS_ACCELERATOR": "cpu", "RESTARTS": "0", "NPROC": "1"}
    head = f"127.0.0.1:{servers.free_port()}"
    nodes = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint {head} --rdzv-id job"
    try:
        agents = [run.start(log=f"log-{node}", NODES=nodes, **variables) for node in (1, 2)]
        run.until(lambda: len(_sent(bucket)) >= 2 or not run.processes(), "two checkpoints in the store", seconds=240)
        assert run.processes(), run.said()[-6000:]
        run.kill()
        assert [agent.wait(20) for agent in agents] == [-signal.SIGKILL] * 2
        killed, sent = run.rows()[-1]["step"], _sent(bucket)
        assert _distckpt(bucket, "distckpt", "verify", bucket.uri, "--all").count("whole") == len(sent)

        shutil.rmtree(near)
        run._own += [f"--local-dir={elsewhere}"]
        run.end(run.start(log="log-3", **variables | {"NPROC": "3"}), 0, seconds=240)
    finally:
        run.kill()
    assert _sent(bucket)[-1] == STEPS
    assert len(_sent(bucket)) == 3
    assert len([*elsewhere.glob("step-*/commit.json")]) == 2

    rows = run.rows()
    resumed = next(row["step"] for row in rows if row["world"] == 3) - 1
    assert sent[-1] <= resumed <= killed
    folder = tmp_path / "reference"
    again = [a for a in run._own if not a.startswith(("--root", "--losses", "--local"))]
    again += [f"--root={folder}", f"--losses={folder}.jsonl"]
    deepspeeds.run(2, _reference, again, timeout=180)
    exact = {row["step"]: row for row in map(json.loads, (tmp_path / "reference.jsonl").read_text().splitlines())}
    assert {row["step"] for row in rows} == set(exact) == set(range(1, STEPS + 1))
    assert all(row["hex"] == exact[row["step"]]["hex"] for row in rows if row["world"] == 2)
    assert all(abs(row["loss"] / exact[row["step"]]["loss"] - 1) < 1e-4 for row in rows)

    tags = tmp_path / "tags"
    options = ["--to", "deepspeed", "--zero-stage", "3", "--world-size", "2"]
    _distckpt(bucket, "distckpt.reshard", bucket.uri, str(tags), *options)
    assert (tags / "latest").read_text() == f"global_step{STEPS}"
