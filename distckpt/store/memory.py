"""A store in memory: the simplest thing that keeps the contract, and so the oracle of the conformance suite."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, KeyExists, KeyMissing, KeyTruncated, StoreError
from distckpt.store.base import Entry, Pace, check

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class MemoryStore:
    """Keys and their bytes in a dict."""

    pace = Pace()
    address = None

    def __init__(self) -> None:
        self._data: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MemoryStore({len(self._data)} keys)"

    def list(self, prefix: str) -> list[Entry]:
        """See Store.list."""
        lead = check(prefix, prefix=True) + "/" if prefix else ""
        found: dict[str, int | None] = {}
        with self._lock:
            for key, data in self._data.items():
                if key.startswith(lead):
                    name, deeper, _ = key[len(lead) :].partition("/")
                    found[name] = None if deeper else len(data)
        return [Entry(name, size) for name, size in sorted(found.items())]

    def head(self, key: str) -> int:
        """See Store.head."""
        return len(self._get(key))

    def _get(self, key: str) -> bytes:
        with self._lock:
            try:
                return self._data[check(key)]
            except KeyError:
                raise KeyMissing(f"{key}: no such key") from None

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Store.read."""
        data = memoryview(self._get(key))
        for buffer in buffers:
            piece = data[start : start + len(buffer)]
            if len(piece) != len(buffer):
                raise KeyTruncated(f"{key}: ends at byte {len(data)}, byte {start + len(buffer)} was asked for")
            buffer[:] = piece
            start += len(buffer)

    def content(self, key: str, limit: int) -> bytes:
        """See Whole."""
        if len(data := self._get(key)) > limit:
            raise FormatError(f"{key} has {len(data)} bytes; at most {limit} are read")
        return data

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:  # noqa: ARG002
        """See Store.write."""
        check(key)
        data = b"".join(bytes(p) for p in pieces)
        if len(data) != size:
            raise StoreError(f"{key}: the pieces have {len(data)} bytes, {size} were announced")
        with self._lock:
            self._data[key] = data

    def create(self, key: str, data: bytes) -> None:
        """See Store.create."""
        with self._lock:
            if self._data.setdefault(check(key), bytes(data)) != data:
                raise KeyExists(f"{key}: exists with other content")

    def delete(self, key: str) -> None:
        """See Store.delete."""
        with self._lock:
            self._data.pop(check(key), None)
