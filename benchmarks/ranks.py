"""The ranks of a benchmark: processes that torchrun started, here or on many machines; a GPU each where there are some.

A benchmark that needs fewer of them (a reshard onto three of four) takes the first; the others wait.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from benchmarks.meter import descendants

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PATIENCE = timedelta(hours=1)
"""Longest wait of one rank for another."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run `python -m benchmarks ARGUMENTS` on so many ranks of this machine; returns the exit status."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.run([*torchrun, "-m", "benchmarks", *arguments], env=environment, check=False).returncode


def leave(status: int) -> NoReturn:
    """End this process and all that it started. Peers leave servers and pools behind that would hold up the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    for pid in descendants():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(status)


@dataclass(frozen=True, slots=True)
class World:
    """A joined process group: gloo, and NCCL besides where ranks have GPUs."""

    rank: int
    size: int
    device: torch.device
    local_size: int
    _group: Any

    @property
    def leads(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.rank % self.local_size == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found


class Ranks:
    """All ranks of a launch. `store`: where they meet."""

    def __init__(self, store: Any, rank: int, size: int, local_size: int | None = None) -> None:
        self.rank, self.size, self._local_size = rank, size, local_size or size
        self._store, self._worlds = store, 0

    @classmethod
    def of_launch(cls) -> Ranks:
        """Ranks that torchrun started."""
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        return cls(store, rank, size, int(os.environ["LOCAL_WORLD_SIZE"]))

    @contextmanager
    def world(self, size: int | None = None) -> Iterator[World | None]:
        """Join the first `size` ranks (all); None on the others, which then wait for those."""
        self._worlds += 1
        name, size = f"world-{self._worlds}", size or self.size
        if self.rank >= size:
            yield None
            self._store.wait([f"{name}/done"], PATIENCE)
            return
        device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            device, backend = torch.device("cuda", self.rank % self._local_size), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
        store = PrefixStore(name, self._store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=size, timeout=PATIENCE)
        try:
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            yield World(self.rank, size, device, self._local_size, group)
            dist.barrier(group=group)  # a rank that is gone must not be waited for by one that is not done
        finally:
            dist.destroy_process_group()
        self._store.set(f"{name}/done", "1")
