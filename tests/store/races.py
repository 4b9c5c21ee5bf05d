"""What a process of a race runs: importable, small, and without torch, so that it starts at once."""

from __future__ import annotations

from typing import Any

from distckpt.errors import KeyExists
from distckpt.store.local import LocalStore


def create(root: str, key: str, data: bytes, start: Any) -> bool:
    """Create a key once every process is ready. Whether it was this one that did."""
    start.wait(30)
    try:
        LocalStore(root).create(key, data)
    except KeyExists:
        return False
    return True


def compete(root: str, keys: list[str], data: bytes, start: Any, won: Any) -> None:
    """Race for each key in turn, and put the ones won."""
    won.put([key for key in keys if create(root, key, data, start)])
