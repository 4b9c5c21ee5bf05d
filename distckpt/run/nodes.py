"""Directories that not all ranks share: a disk in each node, in front of one root. Collective. Imports no torch.

A rank writes its data file and its ack where it is; nobody there sees the acks of other nodes, so nobody commits. The
acks are sent to the root after the files, and whoever sees them all there commits, as in a save to the root itself. A
resume need not wait for that: nodes tell each other the acks they have, and an attempt that every rank has acked is
committed on each of them. What lies on another node is read from the root, once that node has sent it.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from typing import TYPE_CHECKING

from distckpt.comm import exchange, together
from distckpt.errors import FormatError, KeyExists, RunConflict
from distckpt.format.layout import ACK, NODE
from distckpt.format.text import read_json
from distckpt.store.base import read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distckpt.comm import Comm
    from distckpt.run.history import History
    from distckpt.store.base import Store

_MOST_BYTES = 1 << 30
_NAME = 16


def sharing(comm: Comm, store: Store, root: str) -> list[int]:
    """Ranks that share this one's store, ascending: those that read the same name in it. Collective.

    root: of the run. RunConflict where the store stands in front of another. A name is good for one meeting, for a disk
    may be a copy of another, name and all: so of those that read the same one, the first writes a new one.
    """
    what = "finding out which ranks share a directory"

    def look() -> bytes:
        with contextlib.suppress(KeyExists):
            store.create(NODE, _named(root))
        return _name(store, root)

    def rename() -> bytes:
        if comm.rank not in old.values():
            return b""
        write_all(store, NODE, _named(root))
        return _name(store, root)

    names, new = together(comm, what, look), set[bytes]()
    for _ in range(comm.world_size + 1):
        old = {name: names.index(name) for name in names if name not in new}
        if not old:
            return [rank for rank, name in enumerate(names) if name == names[comm.rank]]
        new |= set(together(comm, what, rename))
        names = together(comm, what, look)
    raise RunConflict(f"{store}: {NODE} changes while it is looked at: another job begins with the same directory")


def _named(root: str) -> bytes:
    return json.dumps({"node": secrets.token_hex(8), "root": root}).encode()


def _name(store: Store, root: str) -> bytes:
    try:
        said = read_json(read_all(store, NODE, limit=_MOST_BYTES))
    except FormatError:
        said = None
    match said:
        case {"node": str(name), "root": str(of)} if of == root and len(name) == _NAME:
            return name.encode()
        case {"root": str(of)} if of != root:
            raise RunConflict(
                f"{store}: is in front of {of}, not of {root}: give another local directory; or, if that run was "
                f"moved here, remove {NODE} in it"
            )
    raise FormatError(f"{store}: {NODE} does not say which run's root this is in front of; remove it if you know")


def settle_apart(comm: Comm, near: History, beside: Iterable[History], *, leads: bool) -> list[str]:
    """Commit on every node what all ranks of the job that saved it have acked. Collective. Returns notes.

    near: this node's. leads: whether this rank acts for it. beside: where acks may lie besides, as in the root, of a
    node that is lost.
    """
    here, mine = dict[str, str](), dict[str, str]()

    def look() -> None:
        if leads:
            here.update(_small_files(near))
            for history in beside:
                mine.update(_small_files(history))
            mine.update(here)

    together(comm, "looking for what each node has saved", look)
    told = exchange(comm, "telling what each node has saved", json.dumps(mine).encode() if mine else b"")
    notes: list[str] = []

    def commit() -> None:
        if leads:
            for key, text in sorted(pair for said in told if said for pair in json.loads(said).items()):
                if not key.rpartition("/")[2].startswith(ACK) or key not in here:
                    write_all(near.store, key, text.encode())
            notes.extend(near.roll_forward(apart=True))

    together(comm, "committing what all nodes have saved", commit)
    return notes


def _small_files(history: History) -> dict[str, str]:
    """Acks of attempts that are not committed, and the objects that they name: key -> text."""
    store = history.store
    found: dict[str, str] = {}
    for directory in history.unfinished():
        for entry in store.list(str(directory)):
            key = f"{directory}/{entry.name}"
            if entry.size is not None and entry.name.endswith(".json"):
                with contextlib.suppress(UnicodeDecodeError):  # nothing that we have written
                    found[key] = read_all(store, key, limit=_MOST_BYTES).decode()
    return found
