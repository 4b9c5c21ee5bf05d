"""Train the same GPT with DeepSpeed's ZeRO; its checkpoints and those of launch.train_fsdp are read by either.

    torchrun --standalone --nproc-per-node 4 -m launch.train_deepspeed --root runs/gpt --steps 500 --stage 2

The engine brings its optimizer, its schedule and its counters along; otherwise see launch/train_fsdp.py.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch.nn import functional

from distckpt import ElasticSampler, Progress, TrainState
from distckpt.run.preemption import leave
from launch.gpt import GPT, Shape
from launch.text import StdlibText
from launch.train_fsdp import arguments, build_optimizer, build_schedule, fit, seed_generators

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from torch import Tensor


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--stage", type=int, default=2, help="of ZeRO")
    parser.add_argument("--offload", action="store_true", help="optimizer and, at stage 3, parameters in host memory")
    return parser.parse_args(argv)


def build_engine(args: argparse.Namespace, shape: Shape) -> Any:
    """The engine; its global batch is accumulated of parts that divide a rank's share of it."""
    share = args.global_batch // dist.get_world_size()
    part = max(n for n in range(1, args.micro_batch + 1) if share % n == 0)
    torch.manual_seed(args.seed)  # the same on every rank
    model = GPT(shape)
    optimizer = build_optimizer(model, args.lr)
    host = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": args.stage}
    if args.offload:
        zero |= {"offload_optimizer": host} | ({"offload_param": host} if args.stage == 3 else {})
    config = {
        "train_micro_batch_size_per_gpu": part,
        "gradient_accumulation_steps": share // part,
        "gradient_clipping": 1.0,
        "steps_per_print": 1 << 62,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    schedule = build_schedule(optimizer, args.steps)
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def train_step(engine: Any, batch: Tensor) -> float:
    """One optimizer step on this rank's samples, int64[n, seq + 1]. Returns the mean loss of the global batch."""
    mean = torch.zeros((), dtype=torch.float64)
    for part in batch.split(engine.train_micro_batch_size_per_gpu()):
        loss = functional.cross_entropy(engine(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten())
        engine.backward(loss)
        engine.step()  # the optimizer's with the last part
        mean += loss.detach().cpu() * len(part) / len(batch)
    dist.all_reduce(mean)  # each rank holds the mean of as many samples
    return mean.item() / dist.get_world_size()


def train(args: argparse.Namespace) -> int:
    """Train from the newest checkpoint, or from the beginning, to the last step. Returns the exit code."""
    shape = Shape(layers=args.layers, width=args.width, seq=args.seq, dropout=args.dropout)
    text = StdlibText(args.text_bytes, args.seq)
    engine = build_engine(args, shape)
    seed_generators((args.seed << 16) + 1 + dist.get_rank())
    sampler = ElasticSampler(text, global_batch=args.global_batch, seed=args.seed)
    progress = Progress()
    config = {"shape": asdict(shape), "text": text.digest, "global_batch": args.global_batch, "steps": args.steps}
    state = TrainState(model=engine, sampler=sampler, progress=progress, config=config, rng=True)

    def step(batch: Tensor) -> tuple[float, float]:
        lr = float(engine.get_lr()[0])
        return train_step(engine, batch.to(engine.device)), lr

    return fit(args, text, sampler=sampler, progress=progress, state=state, step=step)


def main() -> None:
    """Train as one rank of a torchrun job."""
    args = parse()
    torch.set_num_threads(args.threads)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    try:
        code = train(args)
    finally:
        dist.destroy_process_group()
    leave(code)


if __name__ == "__main__":
    main()
