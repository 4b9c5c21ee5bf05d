"""Async saves to a local directory: with an object store behind it, and alone."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

from benchmarks.peers import Distckpt, step_of
from benchmarks.peers_async import PATIENCE, AsyncDistckpt
from distckpt import Checkpointer, Keep, Local
from distckpt.errors import KeyMissing, StoreError
from distckpt.format.layout import COMMIT, StepDir
from distckpt.store.object import ObjectStore

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.object_server import Served

RATE = 50e6
"""Bytes a second that the server takes."""
_STAYS = Keep(last=2)


class Tiered(AsyncDistckpt):
    """This project, with a root that it replicates to by way of the proxy."""

    name = Distckpt.name
    served: ClassVar[Served]

    def start(self) -> None:
        self._state = self.tensors.state()
        self._far = ObjectStore(f"{self.served.uri}/{self.home.parent.name}", self.served.slow)
        self._loader = self._saver = self._checkpointer()
        self._saver.step(0, self._state)

    def _checkpointer(self) -> Checkpointer:
        return Checkpointer(self._far, local=Local(self.home, keep=_STAYS), keep=_STAYS)

    def behind(self, folder: Path) -> bool:
        """Whether the root lacks what was saved under this name."""
        try:
            ObjectStore(self._far.root, self.served.options).head(f"{StepDir(step_of(folder))}/{COMMIT}")
        except KeyMissing:
            return True
        return False

    def drain(self, folder: Path) -> None:
        """Wait until the root has it."""
        deadline = time.monotonic() + PATIENCE
        while self.world.rank == 0 and self.behind(folder):
            if time.monotonic() > deadline:
                raise StoreError(f"{folder.name} was not replicated within {PATIENCE:.0f} s")
            time.sleep(0.05)
        self.world.barrier()


class Alone(Tiered):
    """Likewise, without the root."""

    name = "local alone"

    def _checkpointer(self) -> Checkpointer:
        return Checkpointer(self.home, keep=_STAYS)

    def behind(self, folder: Path) -> bool:  # noqa: ARG002
        return True

    def drain(self, folder: Path) -> None:
        """There is nothing to wait for."""


TIERS = (Tiered, Alone)
