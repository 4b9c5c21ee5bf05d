"""Tiers: saves commit in a near store, and are replicated to the far one, the run's root, by rank 0's writer process.

Nothing is remembered of what was copied: the far store tells. A file that lies there whole is not sent again, and one
appears only whole; the commit is created last, so the far run is a run like any other. The newest checkpoint that the
far rules keep goes first: where saves come faster than they can be sent, those between are left out. Imports no torch.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, KeyExists, KeyMissing, RunConflict
from distckpt.format.checksum import BLOCK, digest
from distckpt.format.layout import COMMIT, LAUNCHES, StepDir
from distckpt.format.manifest import MAX_BYTES
from distckpt.run.events import note
from distckpt.run.history import History
from distckpt.run.keep import Keep, decide
from distckpt.run.launches import read_launches
from distckpt.run.lease import lease
from distckpt.run.publish import Retention, Then, publish
from distckpt.run.retention import listed
from distckpt.run.triggers import duration
from distckpt.store.base import FOR_GOOD, read_all
from distckpt.store.open import open_store, reopened
from distckpt.store.tiers import Tiers
from distckpt.units import as_bytes, duration_text

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store

_PIECE = 4 * BLOCK
_PAUSE = 1.0
"""Seconds after which what failed is tried again, at first; and between looks at the clock."""
_LONGEST_PAUSE = 60.0


@dataclass(frozen=True)
class Local:
    """A directory in front of a run's root: saves commit there, and are replicated in the background.

    keep: what stays in it (what is being sent stays, too). bandwidth: bytes a second ("50 MB") that replication takes
    at most. behind: how long ("30 min") the root may lack the newest checkpoint before a StateWarning says so.
    """

    path: str | os.PathLike[str]
    keep: Keep | None = field(default_factory=lambda: Keep(last=2))
    bandwidth: str | int | None = None
    behind: str | float = "30 min"


@dataclass(frozen=True)
class Rules:
    """What `Local` says of replication, and what is kept in the far store, as a message to the writer has it."""

    keep: Keep | None
    bandwidth: int | None
    behind: float

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
        kept = self.keep.to_json() if self.keep else None
        return {"keep": kept, "bandwidth": self.bandwidth, "behind": self.behind}

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Rules:
        """What to_json described."""
        return Rules(Keep.from_json(said["keep"]) if said["keep"] else None, said["bandwidth"], said["behind"])


class Places:
    """Where a run lies. near: where saves go; whole: all that there is of it. The same unless it has tiers.

    keep: what is kept near. ValueError and Unsupported for a `local` that cannot be.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store,
        local: Local | str | os.PathLike[str] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.near = self.whole = open_store(root)
        self.keep, self._rules = keep, None
        self._taken: list[StepDir] | None = None
        if local is not None:
            asked = local if isinstance(local, Local) else Local(local)
            bandwidth = as_bytes(asked.bandwidth) if asked.bandwidth is not None else None
            self._rules = Rules(keep, bandwidth, duration(asked.behind, "behind"))
            self._far, self.near = self.near, open_store(asked.path)
            if self._far.address is None or self.near.address in (None, self._far.address):
                raise ValueError(f"local={asked.path!r}, root={root!r}: two different places on disk or in a store")
            self.whole, self.keep = Tiers(self.near, self._far), asked.keep

    def generation(self, step: int) -> int:
        """Generation of a step that the far store has free, 1 where there is none."""
        if not isinstance(self.whole, Tiers):
            return 1
        if self._taken is None:
            self._taken = History(self.whole.far).directories()
        return max((d.generation for d in self._taken if d.step == step and not self._is_near(d)), default=0) + 1

    def _is_near(self, directory: StepDir) -> bool:
        return bool(self.near.list(str(directory)))

    def open(self) -> None:
        """Bring what decides which checkpoints count to the near store. Done by rank 0, before a launch."""
        if isinstance(self.whole, Tiers):
            self.whole.bring_near(LAUNCHES)

    def notes(self) -> list[str]:
        """What a load is to tell of where it read."""
        if not isinstance(self.whole, Tiers):
            return []
        fetched = sorted(key for key in self.whole.fetched if key.endswith(".safetensors"))
        if not fetched:
            return []
        some = ", ".join(fetched[:3]) + (f" and {len(fetched) - 3} more" if len(fetched) > 3 else "")
        return [f"read from {self.whole.far}, for {self.whole.near} lacks it or has it damaged: {some}"]

    def replication(self) -> dict[str, Any] | None:
        """Message by which the writer process begins to replicate; None where there is nothing to."""
        if not self._rules:
            return None
        return {"near": self.near.address, "far": self._far.address, "rules": self._rules.to_json()}


class Replicator:
    """Copies what is committed near, in a thread, until it is finished. `tell`: says what a person must know."""

    def __init__(self, message: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._near, self._far = History(reopened(message["near"])), History(reopened(message["far"]))
        self._rules = Rules.from_json(message["rules"])
        self._tell, self._told = tell, ""
        self._lock = threading.Condition()
        self._ahead: list[tuple[StepDir, float]] = []
        """Near checkpoints that came since the far store's newest, and when."""
        self._asked, self._deadline = True, float("inf")
        self._sent = 0.0
        self._thread = threading.Thread(target=self._run, name="distckpt-replicate", daemon=True)
        self._thread.start()

    def wake(self, directory: StepDir | None = None) -> None:
        """Look again, for a checkpoint was committed."""
        with self._lock:
            if directory:
                self._ahead.append((directory, time.monotonic()))
            self._asked = True
            self._lock.notify()

    def finish(self, seconds: float) -> None:
        """End once nothing is left to copy, after `seconds` at the latest; what is left then is told."""
        with self._lock:
            self._deadline, self._asked = time.monotonic() + seconds, True
            self._lock.notify()
        self._thread.join(seconds + _PAUSE)
        if self._thread.is_alive() or self._ahead:
            self._say(f"{self._far.store} lacks the newest checkpoint still: the next launch sends it")

    def _run(self) -> None:
        pause = _PAUSE
        while time.monotonic() < self._deadline:
            with self._lock:
                if not self._asked and self._deadline != float("inf"):
                    return
                if not self._asked:
                    self._lock.wait(_PAUSE)
                asked, self._asked = self._asked, False
            self._check_behind()
            if not asked:
                continue
            try:
                while self._once():
                    pause = _PAUSE
            except RunConflict as e:
                self._say(str(e))
                return
            except DistckptError as e:
                self._say(f"replicating to {self._far.store}: {e}")
                time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
                self.wake()

    def _check_behind(self) -> None:
        late = time.monotonic() - self._ahead[0][1] if self._ahead else 0.0
        if late > self._rules.behind:
            self._say(
                f"{self._far.store} is behind: it has lacked {self._ahead[0][0]} for longer than "
                f"{duration_text(self._rules.behind)}"
            )

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)
            note(self._near.store, "behind", why=text)

    # -- one checkpoint ----------------------------------------------------------------------------------------------

    def _once(self) -> bool:
        """Copy the checkpoint that is to go next. False where there is none."""
        checkpoint = self._next()
        if checkpoint is None:
            with self._lock:
                self._ahead.clear()
            return False
        started = time.monotonic()
        with lease(self._near.store, checkpoint.directory):
            nbytes = self._copy(checkpoint)
        with self._lock:
            self._ahead = [(d, at) for d, at in self._ahead if d > checkpoint.directory]
        self._told = ""
        seconds = round(time.monotonic() - started, 3)
        note(self._near.store, "replicated", step=checkpoint.directory.step, bytes=nbytes, seconds=seconds)
        return True

    def _next(self) -> Checkpoint | None:
        """Newest near checkpoint that the far rules keep, and the far store lacks. RunConflict once superseded."""
        if len(read_launches(self._far.store)) > len(read_launches(self._near.store)):
            raise RunConflict(f"{self._far.store}: a later launch, elsewhere, has resumed this run: nothing is sent")
        there = {c.directory: c.candidate for c in listed(self._far)}
        here = {c.directory: c for c in listed(self._near) if c.found.checkpoint and not c.found.superseded}
        candidates = [*(c.candidate for d, c in here.items() if d not in there), *there.values()]
        wanted = decide(self._rules.keep or Keep(), candidates, {}).stays
        lacking = sorted(here.keys() & (wanted.keys() - there), reverse=True)
        return here[lacking[0]].found.checkpoint if lacking else None

    def _copy(self, checkpoint: Checkpoint) -> int:
        """Copy its files, as far as they are not there, then its commit. Returns the bytes sent."""
        directory, content = checkpoint.directory, checkpoint.manifest
        sent = 0
        for index, file in enumerate(content.files):
            key = file.name if "/" in file.name else f"{directory}/{file.name}"
            sent += self._send(key, file.size, self._verified(checkpoint, index))
        for info in content.objects.values():
            key = f"{directory}/{info.name}"
            sent += self._send(key, info.size, self._object(checkpoint, key, info.digest))
        key = f"{directory}/{COMMIT}"
        try:
            self._far.store.create(key, read_all(self._near.store, key, limit=MAX_BYTES))
        except KeyExists as e:
            raise RunConflict(f"{e}: another job has saved this step; nothing is sent") from e
        made = self._far.open(directory)
        publish(self._far, made, Then(Retention(self._rules.keep) if self._rules.keep else None, noted=False))
        return sent

    def _send(self, key: str, size: int, pieces: Iterator[memoryview]) -> int:
        """Copy a key unless the far store has it: it never has a part of one. Returns the bytes sent."""
        with contextlib.suppress(KeyMissing):
            if self._far.store.head(key) == size:
                return 0
        self._far.store.write(key, self._paced(pieces), size=size, stable=FOR_GOOD)
        return size

    def _verified(self, checkpoint: Checkpoint, index: int) -> Iterator[memoryview]:
        """Yield a data file, each block of it verified. Corrupt."""
        file = checkpoint.data_file(index)
        size = checkpoint.manifest.files[index].size
        for start in range(0, file.covered, _PIECE):
            piece = memoryview(bytearray(min(_PIECE, file.covered - start)))
            checkpoint.read_verified(file, start // BLOCK, [piece])
            yield piece
        table = memoryview(bytearray(size - file.covered))
        checkpoint.read(file.key, file.covered, [table])
        yield table

    def _object(self, checkpoint: Checkpoint, key: str, expected: str) -> Iterator[memoryview]:
        data = memoryview(read_all(self._near.store, key, limit=MAX_BYTES))
        if digest(data) != expected:
            raise Corrupt(f"{key}: does not match the digest in the commit of {checkpoint.directory}")
        yield data

    def _paced(self, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """Hold pieces back so that no more bytes go in a second than may."""
        for piece in pieces:
            if self._rules.bandwidth:
                now = time.monotonic()
                self._sent = max(self._sent, now) + len(piece) / self._rules.bandwidth
                time.sleep(max(0.0, self._sent - now))
            yield piece
