"""Whole runs that are killed: a tiny training program, what it must hold at each step, and the killing of its processes.

What it computes is the same to the bit over any number of ranks: gradients are sums of small integers, which are exact
in any order, and its shards are of sizes that vector instructions divide.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpointer, ElasticSampler, Progress, TrainState
from distckpt.errors import StateWarning
from distckpt.run.history import History
from distckpt.saving.objects import encoded
from distckpt.store.base import read_all
from distckpt.store.open import open_store
from tests import ranks
from tests.faults.failpoints import writers

WIDTH, SAMPLES, BATCH = 32, 48, 12
TIMEOUT = 30.0
"""Seconds that a rank waits for the others at most: the machine may be busy."""


class Net(nn.Module):
    """Two matrices and a buffer. What it returns is linear in its parameters."""

    def __init__(self, rows=24):
        super().__init__()
        self.a = nn.Linear(WIDTH, rows, bias=False)
        self.b = nn.Linear(WIDTH, 2 * rows, bias=False)
        self.register_buffer("factors", torch.arange(rows) % 5 - 2.0)

    def forward(self, x):
        return (self.a(x) * self.factors).sum() + self.b(x).sum()


def _samples(indices):
    return torch.stack([torch.arange(WIDTH) * (i + 1) % 7 - 3.0 for i in indices])


class Training:
    """The program on this rank. rows: of its smaller matrix; 36 times as many floats are saved, thrice over."""

    def __init__(self, rows=24):
        torch.manual_seed(0)
        self.model = Net(rows)
        if dist.is_initialized():
            fully_shard(self.model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sampler = ElasticSampler(SAMPLES, global_batch=BATCH)
        self.progress = Progress()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.sampler.rank)
        self.state = TrainState(
            model=self.model, optimizer=self.optimizer, sampler=self.sampler, progress=self.progress, rng=True
        )

    def step(self):
        """Make a step. Returns the samples of this rank in it."""
        order = iter(self.sampler)
        indices = [next(order) for _ in range(BATCH // self.sampler.world_size)]
        (self.model(_samples(indices)) * self.sampler.world_size).backward()  # FSDP takes the mean over ranks
        self.optimizer.step()
        self.optimizer.zero_grad()
        _ = torch.rand(3), np.random.rand(3), random.random()  # as dropout and augmentations would draw
        self.sampler.advance()
        self.progress.advance(BATCH)
        return indices

    def held(self):
        """All that decides what the next step computes, to the bit."""
        captured = self.state.capture()
        tensors = {n: [s.tensor.clone() for s in t.shards] for n, t in captured.tensors.items()}
        return {n: [t.numpy().tobytes() for t in shards] for n, shards in tensors.items()} | encoded(captured)


def train(environment, root, log, steps, reference=None, options=None, rows=24, pause=0.0):
    """Train to a step as one rank, and save each. Returns (step resumed from, notes, warnings).

    log: to whose end a line is added for each step, in a file of this process. reference: a run that nothing has
    interrupted; what is resumed must be, to the bit, what comes of its checkpoint of that step. options: of the
    Checkpointer. pause: seconds a step.
    """
    os.environ.update(environment)
    options = {"every": 1, "timeout": TIMEOUT} | (options or {})
    training = Training(rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StateWarning)
        with Checkpointer(root, **options) as c, Path(f"{log}.{os.getpid()}").open("a", buffering=1) as file:
            report = c.resume(training.state)
            if report and reference:
                resumed = training.held()
                c.load(training.state, source=reference, step=report.step)
                expected = training.held()
                wrong = [n for n in expected | resumed if expected.get(n) != resumed.get(n)]
                assert not wrong, f"step {report.step}: {wrong}"
            while (step := training.progress.global_step + 1) <= steps:
                said = {"step": step, "rank": training.sampler.rank, "samples": training.step(), "at": time.time_ns()}
                file.write(json.dumps(said) + "\n")
                c.step(step, training.state)
                time.sleep(pause)
    told = [str(w.message) for w in caught if issubclass(w.category, StateWarning)]
    return (report.step, report.notes, told) if report else (None, [], told)


def saved(root, step, rows=24):
    """What a checkpoint of the program holds, whole; every byte of it is verified on the way."""
    training = Training(rows)
    with Checkpointer(root, wait=True) as c:
        c.load(training.state, step=step)
    found = training.held()
    del found["rng"]  # each rank's own: train() compares them
    return found


def counting(root):
    """Steps of a run that have a checkpoint which counts; and that `last.json`, if it is there, names a commit."""
    store = open_store(root)
    steps = sorted(c.directory.step for c in History(store).valid())
    if any(entry.name == "last.json" for entry in store.list("")):
        data = read_all(store, "last.json", limit=1 << 20)
        assert store.head(f"{json.loads(data)['checkpoint']}/commit.json")
    return steps


def check_each_once(log, steps):
    """Of the lives that count, steps 1 to `steps` consumed the samples in the order of an uninterrupted run."""
    made = {}
    for path in log.parent.glob(f"{log.name}.*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                said = json.loads(line)
                made.setdefault((said["step"], said["rank"]), []).append((said["at"], path.name, said["samples"]))
    sampler = ElasticSampler(SAMPLES, global_batch=BATCH, rank=0, world_size=1)
    for step in range(1, steps + 1):
        newest = {rank: max(lives) for (s, rank), lives in made.items() if s == step}
        share = BATCH // len(max(newest.values())[2])
        consumed = [i for rank in range(share) for i in newest[rank][2]]
        order = iter(sampler)
        assert consumed == [next(order) for _ in range(BATCH)], f"step {step}"
        sampler.advance()


# -- killing ---------------------------------------------------------------------------------------------------------


def kill(group, whom):
    """SIGKILL `whom` of a group: all of it, its ranks alone, or its writers alone. Returns its writers, still there."""
    pids = [process.pid for process in group]
    theirs = writers(pids)
    for pid in {"all": pids + theirs, "ranks": pids, "writers": theirs}[whom]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in group if whom != "writers" else ():
        process.join(20)
    return theirs


def until(happens, seconds=60.0):
    """Wait for something; it must happen in time."""
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
    return found


def live_and_die(size, ready, whom, folder, *args):
    """A life that is killed once it is `ready`, if it lives as long. Returns its writers, of which some may live on."""
    folder.mkdir()
    group = ranks.start(size, train, *args, folder=folder)
    try:
        until(lambda: ready() or not any(p.is_alive() for p in group))
        left = kill(group, whom)
        if whom == "writers":
            for process in group:
                process.join(TIMEOUT + 20)
                assert not process.is_alive(), "a rank hangs once its writer is gone"
    finally:
        kill(group, "ranks")
    return left
