"""A small sharded state without torch.distributed, and ranks as threads to hold it."""

from __future__ import annotations

import threading

import torch

from distckpt.comm_threads import ThreadComm
from distckpt.errors import Mismatch
from distckpt.format.partition import Grid, Split
from distckpt.state import Everywhere, GlobalTensor, Layout, RankObject, Shard, State


class Sharded:
    """`model.rows` cut by rows over the ranks, `model.same` held by all; one object of all ranks and one of each.

    Every value follows from `value`, so a mix of two saves shows.
    """

    SHAPES = {"model.rows": (37, 11), "optim.rows.exp_avg": (37, 11), "model.same": (5, 3)}

    def __init__(self, rank, world_size, value=0):
        self.rank, self.unusable = rank, None
        self._grid = Grid(self.SHAPES["model.rows"], ((Split(world_size, 1),), ()), 0)
        self.regions = list(self._grid.of_file(rank))
        self.set(value)

    def set(self, value):
        self.value, self.mine = value, [self.rank, value]
        self.tensors = {}
        for fqn, shape in self.SHAPES.items():
            whole = self.expected(fqn, shape, value)
            self.tensors[fqn] = [whole] if fqn == "model.same" else [self._cut(whole, r) for r in self.regions]

    @staticmethod
    def expected(fqn, shape, value):
        generator = torch.Generator().manual_seed(1000 * value + len(fqn))
        return torch.randn(shape, generator=generator)

    @staticmethod
    def _cut(whole, region):
        (row, _), (rows, _) = region.offsets, region.sizes
        return whole[row : row + rows].clone()

    def is_at(self, value):
        """Whether everything here is, to the bit, what a rank at `value` holds."""
        return self.mine == [self.rank, value] and self.shares(value)

    def shares(self, value):
        """Whether all but what is this rank's own is that of `value`."""
        there = object.__new__(type(self))
        there.rank, there.regions = self.rank, self.regions
        there.set(value)
        return self.value == value and all(
            torch.equal(a, b) for fqn in self.SHAPES for a, b in zip(self.tensors[fqn], there.tensors[fqn], strict=True)
        )

    def _tensors(self):
        found = {}
        for fqn, shape in self.SHAPES.items():
            if fqn == "model.same":
                whole = self.tensors[fqn][0]
                found[fqn] = GlobalTensor(shape, "float32", Everywhere(), (Shard(_whole(shape), whole),))
                continue
            shards = tuple(Shard(r, t) for r, t in zip(self.regions, self.tensors[fqn], strict=True))
            found[fqn] = GlobalTensor(shape, "float32", Layout(self._grid), shards)
        return found

    def capture(self):
        return State(self._tensors(), objects={"trainer_state": self.value, "mine": RankObject(self.mine, "first")})

    def targets(self, saved):
        if not isinstance(saved.objects.get("trainer_state"), int):
            raise Mismatch("trainer_state: missing")
        return State(self._tensors(), objects={"trainer_state": True, "mine": True})

    def restore(self, saved):
        self.value, self.mine = saved.objects["trainer_state"], saved.objects["mine"]
        return []


def _whole(shape):
    from distckpt.format.box import Box

    return Box.whole(shape)


def on_threads(size, fn, *, timeout=20.0, patience=None):
    """fn(comm) on `size` ranks as threads: each one's result, or the exception it raised, by rank.

    timeout: of their waits for each other; patience: seconds after which a rank hangs.
    """
    results = [None] * size

    def work(comm):
        try:
            results[comm.rank] = fn(comm)
        except Exception as e:
            results[comm.rank] = e

    threads = [threading.Thread(target=work, args=(c,), daemon=True) for c in ThreadComm.group(size, timeout)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience or 4 * timeout)
        assert not thread.is_alive(), "a rank hangs"
    return results
