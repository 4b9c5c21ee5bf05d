"""DeepSpeed's own save of an engine (ZeRO-2) whose checkpoint has as many bytes as the tensors that the others save."""

from __future__ import annotations

import collections
import logging
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.peers import Peer, sync_shares
from benchmarks.workload import Wrong

if TYPE_CHECKING:
    from pathlib import Path

_COPIES = 4  # of each parameter: model, master, two moments


class Engine:
    """An engine after one step, and what it must hold after a load."""

    def __init__(self, peer: Peer) -> None:
        deepspeed = _imported(peer)
        torch.manual_seed(0)
        numel = peer.tensors.nbytes // (4 * _COPIES)
        width = 1024 if numel >= 8 << 20 else 128
        layers = (nn.Linear(width, width, bias=False) for _ in range(max(1, round(numel / width**2))))
        model = nn.Sequential(*layers).to(peer.world.device)
        config = {
            "train_batch_size": peer.world.size,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.engine.backward(self.engine(torch.ones(1, width, device=peer.world.device)).square().mean())
        self.engine.step()
        self._truth = [t.clone() for t in self._held()]

    def _held(self) -> list[torch.Tensor]:
        """Parameters, this rank's masters and moments."""
        zero = self.engine.optimizer
        moments = [t for state in zero.optimizer.state.values() for t in state.values() if t.numel() > 1]
        return [p.data for p in self.engine.module.parameters()] + [*zero.single_partition_of_fp32_groups, *moments]

    def scrub(self) -> None:
        """Overwrite everything."""
        with torch.no_grad():
            for t in self._held():
                t.fill_(-1)

    def verify(self) -> None:
        """Wrong unless everything is as it was saved."""
        wrong = sum(not torch.equal(a, b) for a, b in zip(self._held(), self._truth, strict=True))
        if wrong:
            raise Wrong(f"{wrong} of {len(self._truth)} tensors of the engine are not as they were saved")


class DeepSpeed(Peer):
    """engine.save_checkpoint. It calls no fsync."""

    name = "DeepSpeed"

    def start(self) -> None:
        made = Engine(self)
        self._engine, self.tensors = made.engine, made  # type: ignore[assignment]

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag="tag")
        sync_shares(folder, self.world)

    def load(self, folder: Path) -> None:
        self._engine.load_checkpoint(str(folder), tag="tag")


def _imported(peer: Peer) -> Any:
    """DeepSpeed, joined to the ranks. No op of it is said to be there: joining would compile one."""
    on_gpu = peer.world.device.type == "cuda"
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rank, size = str(peer.world.rank), str(peer.world.size)
    local = str(peer.world.rank % peer.world.local_size)
    os.environ.update(RANK=rank, LOCAL_RANK=local, WORLD_SIZE=size, LOCAL_WORLD_SIZE=str(peer.world.local_size))
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not on_gpu:
        deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    deepspeed.comm.comm.cdb = None  # it would keep to the ranks of an earlier benchmark
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    return deepspeed
