"""The README's own code blocks run, in order, as a newcomer would run them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent


def test_the_code_blocks_of_the_readme_save_and_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)

    def train_step(batch):
        optimizer.zero_grad()
        model(batch[0]).square().mean().backward()
        optimizer.step()
        scheduler.step()

    names = {
        "dataset": TensorDataset(torch.randn(24 * 101, 4)),
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "train_step": train_step,
        "DataLoader": DataLoader,
        "world_size": 1,
    }
    exec(blocks[0], names)
    assert names["progress"].global_step == 101
    assert names["sampler"].epoch == 1
    trained = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    exec(blocks[1], names)
    assert "[50, 100]" in capsys.readouterr().out
    assert model.weight.abs().sum() > 0
    assert not torch.equal(model.weight, trained)  # step 100 of 101


def test_every_file_that_the_readme_links_to_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
