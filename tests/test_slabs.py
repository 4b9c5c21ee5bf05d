"""Slabs: used again, not before what is copied has arrived; a stream that does its work late stands in for a device."""

from __future__ import annotations

import contextlib
import mmap

import pytest
import torch

from distckpt.slabs import Slabs, copy

NOWHERE = torch.device("cuda", 0)


class Late:
    """A stream that does what it is asked only when somebody waits for it."""

    def __init__(self, device):
        self.device, self.after, self.asked, self.done = device, [], [], 0

    def wait_stream(self, other):
        self.after.append(other)

    def record_event(self):
        return Mark(self, len(self.asked))

    def synchronize(self):
        Mark(self, len(self.asked)).synchronize()


class Mark:
    def __init__(self, stream, upto):
        self.stream, self.upto = stream, upto

    def synchronize(self):
        while self.stream.done < self.upto:
            self.stream.asked[self.stream.done]()
            self.stream.done += 1


@pytest.fixture
def device(monkeypatch):
    """Streams that are late in the place of torch's. `current`: the one of the block, on which copies are asked."""
    entered = []

    @contextlib.contextmanager
    def on(thing):
        entered.append(thing)
        yield
        assert entered.pop() is thing

    training = Late(NOWHERE)
    monkeypatch.setattr(torch.cuda, "Stream", Late)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    return training, entered


def test_copies_come_after_what_was_asked_of_the_device(device):
    training, entered = device
    slabs = Slabs([NOWHERE, torch.device("cpu"), NOWHERE])
    with slabs.copying():
        assert not torch.is_grad_enabled()
        place, stream = entered
    assert place is NOWHERE
    assert stream.after == [training]


def test_a_slab_is_handed_out_again_only_once_what_is_copied_out_of_it_has_arrived(device):
    _, entered = device
    slab, target = torch.ones(4), torch.zeros(4)
    with Slabs([NOWHERE]) as slabs:
        with slabs.copying():
            entered[-1].asked.append(lambda: target.copy_(slab))
        slabs.give(slab)
        assert torch.equal(target, torch.zeros(4))
        slabs.take(4).fill_(2)
        assert torch.equal(target, torch.ones(4))


@pytest.mark.parametrize("fails", [False, True])
def test_all_has_arrived_when_the_block_ends_even_by_an_error(device, fails):
    _, entered = device
    target = torch.zeros(4)
    with contextlib.suppress(ZeroDivisionError), Slabs([NOWHERE]) as slabs, slabs.copying():
        entered[-1].asked.append(lambda: target.fill_(1))
        _ = 1 / (not fails)
    assert torch.equal(target, torch.ones(4))


def test_memory_is_page_aligned_and_used_again_where_it_is_large_enough():
    with Slabs([torch.device("cpu")]) as slabs:
        first = slabs.take(3 * mmap.PAGESIZE)
        assert first.data_ptr() % mmap.PAGESIZE == 0
        slabs.give(first)
        assert slabs.take(2 * mmap.PAGESIZE) is first
        slabs.give(first)
        assert len(slabs.take(4 * mmap.PAGESIZE)) == 4 * mmap.PAGESIZE


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 1000), (2, 3, 400)])
@pytest.mark.parametrize("way", ["as it is", "turned", "steps", "conj"])
def test_whatever_its_strides_a_tensor_is_copied(shape, way):
    source = torch.randn(shape, dtype=torch.complex64)
    if way == "turned":
        source = torch.randn(shape[::-1], dtype=torch.complex64).permute(tuple(range(len(shape)))[::-1])
    elif way == "steps" and shape:
        source = torch.randn((*shape, 3), dtype=torch.complex64)[..., 1]
    elif way == "conj":
        source = source.conj()
    target = torch.zeros(shape, dtype=torch.complex64)
    copy([target], [source])
    assert torch.equal(target, source)
