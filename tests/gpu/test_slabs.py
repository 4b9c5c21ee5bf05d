"""To a device and from it by way of pinned slabs, beside what the device is doing. Skipped where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.saving import ring
from distckpt.saving.part import PIECE
from distckpt.saving.ring import SLABS
from distckpt.slabs import Slabs
from tests import ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

A_WHILE = 200_000_000
"""Cycles: about a tenth of a second, in which a copy that did not wait would be long done."""


def odd():
    """What a device must rearrange or only copies in parts: several slabs of it, and small ones."""
    wide = torch.randn(3000, 2500, device="cuda")
    return {
        "plain": torch.randn(5 << 20, device="cuda"),
        "turned": wide.t(),
        "steps": wide[:, ::2],
        "conj": torch.complex(wide[:500], wide[500:1000]).conj(),
        "half": wide.to(torch.bfloat16),
        "low": wide.to(torch.float8_e4m3fn).t(),
        "scalar": torch.tensor(3.0, device="cuda"),
        "host": torch.randn(300, 200).t(),
        **{f"small {i}": torch.full((7,), float(i), device="cuda") for i in range(300)},
    }


def as_saved(tensor):
    return tensor.cpu().resolve_conj().contiguous().view(-1).view(torch.uint8)


class Buffers(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.names = list(values)
        for i, value in enumerate(values.values()):
            self.register_buffer(f"b{i}", value)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("arena_bytes", [0, 4 << 20])
def test_what_is_on_a_device_is_saved_through_slabs_bit_for_bit(tmp_path, monkeypatch, arena_bytes, wait):
    pinned = {}

    class Seen(Slabs):
        def take(self, nbytes):
            slab = super().take(nbytes)
            pinned[slab.data_ptr()] = (len(slab), slab.is_pinned())
            return slab

    monkeypatch.setattr(ring, "Slabs", Seen)
    values = odd()
    with Checkpointer(tmp_path, arena_bytes=arena_bytes, wait=wait) as c:
        c.save(1, TrainState(model=Buffers(values), rng=False))
    assert 1 < len(pinned) <= SLABS
    assert all(is_pinned for _, is_pinned in pinned.values())
    assert sum(n for n, _ in pinned.values()) <= max(arena_bytes, SLABS * (64 << 10)) <= SLABS * PIECE
    for where in ("cpu", "cuda"):
        found = Buffers({n: torch.zeros_like(v, device=where) for n, v in values.items()})
        with Checkpointer(tmp_path) as c:
            c.load(TrainState(model=found, rng=False))
        for name, value, loaded in zip(values, values.values(), found.buffers(), strict=True):
            assert torch.equal(as_saved(loaded), as_saved(value)), (where, name)


def test_a_save_has_what_was_asked_of_the_device_before_it_and_nothing_after(tmp_path):
    stream = torch.cuda.Stream()
    model = Buffers({"w": torch.zeros(12 << 20, device="cuda")})
    stream.wait_stream(torch.cuda.current_stream())
    with Checkpointer(tmp_path, wait=True) as c, torch.cuda.stream(stream):
        torch.cuda._sleep(A_WHILE)
        model.b0.fill_(1)
        c.save(1, TrainState(model=model, rng=False))
        model.b0.fill_(2)
        found = Buffers({"w": torch.zeros(12 << 20)})
        c.load(TrainState(model=found, rng=False))
    assert torch.all(found.b0 == 1)


def test_a_load_comes_after_what_was_asked_of_the_device_and_is_seen_by_every_stream(tmp_path):
    saved = torch.randn(24 << 20, device="cuda")  # 96 MiB: more than the windows in flight
    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    target = Buffers({"w": torch.zeros(24 << 20, device="cuda")})
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=Buffers({"w": saved}), rng=False))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(A_WHILE)
            target.b0.fill_(-1)
            c.load(TrainState(model=target, rng=False))
            here = torch.equal(target.b0, saved)
        with torch.cuda.stream(other):
            there = torch.equal(target.b0, saved)
    assert here
    assert there
    assert torch.equal(target.b0, saved)


def test_strided_and_cast_targets_are_filled_from_slabs_that_are_used_again(tmp_path):
    saved = Buffers({str(i): torch.randn(3000, 1500, device="cuda") for i in range(8)})
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=saved, rng=False))
        makes = [
            lambda: torch.zeros(1500, 3000, device="cuda").t(),
            lambda: torch.zeros(3000, 1500, device="cuda", dtype=torch.float64),
            lambda: torch.zeros(3000, 3000, device="cuda")[:, ::2],
            lambda: torch.zeros(3000, 1500, device="cuda"),
        ]
        target = Buffers({str(i): makes[i % 4]() for i in range(8)})
        c.load(TrainState(model=target, rng=False))
    for p, q in zip(saved.buffers(), target.buffers(), strict=True):
        assert torch.equal(p.to(q.dtype), q)


def test_no_slab_is_used_again_while_a_busy_device_still_copies_out_of_it():
    targets = [torch.zeros(1 << 20, device="cuda", dtype=torch.uint8) for _ in range(16)]
    with Slabs([torch.device("cuda", torch.cuda.current_device())]) as slabs:
        for number, target in enumerate(targets):
            slab = slabs.take(1 << 20)[: 1 << 20].fill_(number)
            with slabs.copying():
                torch.cuda._sleep(A_WHILE // 10)
                target.copy_(slab, non_blocking=True)
            slabs.give(slab)
    assert [int(t.unique()) for t in targets] == [*range(16)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_threads_that_copy_make_no_context_on_another_device():
    script = """
import threading, torch
from distckpt.slabs import Slabs
torch.cuda.set_device(1)
target = torch.zeros(1 << 20, device="cuda:1")
with Slabs([target.device]) as slabs:
    def work():
        slab = slabs.take(4 << 20)
        with slabs.copying():
            target.copy_(slab[: 4 << 20].view(torch.float32), non_blocking=True)
        slabs.give(slab)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
assert not torch._C._cuda_hasPrimaryContext(0)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def _save(root):
    with Checkpointer(root, timeout=60) as c:
        c.save(1, TrainState(model=Buffers(_whole()), rng=False), wait=True)


def _whole():
    return {str(i): torch.arange(n, dtype=torch.float32) + i for i, n in enumerate((3 << 20, 1 << 20, 77, 2 << 20))}


def _load_shared(root):
    """(bytes read, whether all is right), with each block read by one rank and sent to the other."""
    from distckpt.loading import deal

    deal.REPLICAS = 2
    target = Buffers({n: torch.full_like(t, -1, device="cuda") for n, t in _whole().items()})
    with Checkpointer(root, timeout=60) as c:
        report = c.load(TrainState(model=target, rng=False), step=1)
    right = all(torch.equal(a.cpu(), b) for a, b in zip(target.buffers(), _whole().values(), strict=True))
    return report.bytes_read, right


def test_what_another_rank_has_read_arrives_on_the_device_too(tmp_path):
    ranks.run(2, _save, str(tmp_path))
    found = ranks.run(2, _load_shared, str(tmp_path))
    assert [right for _, right in found] == [True, True]
    size = sum(f.stat().st_size for f in tmp_path.glob("step-*/*.safetensors"))
    assert sum(read for read, _ in found) < 1.2 * size
