"""launch.train_fsdp with samples that bear their number, and a record of which were in each step that was made."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from distckpt import ElasticSampler
from launch import train_fsdp

_DIGITS = torch.tensor([1, 256, 256**2])


class Counted(train_fsdp.StdlibText):
    """The number of a sample is its first three bytes."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        sample[:3] = i // _DIGITS % 256
        return sample


class CountingLog(train_fsdp.Log):
    """Adds a line for each step and rank to a file of its own beside `file`."""

    def __init__(self, file, first, steps):
        super().__init__(file, first, steps)
        life = [time.time_ns()]
        dist.broadcast_object_list(life)
        self._life = life[0]
        self._samples = Path(f"{file}.samples-{os.getpid()}-{self._life}")

    def step(self, step, loss, lr):
        super().step(step, loss, lr)
        said = {"life": self._life, "step": step, "rank": dist.get_rank(), "samples": _in_step}
        with self._samples.open("a") as file:
            file.write(json.dumps(said) + "\n")


_in_step: list[int] = []
_train_step = train_fsdp.train_step


def counting_step(model, optimizer, batch, micro_batch):
    _in_step[:] = (batch[:, :3] * _DIGITS).sum(1).tolist()
    return _train_step(model, optimizer, batch, micro_batch)


def steps(losses):
    """Samples of each step, over all ranks, as the last life that made it did: what earlier ones made of it is undone."""
    found = defaultdict(dict)
    for path in losses.parent.glob(f"{losses.name}.samples-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                said = json.loads(line)
                found[said["step"], said["life"]][said["rank"]] = said["samples"]
    newest = {step: life for step, life in sorted(found)}
    of = {step: found[step, life] for step, life in newest.items()}
    return {step: [i for rank in sorted(by_rank) for i in by_rank[rank]] for step, by_rank in of.items()}


def check_each_once(losses, count, *, samples, global_batch):
    """Steps 1 to `count` consumed each sample of the data exactly once an epoch, in the order of the data."""
    made = steps(losses)
    assert set(made) >= set(range(1, count + 1))
    sampler = ElasticSampler(samples, global_batch=global_batch, rank=0, world_size=1)
    a_epoch = samples // global_batch
    assert (samples % global_batch, count % a_epoch) == (0, 0)
    for first in range(1, count + 1, a_epoch):
        consumed = [i for step in range(first, first + a_epoch) for i in made[step]]
        assert sorted(consumed) == list(range(samples))
        assert consumed == list(sampler)
        for _ in range(a_epoch):
            sampler.advance()


if __name__ == "__main__":
    train_fsdp.StdlibText = Counted
    train_fsdp.train_step = counting_step
    train_fsdp.Log = CountingLog
    train_fsdp.main()
