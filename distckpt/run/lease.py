"""Leases: a reader's word that it is reading a checkpoint. Retention leaves what has one; it expires by itself.

A reader takes the lease first and opens the commit after; who removes deletes the commit first, and looks for leases
once more before it deletes the data. So a reader that has opened a checkpoint finds its files.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import time
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, KeyMissing, StoreError
from distckpt.format.layout import LEASES, StepDir, lease_file, lease_of
from distckpt.format.text import read_json
from distckpt.store.base import each, read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distckpt.store.base import Store

SECONDS = 3600.0
"""How long a lease holds at most, where its reader is killed before it gives it back."""
_MOST_BYTES = 1 << 16


@contextlib.contextmanager
def lease(store: Store, directory: StepDir, seconds: float = SECONDS) -> Iterator[str]:
    """Hold a lease on a checkpoint while the block runs. Gives why there is none, where the store cannot be written to.

    A lease protects from a deletion that comes once in many loads: failing to take one fails no load.
    """
    key = lease_file(directory, secrets.token_hex(6))
    said = {"host": socket.gethostname(), "expires": time.time() + seconds}
    try:
        write_all(store, key, json.dumps(said).encode())
        problem = ""
    except StoreError as e:
        problem = f"read without a lease, so retention could remove it meanwhile: {e}"
    try:
        yield problem
    finally:
        if not problem:
            with contextlib.suppress(StoreError):  # then it expires
                store.delete(key)


def leased(store: Store) -> set[StepDir]:
    """Checkpoints that somebody has a lease on."""
    return {directory for directory, _, expired in leases(store) if not expired}


def leases(store: Store) -> list[tuple[StepDir, str, bool]]:
    """Every lease: its checkpoint, its key, whether it has expired. One that cannot be read has."""
    found = [(directory, f"{LEASES}/{e.name}") for e in store.list(LEASES) if (directory := lease_of(e.name))]
    until = each(store.pace, lambda lease: _expires(store, lease[1]), found)
    return [(*lease, time.time() > expires) for lease, expires in zip(found, until, strict=True)]


def _expires(store: Store, key: str) -> float:
    try:
        said = read_json(read_all(store, key, limit=_MOST_BYTES))
    except (KeyMissing, FormatError):
        return 0.0
    until = said.get("expires") if isinstance(said, dict) else None
    return float(until) if isinstance(until, (int, float)) else 0.0
