"""The contract that every store keeps. Adding a behaviour (retry, limits, cache) means wrapping a store.

Keys are parts joined by `/`, each a plain name (`format.layout.check_key` is what makes them; a store refuses others).
Every verb may block; every error is a StoreError. All verbs may be called from several threads and processes at once.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from distckpt.errors import FormatError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

T = TypeVar("T")
A = TypeVar("A")

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")

FOR_GOOD = sys.maxsize
"""`stable` of pieces of which none is ever reused."""


class Entry(NamedTuple):
    """A name directly below a prefix: a key with its bytes, or (size None) a prefix of further keys."""

    name: str
    size: int | None


class Pace(NamedTuple):
    """How a store is best read. gap: bytes that cost less to read than to skip; in_flight: reads at once."""

    gap: int = 0
    in_flight: int = 4


class Store(Protocol):
    """Bytes by key. pace: how it is best read."""

    pace: Pace

    @property
    def address(self) -> dict[str, Any] | None:
        """What another process opens it by (`store.open.reopened`), as JSON; None: it lies in this one alone."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """Entries directly below `prefix` ("" is the root), sorted by name; empty where there is nothing.

        Shows every key whose write or create returned before the call. Never shows a write in progress.
        """
        ...

    def head(self, key: str) -> int:
        """Bytes of a key. KeyMissing if it does not exist."""
        ...

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers (writable, bytes, contiguous) in order from byte `start` on.

        KeyMissing; KeyTruncated if the key ends first. After an error the buffers' content is undefined.
        """
        ...

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:
        """Make `key` hold the pieces in order, `size` bytes in all, replacing what it held.

        Atomic (a reader sees the old content or the new) and durable when it returns. A piece stays as it is while
        `stable` more are asked for (FOR_GOOD: until this returns), so that several can be on their way at once; then
        the iterable may reuse it.
        After an error the key is as it was, and no room stays taken.
        """
        ...

    def create(self, key: str, data: bytes) -> None:
        """Like `write`, but KeyExists if the key exists with other content. Of racing calls exactly one succeeds.

        Idempotent for equal content: creating what is there already, to the byte, succeeds.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a key, durably. Idempotent."""
        ...


@runtime_checkable
class Dated(Protocol):
    """A store that knows when a key was written."""

    def changed(self, key: str) -> float:
        """When it was, in seconds by the store's own clock. KeyMissing."""
        ...


@runtime_checkable
class Roomy(Protocol):
    """A store that may be full."""

    def room(self) -> int | None:
        """Bytes that can still be written, as far as it knows; None if it does not."""
        ...


@runtime_checkable
class Whole(Protocol):
    """A store that gives a whole key in one request: as one write has left it, whoever else writes it meanwhile."""

    def content(self, key: str, limit: int) -> bytes:
        """All bytes of a key, of at most `limit`. KeyMissing; FormatError if it is longer."""
        ...


@runtime_checkable
class Copied(Protocol):
    """A store that has some keys twice."""

    def distrust(self, key: str) -> bool:
        """Read the other copy of a key from now on, for this one is damaged. False if there is none."""
        ...


def check(key: str, *, prefix: bool = False) -> str:
    """Return the key itself; StoreError for one that could lead out of the store or name a hidden file."""
    if not (prefix and not key) and not all(_PART.fullmatch(part) for part in key.split("/")):
        raise StoreError(f"not a key: {key!r}; its parts must match {_PART.pattern}")
    return key


def read_all(store: Store, key: str, *, limit: int) -> bytes:
    """Whole content of a key of at most `limit` bytes. KeyMissing; FormatError if it is longer."""
    if isinstance(store, Whole):
        return store.content(key, limit)
    size = store.head(key)
    if size > limit:
        raise FormatError(f"{key} has {size} bytes; at most {limit} are read")
    data = bytearray(size)
    if size:
        store.read(key, 0, [memoryview(data)])
    return bytes(data)


def each(pace: Pace, call: Callable[[A], T], items: Iterable[A]) -> list[T]:
    """Call for each item; several at once where a store is far, so that every answer takes its time."""
    todo = list(items)
    if not pace.gap or len(todo) < 2:
        return list(map(call, todo))
    with ThreadPoolExecutor(pace.in_flight, "distckpt-each") as pool:
        return list(pool.map(call, todo))


def write_all(store: Store, key: str, data: bytes) -> None:
    """Write one key from one piece."""
    store.write(key, [memoryview(data)], size=len(data))
