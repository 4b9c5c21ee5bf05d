"""launch/train_fsdp.py for ckpt-chaos, which kills at file calls of trainers, and knows a checkpoint by its files' names.

So saves are waited for, made by the trainer, and the random part of names is the same in each run.
"""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

from distckpt import Checkpointer
from distckpt.saving import agree
from distckpt.store import local
from launch import train_fsdp


class Watched(Checkpointer):
    """Attempts are called by their step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | {"wait": True})

    def save(self, step, *args, **options):
        agree.secrets = SimpleNamespace(token_bytes=lambda n: step.to_bytes(n, "big"))
        return super().save(step, *args, **options)


if __name__ == "__main__":
    train_fsdp.Checkpointer = Watched
    if "CKPT_CHAOS_WATCH" in os.environ:  # a life that is to be killed; the next one must find other temp files
        numbers = itertools.count()
        local.secrets = SimpleNamespace(token_hex=lambda n: f"{next(numbers):0{2 * n}x}")
    train_fsdp.main()
