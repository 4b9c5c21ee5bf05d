"""Every code block of docs/ runs, in order, as a reader would run them in a directory of their own.

Python blocks share their names, and begin with those of `_names`. Of a shell block each `distckpt` line runs in this
process, and torchrun for real. What stands for something of the reader's own (`train.py ...`) is `text`, and runs not;
what a console shows, and what is kept in TOML, must at least be understood.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

import distckpt
from distckpt import After, Checkpointer, ElasticSampler, Export, Keep, Progress, TrainState, TrialLoad, cli
from distckpt.queue.spec import load
from distckpt.signing import REQUIRE_SIGNATURE, SIGN_KEY
from tests.run.test_signing import key_pair

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
KNOWN = {"python", "bash", "console", "toml", "text"}


def blocks(page):
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_every_block_says_what_it_is_and_every_link_leads_somewhere():
    for page in DOCS:
        assert {kind for kind, _ in blocks(page)} <= KNOWN, page
        outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        if page.name not in {"format.md", "object-stores.md"}:  # those draw trees
            assert not re.findall(r"\n\n    \S.*", outside), f"{page}: an indented block would not be run"
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", outside):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page}: {target}"


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))


def _names():
    """What python blocks may take for given."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = TrainState(model=model, optimizer=optimizer)
    known = (Checkpointer, ElasticSampler, Export, After, Keep, Progress, TrainState, TrialLoad, torch)
    live = {"model": model, "optimizer": optimizer, "state": state, "state_dict": {"model": model.state_dict()}}
    return {k.__name__: k for k in known} | live | {"root": "runs/events"}


def _runs():
    """Runs that commands are shown on: runs/demo, runs/first, runs/other, each of two checkpoints; and a model."""
    for run in ("runs/demo", "runs/first", "runs/other"):
        names = _names()
        with Checkpointer(run, keep=Keep(last=3, best=("val_loss", "min", 1)), wait=True) as c:
            c.resume(names["state"])
            for step in (10, 20):
                c.save(step, names["state"], {"val_loss": 1 / step})
    Path("hub/model").mkdir(parents=True)
    save_file(_model().state_dict(), "hub/model/model.safetensors")
    Path("hub/model/config.json").write_text(json.dumps({"model_type": "bert", "torch_dtype": "float32"}))


def _command(line):
    """Run a line of a shell block."""
    words = shlex.split(line, comments=True)
    match words:
        case ["distckpt", *arguments]:
            assert cli.main(arguments) == 0, line
        case ["python", "-m", "distckpt.reshard", *arguments]:
            assert importlib.import_module("distckpt.reshard").main(arguments) == 0, line
        case ["torchrun", *arguments]:
            ran = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *arguments], capture_output=True, text=True, timeout=100
            )
            assert ran.returncode == 0, ran.stderr[-3000:]
        case ["export", setting]:
            name, _, value = os.path.expandvars(setting).partition("=")
            os.environ[name] = value
        case ["ssh-keygen", *_, "-f", name]:
            key_pair(Path.cwd(), name)
        case ["pip", "install", *_]:
            pass  # as `make venv` has
        case _:
            raise AssertionError(f"{line}: what is this to run?")


def _run(kind, text, names):
    if kind == "python" and (named := re.match(r"# (\w+\.py)\n", text)):
        Path(named[1]).write_text(text)
    elif kind == "python":
        exec(text, names)
    elif kind == "bash":
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                _command(line)
    elif kind == "console":
        for line in re.findall(r"^\$ distckpt (.*?)(?:\s{2,}#.*|\s+# .*)?$", text, re.MULTILINE):
            words = shlex.split(line)
            cli._parser(words[0]).parse_args(words)
    elif kind == "toml":
        Path("queue.toml").write_text(text)
        assert load("queue.toml").runs


def _lora():
    """A run that tunes hub/model with LoRA."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(_model(), LoraConfig(r=2, target_modules=["0", "2"]))
    with Checkpointer("runs/lora", wait=True) as c:
        c.save(1, TrainState(model=adapted))


def _foreign(names):
    """What other tools have saved: a DCP directory, and a file of torch.save."""
    saved = {"model": names["model"].state_dict(), "optim": names["optimizer"].state_dict()}
    dcp.save(saved, checkpoint_id="dcp-directory")
    torch.save({"model": saved["model"], "optimizer": saved["optim"]}, "saved.pt")
    names |= {"model_sd": saved["model"], "optim_sd": saved["optim"], "distckpt": distckpt}
    names["checkpointer"] = Checkpointer("dcp-directory")


def _stores(monkeypatch):
    """The bucket and the credentials that examples of object stores take for given."""
    from tests.store import servers

    found = servers.start("moto").bucket()
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    distckpt.save(f"{found.uri}/runs/first", _names()["state_dict"])
    return found.uri


def _deepspeed(folder, text):
    """The block with an engine, on a rank."""
    import deepspeed

    from tests import deepspeeds

    os.chdir(folder)
    deepspeeds.joined()
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    names = _names() | {"deepspeed": deepspeed, "config": config, "progress": Progress(), "scheduler": scheduler}
    exec(text, names | {"model": model, "optimizer": optimizer})


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in (SIGN_KEY, REQUIRE_SIGNATURE):  # so that they are as before when the page has set them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PWD", str(tmp_path))
    names = _names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if page.stem not in {"quick-start", "deepspeed"}:  # which begin afresh
            _runs()
        bucket = _stores(monkeypatch) if page.stem == "object-stores" else ""
        if page.stem == "exports":
            _lora()
        if page.stem == "foreign":
            _foreign(names)
        for kind, text in blocks(page):
            if page.stem == "deepspeed" and kind == "python":
                from tests import deepspeeds

                deepspeeds.run(2, _deepspeed, str(tmp_path), text)
                continue
            text = text.replace("/nvme", str(tmp_path / "nvme"))
            _run(kind, text.replace("s3://bucket", bucket) if bucket else text, names)
