"""State on a CUDA device: staged through the host, loaded back in place. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make(seed, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(512, 1024), nn.Dropout(0.5), nn.Linear(1024, 8)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, **options)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 512, device="cuda")).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_training_on_a_device_goes_on_bit_for_bit(tmp_path, options):
    model, optimizer = make(0, **options)
    train(model, optimizer, 3)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(3, TrainState(model=model, optimizer=optimizer))
        expected = train(model, optimizer, 3)
        fresh_model, fresh = make(1, **options)
        c.load(TrainState(model=fresh_model, optimizer=fresh))
    assert train(fresh_model, fresh, 3) == expected
    assert all(p.is_cuda for p in fresh_model.parameters())


def test_a_checkpoint_moves_between_device_and_host(tmp_path):
    model, _ = make(0)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model))
        on_host = make(1)[0].cpu()
        c.load(TrainState(model=on_host, rng=False))
        for p, q in zip(model.parameters(), on_host.parameters(), strict=True):
            assert torch.equal(p.cpu(), q)


def test_strided_and_cast_targets_on_a_device_are_filled(tmp_path):
    saved = nn.Linear(300, 700).cuda()
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=saved))
        target = nn.Linear(300, 700, device="cuda", dtype=torch.float64)
        target.weight = nn.Parameter(torch.zeros(300, 700, device="cuda", dtype=torch.float64).t())
        c.load(TrainState(model=target, rng=False))
    assert torch.equal(target.weight.float(), saved.weight)


def test_a_save_in_the_background_has_the_state_of_its_step_while_training_goes_on(tmp_path):
    model, optimizer = make(0)
    model.append(nn.BatchNorm1d(8).cuda())
    model.big = nn.Parameter(torch.zeros(64 << 20, device="cuda"))  # takes the device a while to copy
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    train(model, optimizer, 1)
    with Checkpointer(tmp_path) as c:
        found = []
        for step in range(1, 5):
            with torch.no_grad():
                model.big.fill_(step)
            expected = {n: t.detach().clone() for n, t in model.state_dict().items()}
            found.append((c.save(step, state), expected))
            train(model, optimizer, 2)
            with torch.no_grad():
                model.big.fill_(-1)
        found[-1][0].wait()
        for pending, expected in found:
            c.load(state, step=pending.step)
            assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_an_optimizer_step_right_after_a_background_save_does_not_change_what_is_saved(tmp_path):
    model = nn.Linear(1, 1, bias=False)
    model.weight = nn.Parameter(torch.ones(256 << 20, device="cuda"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.ones_like(model.weight)
    with Checkpointer(tmp_path) as c:
        for step in (1, 2, 3):
            pending = c.save(step, TrainState(model=model, rng=False))
            optimizer.step()
            pending.wait()
        c.load(TrainState(model=model, rng=False), step=2)
    assert torch.all(model.weight == 0)
