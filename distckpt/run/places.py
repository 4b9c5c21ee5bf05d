"""Where a run lies: in its root; with tiers, in a local directory that saves commit in, and in the root behind it."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported
from distckpt.format.layout import ACK, LAUNCHES, StepDir, attempt_of, launch_number
from distckpt.run.history import History
from distckpt.run.keep import Keep
from distckpt.run.nodes import settle_apart, sharing
from distckpt.run.replicate import Rules
from distckpt.run.triggers import duration
from distckpt.store.local import LocalStore
from distckpt.store.open import open_store
from distckpt.store.tiers import Tiers
from distckpt.units import as_bytes

if TYPE_CHECKING:
    import os

    from distckpt.comm import Comm
    from distckpt.store.base import Store


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

    def rules(self, keep: Keep | None) -> Rules:
        """What replication goes by; keep: at the root. ValueError."""
        if self.keep is not None and not isinstance(self.keep, Keep):
            raise ValueError(f"Local: keep={self.keep!r}: a Keep, or None to keep all, is expected")
        bandwidth = None if self.bandwidth is None else as_bytes(self.bandwidth)
        if bandwidth == 0:
            raise ValueError(f"Local: bandwidth={self.bandwidth!r}: at least one byte a second; None for no limit")
        return Rules(keep, self.keep, bandwidth, duration(self.behind, "behind"))


class Places:
    """Where a run lies. near: where saves go; whole: all that there is of it. The same unless it has tiers.

    keep: what is kept near. ranks: those that share this rank's near store, once they have met; leads: whether this one
    acts for them; apart: whether there are others. ValueError and Unsupported for a `local` that cannot be.
    """

    apart = False
    leads = True

    def __init__(
        self,
        root: str | os.PathLike[str] | Store,
        local: Local | str | os.PathLike[str] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.near = self.whole = open_store(root)
        self.keep, self._rules = keep, None
        self._taken: list[StepDir] = []
        """Step directories of the far store when the launch began."""
        self._ranks: list[int] = []
        self._world_size = 0
        if local is not None:
            asked = local if isinstance(local, Local) else Local(local)
            self._rules, self.keep = asked.rules(keep), asked.keep
            self._far, self.near = self.near, _directory(asked.path)
            if self._far.address is None:
                raise Unsupported(f"root={root!r}: no other process can send there; local= needs a path or a bucket")
            if isinstance(self._far, LocalStore) and self._far.root.resolve() == self.near.root.resolve():
                raise ValueError(f"local={asked.path!r} is the same directory as root={root!r}: give another, or none")
            self.whole = Tiers(self.near, self._far)

    def generation(self, step: int) -> int:
        """Generation of a step that the far store has free, 1 where there is none."""
        return max((d.generation for d in self._taken if d.step == step and not self._is_near(d)), default=0) + 1

    def _is_near(self, directory: StepDir) -> bool:
        return bool(self.near.list(str(directory)))

    @property
    def sharing(self) -> list[int]:
        """Ranks that share this one's near store, where not all do; else none is named."""
        return self._ranks if self.apart else []

    def meet(self, comm: Comm) -> None:
        """Find out which ranks share the near store. Collective; done once."""
        self.leads = comm.rank == 0
        if not isinstance(self.whole, Tiers) or self._ranks:
            return
        self._ranks = sharing(comm, self.near, str((self._far.address or {})["root"]))
        self.leads = self._ranks[0] == comm.rank
        self.apart = len(self._ranks) < comm.world_size
        self._world_size = comm.world_size
        if self.apart:
            self.whole.await_keys(is_sent, comm.timeout / 2)

    def settle(self, comm: Comm, near: History, whole: History) -> list[str]:
        """Commit what a lost job had saved, where no node sees all of it. Collective. Returns notes."""
        if not self.apart:
            return []
        return settle_apart(comm, near, [whole] if comm.rank == 0 else [], leads=self.leads)

    def open(self) -> None:
        """Bring what decides which checkpoints count to the near store. Done by those who lead.

        Saves ask the far store for nothing: it may be out of reach by then.
        """
        if isinstance(self.whole, Tiers):
            self.whole.bring_near(LAUNCHES, lambda name: launch_number(name) is not None)
            self._taken = History(self.whole.far).directories()

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
        """Message by which this rank's writer process begins to replicate; None where it has nothing to."""
        if not self._rules or not self.leads:
            return None
        apart = {"ranks": self._ranks, "world_size": self._world_size} if self.apart else None
        return {"near": self.near.address, "far": self._far.address, "rules": self._rules.to_json(), "apart": apart}


def is_sent(key: str) -> bool:
    """Whether a key is of what one node sends to the root for the others: data files and objects."""
    name = key.rpartition("/")[2]
    return attempt_of(name) is not None and not name.startswith(ACK)


def _directory(path: str | os.PathLike[str]) -> LocalStore:
    """Store of what `local` names. Unsupported where that is no directory."""
    if isinstance(path, (str, PathLike)) and str(path):
        store = open_store(path)
        if isinstance(store, LocalStore):
            return store
    raise Unsupported(f"local={path!r}: a directory is expected: saves commit there, before they are sent to the root")
