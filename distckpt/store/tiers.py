"""A run that lies in two places: near, fast and small, such as a node's own disk; and far, which lasts.

Saves go to the near store alone, and are replicated (run/replicate.py). This is how both are seen as one: what is in
either is there; the near copy of a key is read, and the far one where there is none, or the near one is damaged. What
is written through it (launches, heartbeats, leases) goes to both, to the far one first, which decides.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from distckpt.errors import KeyMissing, RunConflict, StoreError
from distckpt.store.base import FOR_GOOD, Dated, Entry, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from distckpt.store.base import Store

T = TypeVar("T")

_MOST_BYTES = 1 << 28
_LOOKS = 0.2
"""Seconds between looks for what another machine sends."""


class Tiers:
    """near and far, as one store. `fetched`: keys that were read from the far one."""

    address = None

    def __init__(self, near: Store, far: Store) -> None:
        self.near, self.far, self.pace = near, far, far.pace
        self.fetched: set[str] = set()
        self._distrusted: set[str] = set()
        self._awaits: Callable[[str], bool] = lambda _: False
        self._patience = 0.0

    @property
    def _both(self) -> tuple[Store, Store]:
        return self.near, self.far

    def __repr__(self) -> str:
        return f"{self.near!r} in front of {self.far!r}"

    def list(self, prefix: str) -> list[Entry]:
        """See Store.list."""
        both = {entry.name: entry for store in self._both[::-1] for entry in store.list(prefix)}
        return sorted(both.values())

    def head(self, key: str) -> int:
        """See Store.head."""
        return self._nearest(key, lambda store: store.head(key))

    def changed(self, key: str) -> float:
        """When a key was written: see Dated."""
        return self._nearest(key, lambda store: store.changed(key) if isinstance(store, Dated) else 0.0)

    def content(self, key: str, limit: int) -> bytes:
        """See Whole."""
        return self._nearest(key, lambda store: read_all(store, key, limit=limit))

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Store.read."""
        self._nearest(key, lambda store: store.read(key, start, buffers))

    def _nearest(self, key: str, ask: Callable[[Store], T]) -> T:
        problem: StoreError | None = None
        if key not in self._distrusted:
            try:
                return ask(self.near)
            except KeyMissing:
                pass
            except StoreError as e:  # it is short, or the disk fails
                problem = e
        deadline = time.monotonic() + self._patience
        while self._awaits(key) and not _is_there(self.far, key) and time.monotonic() < deadline:
            time.sleep(_LOOKS)
        try:
            answer = ask(self.far)
        except KeyMissing as e:
            raise problem or e from None
        self.fetched.add(key)
        if problem:
            self._distrusted.add(key)
        return answer

    def await_keys(self, which: Callable[[str], bool], seconds: float) -> None:
        """Wait for such keys, for so long each, where neither store has them yet: another machine sends them."""
        self._awaits, self._patience = which, seconds

    def distrust(self, key: str) -> bool:
        """Read a key from the far store from now on, for the near copy is damaged. False if that is all there is.

        True again for one that is distrusted already: another thread may have found it damaged, too, meanwhile.
        """
        if key not in self._distrusted and _is_there(self.far, key):
            self._distrusted.add(key)
        return key in self._distrusted

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:  # noqa: ARG002
        """See Store.write. Held in memory meanwhile: what is large is replicated instead."""
        data = [memoryview(bytes(piece)) for piece in pieces]
        for store in self._both[::-1]:
            store.write(key, data, size=size, stable=FOR_GOOD)

    def create(self, key: str, data: bytes) -> None:
        """See Store.create."""
        self.far.create(key, data)
        self.near.create(key, data)

    def delete(self, key: str) -> None:
        """See Store.delete."""
        self.near.delete(key)
        self.far.delete(key)

    def bring_near(self, prefix: str, which: Callable[[str], bool]) -> None:
        """Copy the keys directly below a prefix, of those names, that the near store lacks.

        RunConflict where the last that both have is another in each.
        """
        here, there = ({entry.name for entry in store.list(prefix) if which(entry.name)} for store in self._both)
        if common := here & there:
            key = f"{prefix}/{max(common)}"
            if len({read_all(store, key, limit=_MOST_BYTES) for store in self._both}) > 1:
                raise RunConflict(
                    f"{key} is another in {self.near} than in {self.far}: each was used without the other. Give "
                    "another local directory to go on from the root; what that one has alone can be loaded from there"
                )
        for name in sorted(there - here):
            key = f"{prefix}/{name}"
            self.near.create(key, read_all(self.far, key, limit=_MOST_BYTES))


def _is_there(store: Store, key: str) -> bool:
    try:
        store.head(key)
    except KeyMissing:
        return False
    return True
