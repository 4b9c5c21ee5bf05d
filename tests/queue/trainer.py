"""A small run as the queue starts it: `python -m tests.queue.trainer ROOT STEPS`. Writes down every step that it does.

A third argument has it crash at that step: once, or if it is negative each time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from distckpt import Checkpointer, Progress, TrainState
from distckpt.run.preemption import leave

EVERY = 5


def main(root: str, steps: int, crash_at: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 4)
    progress = Progress()
    state = TrainState(model=model, progress=progress, rng=True)  # an optimizer costs a second: it imports the compiler
    code = 0
    with Checkpointer(root, every=EVERY, preemption=True, timeout=20) as checkpointer:
        checkpointer.resume(state)
        while progress.global_step < steps and not code:
            loss = model(torch.randn(8, 4)).square().mean()
            (gradient,) = torch.autograd.grad(loss, [model.weight])
            model.weight.data -= 0.1 * gradient
            progress.advance(8)
            time.sleep(0.02)
            with Path(root, "done.txt").open("a", encoding="utf-8") as file:
                file.write(f"{progress.global_step} {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}\n")
            if progress.global_step == abs(crash_at) and (crash_at < 0 or not Path(root, "crashed").exists()):
                Path(root, "crashed").touch()
                raise RuntimeError("as it was told to")
            code = checkpointer.step(progress.global_step, state, {"loss": loss.item()}).exit_code
        if not code:
            checkpointer.save(steps, state, wait=True)
    leave(code)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
