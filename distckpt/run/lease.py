"""Leases: a reader's word that it is reading a checkpoint. Retention leaves what has one; it expires by itself.

A reader takes the lease first and opens the commit after; who removes deletes the commit first, and looks for leases
once more before it deletes the data. So a reader that has opened a checkpoint finds its files.

Who removes says that as well, before it looks for leases and launches. A job that would begin with a checkpoint takes
its lease, then looks for those words: of the two, one sees the other, however long either stands still in between.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from distckpt.errors import Corrupt, FormatError, KeyMissing, StoreError
from distckpt.format.layout import LEASES, StepDir, lease_file, lease_of
from distckpt.format.sealed import seal, unseal
from distckpt.format.text import read_json
from distckpt.signing import signer, trusted
from distckpt.store.base import each, read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distckpt.store.base import Store

SECONDS = 3600.0
"""How long a lease holds at most, where its reader is killed before it gives it back."""
_MOST_BYTES = 1 << 16


class Lease(NamedTuple):
    """A word on a checkpoint, as found. removes: it is not of a reader, but of who removes the checkpoint."""

    directory: StepDir
    key: str
    nbytes: int
    expired: bool
    removes: bool


@contextlib.contextmanager
def lease(store: Store, directory: StepDir, seconds: float = SECONDS) -> Iterator[str]:
    """Hold a lease on a checkpoint while the block runs. Gives why there is none, where the store cannot be written to.

    A lease protects from a deletion that comes once in many loads: failing to take one fails no load.
    """
    problem, key = "", ""
    try:
        key = _say(store, directory, seconds)
    except StoreError as e:
        problem = f"read without a lease, so retention could remove it meanwhile: {e}"
    try:
        yield problem
    finally:
        _give_back(store, key)


@contextlib.contextmanager
def removing(store: Store, directory: StepDir) -> Iterator[None]:
    """Say that a checkpoint is being removed while the block runs. StoreError where that cannot be said."""
    key = _say(store, directory, SECONDS, removes=True)
    try:
        yield
    finally:
        _give_back(store, key)


def _say(store: Store, directory: StepDir, seconds: float, **more: bool) -> str:
    key = lease_file(directory, secrets.token_hex(6))
    said = {"directory": str(directory), "host": socket.gethostname(), "expires": time.time() + seconds, **more}
    write_all(store, key, seal(said, signer()))
    return key


def _give_back(store: Store, key: str) -> None:
    with contextlib.suppress(StoreError):  # then it expires
        if key:
            store.delete(key)


def leased(store: Store) -> set[StepDir]:
    """Checkpoints that a reader has a lease on."""
    return {found.directory for found in leases(store) if not found.expired and not found.removes}


def being_removed(store: Store) -> set[StepDir]:
    """Checkpoints that somebody removes, or was removing when it was killed."""
    return {found.directory for found in leases(store) if not found.expired and found.removes}


def leases(store: Store) -> list[Lease]:
    """Every lease. One that cannot be read has expired."""
    entries = [(lease_of(e.name), f"{LEASES}/{e.name}", e.size or 0) for e in store.list(LEASES)]
    found = [(directory, key, nbytes) for directory, key, nbytes in entries if directory]
    said = each(store.pace, lambda lease: _read(store, *lease[:2]), found)
    return [Lease(*on, time.time() > until, removes) for on, (until, removes) in zip(found, said, strict=True)]


def _read(store: Store, directory: StepDir, key: str) -> tuple[float, bool]:
    """(until when, whether it removes)."""
    try:
        data = read_all(store, key, limit=_MOST_BYTES)
        match said := read_json(data):
            case {"expires": int() | float() as until}:
                return float(until), said.get("removes") is True and _may_remove(directory, data)
    except (KeyMissing, FormatError, OverflowError):
        pass
    return 0.0, False


def _may_remove(directory: StepDir, data: bytes) -> bool:
    """Whether who says that he removes a checkpoint may say so: it keeps jobs from resuming from it."""
    try:
        return bool(unseal(data, trusted())["directory"] == str(directory))
    except (Corrupt, FormatError, KeyError):
        return False
