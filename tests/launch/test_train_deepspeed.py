"""launch.train_deepspeed: what it saved it goes on from, bit for bit; and launch.train_fsdp does, on other ranks."""

from __future__ import annotations

import json

from tests import deepspeeds, ranks

STEPS = 6
OPTIONS = ("--width=48", "--layers=1", "--seq=16", "--text-bytes=40000", "--global-batch=12", "--micro-batch=2")


def _train(program, root, losses, last, every):
    """Train to a step as if the job were stopped there; the schedule is that of all steps."""
    import importlib

    from distckpt import Checkpointer

    if program == "train_deepspeed":
        deepspeeds.joined()
    module = importlib.import_module(f"launch.{program}")
    args = module.parse([f"--root={root}", f"--losses={losses}", f"--steps={STEPS}", f"--every={every}", *OPTIONS])
    step = Checkpointer.step

    def stopping(self, number, *given):
        report = step(self, number, *given)
        if number == last:
            raise KeyboardInterrupt
        return report

    Checkpointer.step = stopping
    try:
        module.train(args)
    except KeyboardInterrupt:
        return


def _losses(path):
    return {row["step"]: row["loss"] for row in map(json.loads, path.read_text().splitlines())}


def test_it_saves_resumes_and_goes_on_and_fsdp_goes_on_from_it(tmp_path):
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))

    def train(program, root, losses, last, *, size=2, every=2):
        run = deepspeeds.run if program == "train_deepspeed" else ranks.run
        run(size, _train, program, str(root), str(losses), last, every)
        return _losses(losses)

    exact = train("train_deepspeed", whole, tmp_path / "whole.jsonl", None)
    assert set(exact) == set(range(1, STEPS + 1))
    train("train_deepspeed", stopped, tmp_path / "stopped.jsonl", 3)
    assert train("train_deepspeed", stopped, tmp_path / "stopped.jsonl", None) == exact

    train("train_deepspeed", other, tmp_path / "other.jsonl", 3)
    went_on = train("train_fsdp", other, tmp_path / "other.jsonl", None, size=3)
    assert set(went_on) == set(exact)
    assert all(abs(went_on[step] / exact[step] - 1) < 1e-4 for step in exact)
