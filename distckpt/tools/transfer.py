"""Write the files of a sink, by several processes or nodes, so that nothing is there before all of it is.

In a file system everything is written below a hidden directory beside the destination, and moved into place as a whole.
At a URI, where nothing can be moved, it is written in place as an attempt of a step, which is nothing before its commit
(tools/in_place.py). What names either tells source and options: a transfer that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, KeyExists, KeyMissing, RanksMissing, RunConflict, StoreError
from distckpt.foreign.dcp_write import Folder
from distckpt.format.checksum import digest
from distckpt.format.sealed import seal, unseal
from distckpt.run.source import open_source
from distckpt.signing import own, signer
from distckpt.store.base import read_all, write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from distckpt.foreign.sink import Output, Sink
    from distckpt.loading.open import Checkpoint
    from distckpt.tools.in_place import InPlace

_MOST = 1 << 20
_LONGEST = 200


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

    def __post_init__(self) -> None:
        if not (0 <= self.index < self.count and self.processes > 0 and self.timeout > 0):
            raise ValueError(
                f"worker {self.index} of {self.count}, {self.processes} processes, timeout {self.timeout}: an index "
                "below the count, at least one process, and a timeout above 0 are expected"
            )

    def divided(self) -> list[Worker]:
        """One for each of its processes."""
        total = self.count * self.processes
        return [Worker(self.index * self.processes + i, total) for i in range(self.processes)]


class Staging:
    """The hidden directory: `data/` as it will be, `done/` what each finished output returned, and a lock."""

    DONE, LOCK = "done", "lock"

    def __init__(self, sink: Sink, destination: Path, attempt: str) -> None:
        self._sink, self._destination, self._attempt = sink, destination, attempt
        self._top = destination.name if sink.kind == "file" else sink.top
        self.root = destination.parent / f".{destination.name[:_LONGEST]}.{attempt}.partial"
        self.data = Folder(self.root / "data", also=destination.name)
        self._done = LocalStore(self.root / self.DONE)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from this copy while the block makes it, and remove the directory once it has.

        RunConflict where one is at it.
        """
        made = False
        lock = contextlib.ExitStack()
        try:
            lock.enter_context(self._done.locked(self.LOCK))
        except KeyExists as e:
            raise RunConflict(f"{self.root}: another process is making this very copy: wait for it") from e
        try:
            with lock:
                yield
            made = True
        finally:
            if made or not self.data.root.exists():
                shutil.rmtree(self.root)

    def finished(self, outputs: Iterable[Output]) -> dict[str, Any]:
        """What those of the outputs returned that are finished, by name."""
        found = {}
        for output in outputs:
            with contextlib.suppress(KeyMissing, Corrupt, FormatError):  # what cannot be believed is made anew
                said: Any = unseal(read_all(self._done, _key(output), limit=_MOST), own())
                whose = said["attempt"], said["output"]
                if whose == (self._attempt, output.name) and self.data.head(output.name) == output.size:
                    found[output.name] = said["result"]
        return found

    def make(self, output: Output) -> None:
        """Write an output, and say that it is written. What a killed try left of it goes first."""
        self.data.discard_temporary(output.name)
        result = output.write(self.data)
        said = {"attempt": self._attempt, "output": output.name, "result": result}
        write_all(self._done, _key(output), seal(said, signer()))

    def complete(self, files: Iterable[tuple[str, bytes]]) -> Checkpoint:
        """Write what makes the copy whole, and open it as it lies here."""
        for name, data in files:
            self.data.discard_temporary(name)
            write_all(self.data, name, data)
        for name in self._sink.beside:
            (self.data.root / name).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (self.data.root / name).hardlink_to(self._destination / name)
        return open_source(self.data.root / self._top, order=self._sink.order, ours=True)

    def forget(self) -> None:
        """Take no output for finished any more: what was written is not what is there."""
        for entry in self._done.list(""):
            if entry.name != self.LOCK:
                self._done.delete(entry.name)

    def publish(self) -> None:
        """Move the whole into place, and switch what points there."""
        move_into_place(self._sink, self, self._destination, self._top)
        for name, data in self._sink.pointers:
            write_all(LocalStore(self._destination), name, data)


def _key(output: Output) -> str:
    return digest(output.name.encode()) + ".json"


def write_share(sink: Sink, staging: Staging | InPlace, worker: Worker, tell: Callable[[int], None]) -> None:
    """Write the outputs that are this worker's. `tell` learns of the bytes of each."""
    mine = outputs_of(sink, worker)
    finished = staging.finished(mine)
    for output in mine:
        if output.name not in finished:
            staging.make(output)
        tell(output.size)


def outputs_of(sink: Sink, worker: Worker) -> list[Output]:
    """Outputs that are this worker's."""
    return shares(sink, worker.count)[worker.index]


def shares(sink: Sink, count: int) -> list[list[Output]]:
    """Outputs of each worker, so that all have about the same bytes to write."""
    found: list[list[Output]] = [[] for _ in range(count)]
    loads = [0] * count
    for output in sorted(sink.outputs, key=lambda o: (-o.size, o.name)):
        least = loads.index(min(loads))
        found[least].append(output)
        loads[least] += output.size
    return found


def collect(sink: Sink, staging: Staging | InPlace, worker: Worker) -> dict[str, Any]:
    """Wait for every output. RanksMissing, with the workers and files, once none has come for too long."""
    results: dict[str, Any] = {}
    changed = time.monotonic()
    while True:
        if found := staging.finished(o for o in sink.outputs if o.name not in results):
            results |= found
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
    """Make the destination appear as a whole, durably. RunConflict if it is there.

    top: what of the data is moved: "" all of it, else the one file or directory in it.
    """
    source = staging.data.root / top if top else staging.data.root
    target = destination / top if sink.kind == "inside" else destination
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir() and not any(target.iterdir()):
            target.rmdir()
        if target.exists():
            raise RunConflict(f"{target}: exists already; give another destination, or remove it first")
        source.rename(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as e:
        raise StoreError(f"cannot move {source} to {target}: {e.strerror}; the data is whole there") from e
