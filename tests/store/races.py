"""What a process of a race runs: importable, small, and without torch, so that it starts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import KeyExists
from distckpt.store.open import reopened

if TYPE_CHECKING:
    from distckpt.store.base import Store


def create(store: Store, key: str, data: bytes, start: Any) -> bool:
    """Create a key once every process is ready. Whether it was this one that did."""
    start.wait(60)
    try:
        store.create(key, data)
    except KeyExists:
        return False
    return True


def compete(address: dict[str, Any], keys: list[str], data: bytes, start: Any, won: Any) -> None:
    """Race for each key in turn, and put the ones won."""
    store = reopened(address)
    won.put([key for key in keys if create(store, key, data, start)])
