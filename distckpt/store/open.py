"""A store for what a user names one by: a path, a URI, or the store itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from distckpt.errors import Unsupported
from distckpt.store.local import LocalStore, local_path
from distckpt.store.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.store.base import Store

SCHEMES = ("file", "memory", "s3", "gs", "az")
"""Of URIs that are known."""

_memories: dict[str, MemoryStore] = {}
"""Those of this process, by URI."""


def open_store(where: str | os.PathLike[str] | Store) -> Store:
    """Return the store that a user names. Nothing is looked at yet. Unsupported for a URI of another kind.

    where: a directory (a path, or `file://`); a prefix in an object store (`s3://`, `gs://`, `az://`); memory of this
    process (`memory://name`); or a store.
    """
    if not isinstance(where, (str, os.PathLike)):
        return where
    place = located(where)
    if isinstance(place, Path):
        return LocalStore(place)
    if place.startswith("memory://"):
        return _memories.setdefault(place, MemoryStore())
    from distckpt.store.object import ObjectStore

    return ObjectStore(place)


def located(where: str | os.PathLike[str]) -> str | Path:
    """Absolute path, of a `file://` too; any other URI without slashes at its end. Unsupported for one of no store.

    ValueError for an empty one, such as of a variable that is not set, and for one that begins with `~/`.
    """
    if not is_uri(where):
        if where == "":
            raise ValueError("the path is empty: it would mean the working directory, which is called `.`")
        if str(where).partition(os.sep)[0] == "~":  # `--output=~/x`: no shell expands that; a directory `~` is a trap
            raise ValueError(f"{where}: ~ is a shell's word for the home directory, not expanded here: write it out")
        return local_path(where)
    scheme, _, rest = str(where).partition("://")
    if scheme not in SCHEMES:
        raise Unsupported(f"{where}: not a URI of {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    if scheme == "file":
        return path_of(str(where))
    if not rest.rstrip("/") or rest.startswith("/"):
        raise Unsupported(f"{where}: names no bucket: {scheme}://BUCKET/RUN is expected")
    return str(where).rstrip("/")


def parted(where: str | os.PathLike[str]) -> tuple[str | Path, str]:
    """Return (what holds it, its name) of a path or URI. The root of a bucket has no name."""
    place = located(where)
    if isinstance(place, Path):
        return place.parent, place.name
    lead, _, name = place.rpartition("/")
    return (place, "") if lead.endswith("/") else (lead, name)


def is_uri(where: str | os.PathLike[str]) -> bool:
    """Whether it is a URI, not a path."""
    return isinstance(where, str) and "://" in where


def path_of(uri: str) -> Path:
    """Path that a `file://` URI names. Unsupported if that is on another machine."""
    parts = urlsplit(uri)
    if parts.netloc not in {"", "localhost"} or not parts.path:
        raise Unsupported(f"{uri}: a file URI has three slashes, and an absolute path: file:///nvme/run")
    return Path(unquote(parts.path))


def reopened(address: Mapping[str, Any]) -> Store:
    """Return the store that has this address (Store.address), in another process."""
    root = address["root"]
    if not is_uri(root):
        return LocalStore(root)
    from distckpt.store.object import ObjectStore

    return ObjectStore(root, address["options"], timeout=address["timeout"])
