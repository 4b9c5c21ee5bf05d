"""launch.train_lora, scenario A: killed and started again it trains what it would have trained; the base is kept once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distckpt import Checkpointer, TrainState
from distckpt.run.history import History
from distckpt.store.local import LocalStore
from launch.gpt import GPT, Shape

ROOT = Path(__file__).parent.parent.parent
STEPS = 12
SHAPE = {"layers": 1, "width": 48, "seq": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base") / "gpt"
    torch.manual_seed(7)
    with Checkpointer(root, wait=True) as c:
        c.save(5, TrainState(model=GPT(Shape(**SHAPE))))
    return root


def _command(base, root, losses, *more):
    options = {**SHAPE, "rank": 2, "base": base, "root": root, "losses": losses, "steps": STEPS, "text": __file__}
    said = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "launch.train_lora", *said, "--every", "2", "--validate-every", "2", *more]


def _start(command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def _losses(file):
    return {row["step"]: row["hex"] for row in map(json.loads, file.read_text().splitlines())}


def _ends(process):
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 0, said.decode()[-3000:]


@pytest.mark.full
def test_a_killed_run_goes_on_exactly_and_ends_with_merged_weights(base, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = _start(_command(base, killed, tmp_path / "killed.jsonl"))
    other = _start(_command(base, whole, tmp_path / "whole.jsonl", "--merge-every", "6"))
    deadline = time.monotonic() + 100
    while not (killed / "last.json").exists():
        assert first.poll() is None or time.monotonic() < deadline
        time.sleep(0.002)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _ends(other)
    _ends(_start(_command(base, killed, tmp_path / "killed.jsonl")))
    assert _losses(tmp_path / "killed.jsonl") == _losses(tmp_path / "whole.jsonl")
    assert len(_losses(tmp_path / "whole.jsonl")) == STEPS

    newest = next(History(LocalStore(whole)).valid()).manifest
    own, shared = newest.files[0], newest.files[1]
    assert own.size < shared.size
    assert json.loads((whole / "best.json").read_text())["step"] in {STEPS, STEPS - 2, STEPS - 4}

    while not (merged := [*whole.glob("merged-*.safetensors")]):
        assert time.monotonic() < deadline, (whole / "events.jsonl").read_text()[-2000:]
        time.sleep(0.1)
    plain = GPT(Shape(**SHAPE))
    weights = load_file(merged[0])
    plain.load_state_dict(weights, strict=False)
    assert {"blocks.0.qkv.weight", "blocks.0.up.weight", "embed.weight"} <= weights.keys()
    assert not [name for name in weights if "lora" in name or "base_layer" in name]
