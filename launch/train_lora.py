"""Tune a byte-level GPT with LoRA, in one process. Killed at any moment and started again, it goes on.

    python -m launch.train_lora --base runs/gpt --root runs/lora --text my.txt --every "15 min" --merge-every "2 h"

base: a run of launch.train_fsdp. The first checkpoint has its weights, which are frozen; later ones name its files, and
cost what is trained. Kept are the last two and the best; merged weights, for inference, are made off the training path.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, random_split

from distckpt import After, Checkpointer, ElasticSampler, Keep, Progress, TrainState
from distckpt.run.preemption import leave
from distckpt.run.schedule import StepReport
from launch.gpt import GPT, Shape
from launch.text import Windows
from launch.train_fsdp import Log, build_schedule, seed_generators, trigger

if TYPE_CHECKING:
    from collections.abc import Sequence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="run whose newest weights are tuned; read at a fresh start alone")
    parser.add_argument("--root", required=True, help="directory of this run's checkpoints")
    parser.add_argument("--text", required=True, type=Path, help="file to tune on")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of the whole run")
    parser.add_argument("--every", nargs="+", type=trigger, default=["15 min"], help="when to save")
    parser.add_argument("--validate-every", type=int, default=10, help="steps between validations")
    parser.add_argument("--merge-every", type=trigger, help="how often to write merged weights: '2 h', or steps")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter's matrices")
    parser.add_argument("--layers", type=int, default=2, help="layers of the base")
    parser.add_argument("--width", type=int, default=288, help="width of the base")
    parser.add_argument("--seq", type=int, default=64, help="bytes of a sample, as of the base")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak of the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--losses", type=Path, help="file to which a JSON line is added after each step")
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace, *, fresh: bool) -> PeftModel:
    """The base, frozen, with an adapter that does nothing yet. Its weights are loaded if the run is a fresh one."""
    torch.manual_seed(args.seed)
    base = GPT(Shape(layers=args.layers, width=args.width, seq=args.seq))
    if fresh:
        with Checkpointer(args.base) as checkpointer:
            checkpointer.load(TrainState(model=base), only=("model",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like a config of transformers
        adapted = get_peft_model(base, LoraConfig(r=args.rank, target_modules=["qkv", "up", "down"]))
    assert isinstance(adapted, PeftModel)
    return adapted.to(DEVICE)


def loss_of(model: torch.nn.Module, batch: Tensor) -> Tensor:
    """Mean loss of a batch, int64[n, seq + 1]."""
    batch = batch.to(DEVICE)
    return functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: torch.nn.Module, held_out: Dataset[Tensor]) -> float:
    """Mean loss of what is not trained on."""
    model.eval()
    losses = [loss_of(model, batch) for batch in DataLoader(held_out, batch_size=32, generator=torch.Generator())]
    model.train()
    return torch.stack(losses).mean().item()


def merges(args: argparse.Namespace) -> list[After]:
    """What writes merged weights now and then, by a process of its own."""
    if args.merge_every is None:
        return []
    to = str(Path(args.root).absolute() / "merged-{step}.safetensors")
    words = (sys.executable, "-m", "distckpt", "export", "{checkpoint}", "-o", to, "--merge")
    return [After(words, every=args.merge_every, name="merged weights")]


def train(args: argparse.Namespace) -> int:
    """Tune from the newest checkpoint, or from the base, to the last step. Returns the exit code."""
    samples = Windows(bytearray(args.text.read_bytes()), args.seq)
    trained, held_out = random_split(samples, [0.9, 0.1], torch.Generator().manual_seed(args.seed))
    sampler = ElasticSampler(trained, global_batch=args.batch, seed=args.seed)
    progress, stop, metrics = Progress(), StepReport(), dict[str, float]()
    keep = Keep(last=2, best=("val_loss", "min", 1))
    with Checkpointer(
        args.root, every=tuple(args.every), keep=keep, preemption=True, after_commit=merges(args)
    ) as checkpointer:
        model = build_model(args, fresh=not checkpointer.steps())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
        schedule = build_schedule(optimizer, args.steps)
        seed_generators(args.seed + 1)
        state = TrainState(
            model=model, optimizer=optimizer, lr_scheduler=schedule, sampler=sampler, progress=progress, rng=True
        )
        report = checkpointer.resume(state)
        loader = DataLoader(trained, batch_size=args.batch, sampler=sampler, generator=torch.Generator())
        with closing(Log(args.losses, progress.global_step, args.steps)) as log:
            log.say(str(report) if report else f"a fresh start from {args.base}")
            while progress.global_step < args.steps and not stop.should_stop:
                for batch in loader:
                    lr = float(schedule.get_last_lr()[0])
                    loss = loss_of(model, batch)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    sampler.advance()
                    progress.advance(args.batch)
                    progress.epoch = sampler.epoch
                    log.step(progress.global_step, loss.item(), lr)
                    if progress.global_step % args.validate_every == 0:
                        metrics["val_loss"] = validation_loss(model, held_out)
                    stop = checkpointer.step(progress.global_step, state, metrics)
                    if progress.global_step == args.steps and not stop.saved:
                        checkpointer.save(args.steps, state, metrics)
                    if progress.global_step == args.steps or stop.should_stop:
                        break
    return stop.exit_code


def main() -> None:
    """Tune, as a program."""
    leave(train(parse()))


if __name__ == "__main__":
    main()
