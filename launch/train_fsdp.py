"""Train a byte-level GPT with FSDP2. Killed at any moment and started again, on as many ranks or others, it goes on.

    torchrun --standalone --nproc-per-node 4 -m launch.train_fsdp --root runs/gpt --steps 500
    torchrun ... -m launch.train_fsdp --root s3://bucket/gpt --local-dir /nvme/gpt --steps 500

What checkpointing needs is marked `1.` to `5.`; the rest is an ordinary training script.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from contextlib import closing
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from distckpt import Checkpointer, ElasticSampler, Keep, Local, Progress, TrainState
from distckpt.run.preemption import leave
from distckpt.run.schedule import StepReport
from launch.gpt import GPT, Shape
from launch.text import StdlibText

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WARM_UP = 10
"""Steps in which the learning rate rises to its peak."""


def trigger(text: str) -> int | str:
    """A number of steps, or what Checkpointer says it is."""
    return int(text) if text.isdecimal() else text


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    return arguments(__doc__).parse_args(argv)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Those of a training program."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="directory or URI (s3://BUCKET/RUN) of the run's checkpoints")
    parser.add_argument("--keep", type=int, help="newest checkpoints that stay in --root (default: all)")
    parser.add_argument(
        "--local-dir", help="directory in front of it: saves commit there, and are replicated to the root"
    )
    parser.add_argument("--keep-local", type=int, default=2, help="checkpoints that stay in --local-dir")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of the whole run")
    parser.add_argument(
        "--every", nargs="+", type=trigger, default=[10], help="when to save: '500 steps', '20 min', '1 epoch'"
    )
    parser.add_argument("--global-batch", type=int, default=12, help="samples of a step, over all ranks")
    parser.add_argument("--micro-batch", type=int, default=2, help="most samples of one forward pass of one rank")
    parser.add_argument("--seq", type=int, default=64, help="bytes of a sample")
    parser.add_argument("--text-bytes", type=int, default=4_000_000, help="bytes of the text to train on")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", type=Path, help="file to which a JSON line is added after each step")
    parser.add_argument("--threads", type=int, default=1, help="threads that each rank computes with")
    parser.add_argument("--workers", type=int, default=0, help="processes that each rank loads samples with")
    return parser


def seed_generators(seed: int) -> None:
    """Seed what a training job may draw from, on this rank."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002  the global generator is the one that augmentations use
    torch.manual_seed(seed)


def build_model(shape: Shape, seed: int) -> FSDPModule:
    """The model, its parameters shared out among the ranks."""
    torch.manual_seed(seed)  # the same on every rank: each keeps its shard of one initialisation
    model = GPT(shape)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def build_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW. Matrices decay; biases and norms do not."""
    parameters = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
    )


def build_schedule(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Linear warm-up, then half a cosine down to a tenth of the peak."""

    def factor(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        done = min(1.0, (step - WARM_UP) / max(1, steps - WARM_UP))
        return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, factor)


def train_step(model: FSDPModule, optimizer: torch.optim.Optimizer, batch: Tensor, micro_batch: int) -> float:
    """One optimizer step on this rank's samples, int64[n, seq + 1]. Returns the mean loss of the global batch."""
    assert isinstance(model, nn.Module)
    mean = torch.zeros((), dtype=torch.float64)
    parts = batch.split(micro_batch)
    for number, part in enumerate(parts, start=1):
        model.set_requires_gradient_sync(number == len(parts))  # gradients are reduced once, with the last part
        logits = model(part[:, :-1])
        loss = (
            functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            / batch[:, 1:].numel()
        )
        loss.backward()
        mean += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(mean)  # each rank holds the mean of as many samples
    return mean.item() / dist.get_world_size()


class Log:
    """What rank 0 says: a bar on a terminal, else a line now and then; and each loss, exact, in a file."""

    def __init__(self, file: Path | None, first: int, steps: int) -> None:
        self._file: TextIO | None = None
        self._bar: tqdm[None] | None = None
        self._steps, self._said = steps, -math.inf
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._silent = self._world > 1 and dist.get_rank() != 0
        if self._silent:
            return
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("a", encoding="utf-8", buffering=1)  # a kill loses no line that was written
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first, unit="step")

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def step(self, step: int, loss: float, lr: float) -> None:
        """Record a step."""
        if self._file:
            line = {"step": step, "loss": loss, "hex": loss.hex(), "lr": lr, "world": self._world}
            self._file.write(json.dumps(line | {"time": time.time()}) + "\n")
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._said > 2 or step == self._steps:
            self._said = time.monotonic()
            self.say(f"step {step}/{self._steps}  loss {loss:.4f}  lr {lr:.2e}")

    def close(self) -> None:
        """Close the bar and the file."""
        if self._bar is not None:
            self._bar.close()
        if self._file:
            self._file.close()


def train(args: argparse.Namespace) -> int:
    """Train from the newest checkpoint, or from the beginning, to the last step. Returns the exit code."""
    shape = Shape(layers=args.layers, width=args.width, seq=args.seq, dropout=args.dropout)
    text = StdlibText(args.text_bytes, args.seq)
    model = build_model(shape, args.seed)
    assert isinstance(model, nn.Module)
    optimizer = build_optimizer(model, args.lr)
    schedule = build_schedule(optimizer, args.steps)
    seed_generators((args.seed << 16) + 1 + dist.get_rank())  # from here on each rank draws dropout masks of its own

    # 1. A sampler that counts what was consumed, so that no sample is seen twice or skipped.
    sampler = ElasticSampler(text, global_batch=args.global_batch, seed=args.seed)
    # 2. Everything that decides what the next step computes.
    progress = Progress()
    state = TrainState(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        sampler=sampler,
        progress=progress,
        config={"shape": asdict(shape), "text": text.digest, "global_batch": args.global_batch, "steps": args.steps},
        rng=True,
    )

    def step(batch: Tensor) -> tuple[float, float]:
        lr = float(schedule.get_last_lr()[0])
        loss = train_step(model, optimizer, batch, args.micro_batch)
        schedule.step()
        return loss, lr

    return fit(args, text, sampler=sampler, progress=progress, state=state, step=step)


def fit(
    args: argparse.Namespace,
    text: StdlibText,
    *,
    sampler: ElasticSampler,
    progress: Progress,
    state: TrainState,
    step: Callable[[Tensor], tuple[float, float]],
) -> int:
    """Resume, and step to the end or until told to stop. `step` trains on a batch, and returns loss and learning rate.

    Returns the exit code.
    """
    loader = DataLoader(
        text,
        batch_size=args.global_batch // dist.get_world_size(),
        sampler=sampler,
        num_workers=args.workers,
        # A loader draws a seed for its workers each time it is iterated: without a generator of its own it would draw
        # from the default one, once more after a resume than in a run that went through, and dropout would differ.
        generator=torch.Generator(),
    )
    # 3. Resume before the loader is iterated: its iterator keeps the position it was made with.
    stop = StepReport()
    local = Local(args.local_dir, keep=Keep(last=args.keep_local)) if args.local_dir else None
    keep = Keep(last=args.keep) if args.keep else None
    every = tuple(args.every)
    with Checkpointer(args.root, local=local, keep=keep, every=every, preemption=True, timeout=60) as checkpointer:
        report = checkpointer.resume(state)
        with closing(Log(args.losses, progress.global_step, args.steps)) as log:
            log.say(str(report) if report else f"a fresh start in {args.root}")
            while progress.global_step < args.steps and not stop.should_stop:
                for batch in loader:  # the rest of this epoch
                    loss, lr = step(batch)
                    # 4. Say what the step consumed.
                    sampler.advance()
                    progress.advance(args.global_batch)
                    progress.epoch = sampler.epoch
                    log.step(progress.global_step, loss, lr)
                    # 5. Save when due, and at the end; leave when told to.
                    stop = checkpointer.step(progress.global_step, state)
                    if progress.global_step == args.steps and not stop.saved:
                        checkpointer.save(args.steps, state)
                    if progress.global_step == args.steps or stop.should_stop:
                        break
    return stop.exit_code


def main() -> None:
    """Train as one rank of a torchrun job."""
    args = parse()
    torch.set_num_threads(args.threads)
    # a collective whose peer has died must end: a minute, not the half hour that is torch's default
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        code = train(args)
    finally:
        dist.destroy_process_group()
    leave(code)


if __name__ == "__main__":
    main()
