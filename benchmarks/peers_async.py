"""Asynchronous saves: what blocks the trainer (`stall`), and what goes on beside it until `finish` returns.

`save` is both, so that what was saved can be loaded and compared as any other.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from benchmarks.peers import Dcp, Distckpt, RawDirect, TorchCheckpointing, step_of

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 600.0


class AsyncDistckpt(Distckpt):
    """This project, wait=False."""

    def start(self) -> None:
        super().start()
        self._saver.step(0, self._state)  # as every job calls it: memory for the first save is made ready beside
        self._pending: Any = None

    def stall(self, folder: Path) -> None:
        self._pending = self._saver.save(step_of(folder), self._state, wait=False)

    def busy(self) -> bool:
        return not self._pending.committed

    def finish(self, folder: Path) -> None:  # noqa: ARG002
        self._pending.wait(PATIENCE)
        self._pending.result()

    def save(self, folder: Path) -> None:
        self.stall(folder)
        self.finish(folder)


class AsyncDcp(Dcp):
    """dcp.async_save with its thread."""

    name = "DCP async"
    kind = AsyncCheckpointerType.THREAD

    def stall(self, folder: Path) -> None:
        state = dict(self.tensors.whole)
        self._pending: Any = async_save(state, checkpoint_id=folder, async_checkpointer_type=self.kind)

    def busy(self) -> bool:
        return not self._pending.done()

    def finish(self, folder: Path) -> None:  # noqa: ARG002
        self._pending.result(PATIENCE)

    def save(self, folder: Path) -> None:
        self.stall(folder)
        self.finish(folder)


class AsyncDcpProcess(AsyncDcp):
    """dcp.async_save with its process."""

    name = "DCP async, process"
    kind = AsyncCheckpointerType.PROCESS


class AsyncTorchCheckpointing(TorchCheckpointing):
    """torch_checkpointing with its process. Without a GPU: without pinned memory, which it takes for granted."""

    name = "torch_checkpointing async"

    def how(self) -> Any:
        from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointStagerConfig

        if self.world.device.type == "cuda":
            return AsyncCheckpointSaverConfig()
        staging = CheckpointStagerConfig(use_pinned_memory=False, use_non_blocking_copy=False)
        return AsyncCheckpointSaverConfig(staging_config=staging)

    def stall(self, folder: Path) -> None:
        self._pending: Any = self._manager.save(str(folder), self._state)
        with self._manager.lock():  # what the optimizer's next step waits for: until then the state must not change
            pass

    def busy(self) -> bool:
        return not self._pending.done()

    def finish(self, folder: Path) -> None:  # noqa: ARG002
        self._pending.result(PATIENCE)

    def save(self, folder: Path) -> None:
        self.stall(folder)
        self.finish(folder)


class Memcpy(RawDirect):
    """The limit of a stall: one copy of the rank's bytes into memory that has been touched. It saves nothing itself."""

    name = "memcpy"

    def start(self) -> None:
        super().start()
        self._own = list(self.tensors.local.values())
        pairs = zip(self._memory, self._own, strict=True)
        self._into = [torch.frombuffer(memory, dtype=t.dtype).view(t.shape) for memory, t in pairs]

    def stall(self, folder: Path) -> None:  # noqa: ARG002
        for into, t in zip(self._into, self._own, strict=True):
            into.copy_(t)

    def busy(self) -> bool:
        return False

    def finish(self, folder: Path) -> None:
        super().save(folder)

    def save(self, folder: Path) -> None:
        self.stall(folder)
        self.finish(folder)


class Dd(RawDirect):
    """`dd` writing as many zeros, durably: what any writer of so many bytes does to a loop beside it."""

    name = "dd"

    def stall(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        count = max(1, self._size >> 20)
        command = ["dd", "if=/dev/zero", f"of={folder / 'zeros'}", "bs=1M", f"count={count}", "conv=fsync"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    def busy(self) -> bool:
        return self._process.poll() is None

    def finish(self, folder: Path) -> None:  # noqa: ARG002
        if self._process.wait(PATIENCE):
            raise RuntimeError("dd failed")
