"""Write the files of a sink, by several processes or nodes, so that nothing is there before all of it is.

Everything is written below a hidden directory beside the destination, whose name tells source and options: a transfer
that was interrupted goes on where it stopped. The last one moves the whole into place.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import KeyMissing, RanksMissing, RunConflict, StoreError
from distckpt.foreign.dcp_write import Folder
from distckpt.format.text import read_json
from distckpt.store.base import read_all, write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distckpt.foreign.sink import Output, Sink

_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Worker:
    """Which of `count` workers this is, over all nodes.

    processes: how many it divides its own share among, on its machine. timeout: seconds that the first waits for the
    others while nothing comes.
    """

    index: int = 0
    count: int = 1
    processes: int = 1
    timeout: float = 600.0

    def divided(self) -> list[Worker]:
        """One for each of its processes."""
        total = self.count * self.processes
        return [Worker(self.index * self.processes + i, total) for i in range(self.processes)]


class Staging:
    """The hidden directory: `data/` as it will be, `done/` what each finished output returned."""

    def __init__(self, destination: Path, digest: str) -> None:
        self.root = destination.parent / f".{destination.name}.{digest}.partial"
        self.data = Folder(self.root / "data")
        self._done = LocalStore(self.root / "done")

    def result(self, output: Output) -> dict[str, Any] | None:
        """What an output returned, as `result`; None if it is not finished."""
        try:
            found: dict[str, Any] = read_json(read_all(self._done, self._key(output), limit=_MOST))
            return found if self.data.head(output.name) == output.size else None
        except KeyMissing:
            return None

    def finish(self, output: Output, result: Any) -> None:
        """Say that an output is written."""
        write_all(self._done, self._key(output), json.dumps({"result": result}).encode())

    @staticmethod
    def _key(output: Output) -> str:
        return output.name.replace("/", "_") + ".json"


def write_share(sink: Sink, staging: Staging, worker: Worker, tell: Callable[[int], None]) -> None:
    """Write the outputs that are this worker's. `tell` learns of the bytes of each."""
    for output in shares(sink, worker.count)[worker.index]:
        if staging.result(output) is None:
            staging.finish(output, output.write(staging.data))
        tell(output.size)


def shares(sink: Sink, count: int) -> list[list[Output]]:
    """Outputs of each worker, so that all have about the same bytes to write."""
    found: list[list[Output]] = [[] for _ in range(count)]
    loads = [0] * count
    for output in sorted(sink.outputs, key=lambda o: (-o.size, o.name)):
        least = loads.index(min(loads))
        found[least].append(output)
        loads[least] += output.size
    return found


def collect(sink: Sink, staging: Staging, worker: Worker) -> dict[str, Any]:
    """Wait for every output. RanksMissing, with the workers and files, once none has come for too long."""
    results: dict[str, Any] = {}
    changed = time.monotonic()
    while True:
        for output in sink.outputs:
            if output.name not in results and (found := staging.result(output)) is not None:
                results[output.name] = found["result"]
                changed = time.monotonic()
        missing = [o.name for o in sink.outputs if o.name not in results]
        if not missing:
            return results
        if time.monotonic() - changed > worker.timeout:
            total = worker.count * worker.processes
            late = [i for i, share in enumerate(shares(sink, total)) if any(o.name in missing for o in share)]
            raise RanksMissing(f"workers {late} have not written {missing[:8]}; none came for {worker.timeout:g} s")
        time.sleep(0.2)


def move_into_place(sink: Sink, staging: Staging, destination: Path, top: str) -> None:
    """Make the destination appear as a whole, durably, and remove the staging directory. RunConflict if it is there.

    top: what of the data is moved: "" all of it, else the one file or directory in it.
    """
    source = staging.data.root / top if top else staging.data.root
    target = destination / top if sink.kind == "inside" else destination
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise RunConflict(f"{target}: exists already; give another destination, or remove it first")
    try:
        source.rename(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise StoreError(f"cannot move {source} to {target}: {e.strerror}; the data is whole there") from e
    shutil.rmtree(staging.root)
