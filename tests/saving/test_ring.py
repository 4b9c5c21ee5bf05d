"""What is written from live tensors: byte for byte what an arena would hold, in little memory, one thing beside another."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distckpt.errors import StoreError
from distckpt.format.datafile import Chunk, build, pack
from distckpt.saving import ring
from distckpt.saving.arena import Arena
from distckpt.saving.part import PIECE, Summed
from distckpt.saving.ring import SLABS, content
from distckpt.saving.stage import stage
from distckpt.slabs import Slabs
from distckpt.store.base import FOR_GOOD
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore


def laid(chunks):
    """(image, chunks in file order) of tensors by name."""
    packed = pack(
        Chunk(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), bool(i % 2))
        for i, (name, t) in enumerate(chunks.items())
    )
    return build(packed, b'{"a": 1}'), [chunks[segment.name] for segment in packed.segments]


def staged(image, chunks):
    """The file, by way of a whole arena."""
    arena = Arena(image.table_start)
    stage(image, chunks, [True] * len(chunks), arena)
    return b"".join(map(bytes, Summed(memoryview(image.header), [arena.view[: image.table_start]])))


def odd(kind, *shape):
    values = torch.randn(shape)
    match kind:
        case "transposed":
            return values.t()
        case "steps":
            return values[:, ::2].to(torch.float64)
        case "conj":
            return torch.complex(values, values + 1).conj()
        case "negative":
            return torch.complex(values, values + 1).conj().imag
        case "float8":
            return values.to(torch.float8_e4m3fn).t()
        case "channels last":
            return torch.randn(4, 8, *shape).to(memory_format=torch.channels_last)
        case "plain":
            return values


KINDS = ["transposed", "steps", "conj", "negative", "float8", "channels last", "plain"]


def mixed():
    made = {f"{kind} {n}": odd(kind, n, n + 2) for kind in KINDS for n in (1, 37, 130)}
    return {**made, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 3), "long": torch.randn(300_001)}


@pytest.mark.parametrize("room", [0, 1 << 20, None])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_the_file_is_that_of_an_arena(tmp_path, kind, room):
    image, chunks = laid({**mixed(), "big": torch.randn(1500, 2100).t()})
    store = LocalStore(tmp_path) if kind == "local" else MemoryStore()
    with content(image, chunks, room) as data:
        store.write("file", data, size=image.size, stable=data.stable)
    found = bytearray(image.size)
    store.read("file", 0, [memoryview(found)])
    assert found == staged(image, chunks)


def test_wherever_slabs_begin_and_end_the_bytes_are_the_same(monkeypatch):
    image, chunks = laid(mixed())
    expected = staged(image, chunks)
    for size in (4096, 8192, 1 << 15, 1 << 19):
        monkeypatch.setattr(ring, "_slab_size", lambda room, size=size: size)
        with content(image, chunks) as data:
            assert b"".join(map(bytes, data)) == expected, size


def test_plain_memory_is_written_where_it_lies():
    image, chunks = laid({"a": torch.zeros(1 << 20), "b": torch.zeros(7)})
    with content(image, chunks) as data:
        assert data.stable == FOR_GOOD
        addresses = {torch.frombuffer(piece, dtype=torch.uint8).data_ptr() for piece in data if not piece.readonly}
    assert {chunk.data_ptr() for chunk in chunks} <= addresses


def test_of_a_mixed_state_what_is_plain_goes_through_no_slab(monkeypatch):
    image, chunks = laid({"plain": torch.randn(8 << 20), "strided": torch.randn(64, 64).t()})
    copied = []
    real = ring.copy
    monkeypatch.setattr(ring, "copy", lambda to, of: (copied.extend(t.nbytes for t in of), real(to, of)))
    with content(image, chunks) as data:
        assert b"".join(map(bytes, data)) == staged(image, chunks)
    assert sum(copied) <= 2 * PIECE + (64 * 64 * 4)


@pytest.mark.parametrize("room", [1 << 20, 20 << 20, 1 << 30, None])
def test_slabs_take_no_more_memory_than_allowed(monkeypatch, room):
    made = {}

    class Counted(Slabs):
        def take(self, nbytes):
            slab = super().take(nbytes)
            made[slab.data_ptr()] = len(slab)
            return slab

    monkeypatch.setattr(ring, "Slabs", Counted)
    image, chunks = laid({"w": torch.randn(4000, 2500).t()})
    with content(image, chunks, room) as data:
        MemoryStore().write("file", data, size=image.size, stable=data.stable)
    assert 1 < len(made) <= SLABS
    assert sum(made.values()) <= min(room or 1 << 60, SLABS * PIECE)


class Slow(MemoryStore):
    """Writes a piece after another, each in its own time, and notes when."""

    def __init__(self):
        super().__init__()
        self.spans = []

    def write(self, key, pieces, *, size, stable=0):
        def timed():
            for piece in pieces:
                started = time.monotonic()
                time.sleep(0.05)
                self.spans.append((started, time.monotonic()))
                yield piece

        super().write(key, timed(), size=size, stable=stable)


def test_the_next_slab_is_copied_while_one_is_written(monkeypatch):
    copies, threads = [], set()
    real = ring.copy

    def timed(to, of):
        copies.append(time.monotonic())
        threads.add(threading.current_thread().name.rsplit("_")[0])
        real(to, of)

    monkeypatch.setattr(ring, "copy", timed)
    image, chunks = laid({"w": torch.randn(2000, 2600).t()})
    store = Slow()
    with content(image, chunks) as data:
        store.write("file", data, size=image.size, stable=data.stable)
    assert len(copies) > 4
    assert threads == {"distckpt-copy"}
    early = [began < ended for began, (_, ended) in zip(copies[1:], store.spans, strict=False)]
    assert sum(early) > len(early) / 2, (
        "copied only once what is before it had been written"
    )  # a busy machine may be late


def test_a_store_that_fails_leaves_no_copy_running():
    image, chunks = laid({"w": torch.randn(2000, 2600).t()})

    def fail(pieces):
        next(iter(pieces))
        raise StoreError("full")

    with pytest.raises(StoreError, match="full"), content(image, chunks) as data:
        fail(data)
    assert not [t for t in threading.enumerate() if t.name.startswith("distckpt-copy")]
