"""One life of a training program that is killed over and over: what it trains, under each layout, and how it is watched.

What it computes is the same to the bit under any layout (see tests/run/lives.py). So whatever a life resumes must be
what an undisturbed run on one process held after that step; and each save says what its rank held besides.
"""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distckpt import Checkpointer, ElasticSampler, Keep, TrainState
from distckpt.format.box import Run
from distckpt.run.history import History
from distckpt.run.sweep import leftovers
from distckpt.saving.objects import encoded
from distckpt.store.local import LocalStore
from tests.run import lives

KEEP = Keep(last=2)
TIMEOUT = 15.0
"""Seconds that a rank, and a writer whose trainer is gone, waits for the others at most."""
LAYOUTS = {"plain": (1,), "ddp": (2, 3, 4), "fsdp1": (2, 3, 4), "fsdp2": (2, 3, 4), "tp": (2, 3, 4)}
"""Layout -> world sizes."""
NOT_COMPARED = {"rng", "environment"}
"""Objects that differ between layouts and world sizes."""


class Net(lives.Net):
    """The program's two matrices, and a frozen one that is most of the state: it is stored once."""

    def __init__(self, *, frozen):
        super().__init__()
        self.base = nn.Linear(lives.WIDTH, 192 if frozen else 12, bias=False).requires_grad_(requires_grad=False)

    def forward(self, x):
        return super().forward(x) + self.base(x).sum()


class Program(lives.Training):
    """The program on this rank, under a layout."""

    def __init__(self, layout, *, frozen):
        torch.manual_seed(0)
        self.model = wrapped(Net(frozen=frozen), layout)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1 / (1 + n % 7))
        place = {"rank": 0, "world_size": 1} if layout == "tp" else {}
        self.sampler = ElasticSampler(lives.SAMPLES, global_batch=lives.BATCH, **place)
        self.progress = lives.Progress()
        rank = dist.get_rank() if dist.is_initialized() else 0
        for seed in (lives.random.seed, np.random.seed, torch.manual_seed):
            seed(rank)
        self.state = TrainState(
            model=self.model,
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            sampler=self.sampler,
            progress=self.progress,
        )

    def step(self):
        samples = super().step()
        self.schedule.step()
        return samples


def wrapped(net, layout):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    if layout == "plain":
        return net
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if layout == "fsdp1":
        return FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp2":
        return fully_shard(net, mesh=mesh)
    return parallelize_module(net, mesh, {name: ColwiseParallel(output_layouts=Replicate()) for name in "ab"})


# -- the undisturbed run ---------------------------------------------------------------------------------------------


def undisturbed(folder, steps, frozen):
    """Train on one process, and note what is held after each step: a file for each tensor, one for the objects."""
    program = Program("plain", frozen=frozen)
    tensors, objects = {}, []
    for _ in range(steps):
        program.step()
        captured = program.state.capture()
        for fqn, tensor in captured.tensors.items():
            if not fqn.startswith("model.base"):
                tensors.setdefault(fqn, []).append(tensor.shards[0].tensor.numpy().copy())
        objects.append({n: v.decode() for n, v in encoded(captured).items() if n not in NOT_COMPARED})
    tensors["model.base.weight"] = [program.model.base.weight.detach().numpy()]
    for fqn, values in tensors.items():
        np.save(Path(folder, f"{fqn}.npy"), np.stack(values))
    Path(folder, "objects.json").write_text(json.dumps(objects))


def wrong(program, folder, step):
    """What this rank holds that is not what the undisturbed run held after that step."""
    captured = program.state.capture()
    expected = json.loads(Path(folder, "objects.json").read_text())[step - 1]
    objects = {n: v.decode() for n, v in encoded(captured).items()}
    found = [name for name in expected if objects.get(name) != expected[name]]
    names = {path.stem for path in Path(folder).glob("*.npy")}
    found += captured.tensors.keys() - names
    found += [fqn for fqn in names - captured.tensors.keys() if _has_elements(captured, fqn)]
    for fqn in names & captured.tensors.keys():
        values = np.load(Path(folder, f"{fqn}.npy"), mmap_mode="r")
        whole = torch.from_numpy(np.array(values[min(step, len(values)) - 1]))
        found += [fqn for shard in captured.tensors[fqn].shards if not _is(shard, whole)]
    return found


def _has_elements(captured, fqn):
    """Whether this rank has any of what an optimizer's state is of: FSDP1 may have put all of it elsewhere."""
    of = captured.tensors.get(fqn.replace("optim.", "model.", 1).rpartition(".")[0])
    return fqn.startswith("model.") or (of is not None and any(shard.tensor.numel() for shard in of.shards))


def _is(shard, whole):
    if isinstance(shard.region, Run):
        there = whole.flatten()[shard.region.start : shard.region.stop]
    else:
        there = whole[tuple(slice(o, o + n) for o, n in zip(shard.region.offsets, shard.region.sizes, strict=True))]
    return shard.tensor.detach().numpy().tobytes() == there.contiguous().numpy().tobytes()


# -- a life ----------------------------------------------------------------------------------------------------------


def live(given, layout, saves):
    """Resume, check what was resumed, and train for so many saves.

    given: paths, and what the run is like, by name. plant(program), if there is one, is called after the resume and
    after each save: to see that what it does wrong is found.
    """
    os.environ["TMPDIR"] = given["temp"]
    warnings.simplefilter("ignore")
    program = Program(layout, frozen=given["frozen"])
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with Checkpointer(given["root"], keep=KEEP, timeout=TIMEOUT) as c:
        report = c.resume(program.state)
        plant = given.get("plant", lambda program: None)
        plant(program)
        said = {"layout": layout, "size": size, "resumed": report.step if report else 0, "problems": []}
        if report:
            said["problems"] = wrong(program, given["reference"], report.step)
            said["problems"] += _wrong_numbers(program, given, report.step, rank, size)
        if rank == 0:
            left = leftovers(History(LocalStore(given["root"])), alone=True)
            said["problems"] += [f"{one.key} was left behind" for one in left]
        path = Path(given["log"], f"{c._job.launch:04d}-{rank:02d}.jsonl")
        with path.open("a", buffering=1) as log:
            log.write(json.dumps(said) + "\n")
            writer = None
            for _ in range(saves):
                samples = program.step()
                step = program.progress.global_step
                numbers = _numbers(program)
                made = {"step": step, "samples": samples, "numbers": numbers, "at": time.time_ns()}
                log.write(json.dumps(made) + "\n")
                c.save(step, program.state)
                plant(program)
                writer = writer or next(iter(lives.writers([os.getpid()])), None)
                log.write(json.dumps({"staged": step, "trainer": held(os.getpid()), "writer": held(writer)}) + "\n")
    return True


def _numbers(program):
    """Of the random generators of this rank."""
    return zlib.crc32(encoded(program.state.capture())["rng"])


def _wrong_numbers(program, given, step, rank, size):
    """Whether the generators are not as this rank saved them, where there are as many ranks as then."""
    found = next(c for c in History(LocalStore(given["root"])).valid() if c.directory.step == step).manifest
    if found.world_size != size:
        return []
    path = Path(given["log"], f"{found.launch:04d}-{rank:02d}.jsonl")
    saved = [line["numbers"] for line in lines(path) if line.get("step") == step]
    return [] if saved[-1:] == [_numbers(program)] else ["rng"]


def lines(path):
    """What a log says; a line that a kill cut off is none."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def held(pid):
    """(KiB of memory, descriptors, threads) of a process; zeros where it is gone."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]), len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return 0, 0, 0
