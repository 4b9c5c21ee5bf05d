"""What a benchmark is told, and the places that it measures."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.ranks import World

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How large and how long. folder: where the disk that is measured is mounted; nbytes: of all ranks together.

    server: the object store to measure on; None: the fastest that is here, and those that a peer needs.
    """

    folder: Path
    nbytes: int
    rounds: int
    quick: bool = False
    server: str | None = None

    @contextmanager
    def media(self, world: World) -> Iterator[dict[str, Path]]:
        """A scratch folder on each medium, gone afterwards. tmpfs only where all ranks share a machine."""
        roots = {"disk": self.folder}
        if SHARED_MEMORY.is_dir() and world.size <= world.local_size:
            roots["tmpfs"] = SHARED_MEMORY
        made = {}
        if world.rank == 0:
            made = {
                medium: Path(tempfile.mkdtemp(prefix="distckpt-bench-", dir=root.absolute()))
                for medium, root in roots.items()
            }
        made = world.gather(made)[0]
        try:
            yield made
        finally:
            if world.rank == 0:
                for path in made.values():
                    shutil.rmtree(path, ignore_errors=True)
