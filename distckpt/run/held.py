"""The memory tier: what was staged last, held for a while by the writer of a training process that was killed.

A job that is started again on the same machine reads its data files from there; what is newest and valid is told by the
run's commits as ever, and every block is verified as ever. A writer that holds says so by a second file in memory,
named for the run, which others find in /proc: so nothing is left behind however it ends. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.format.checksum import digest
from distckpt.system import nameless_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distckpt.saving.arena import Arena
    from distckpt.store.local import LocalStore

_PROC = Path("/proc")
_MOST = 1 << 16


def _label(root: Path) -> str:
    return f"distckpt-held-{digest(str(root.resolve()).encode())}"


def hold(root: Path, key: str, arena: Arena, covered: int, seconds: float) -> None:
    """Hold the first `covered` bytes of data file `key` for so long, or until SIGTERM."""
    said = os.fdopen(nameless_file(_label(root)), "wb")
    with said:
        said.write(json.dumps({"key": key, "descriptor": arena.descriptor, "covered": covered}).encode())
        said.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)


@contextlib.contextmanager
def held(store: LocalStore) -> Iterator[int]:
    """Have `store` read from what is held on this machine while the block runs; gives how many files. Then let it go.

    Who holds is ended only after the block: other ranks may still read from it, so let the block end on all at once.
    """
    found = list(_found(store.root))
    store.held = {key: memory for _, key, memory in found}
    try:
        yield len(found)
    finally:
        store.held = {}
    for process, _, _ in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGTERM)


def _found(root: Path) -> Iterator[tuple[int, str, memoryview]]:
    """(process, key, bytes) of what processes of this user hold for a run."""
    wanted = f"/memfd:{_label(root)}"
    for process in (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()):
        folder = _PROC / str(process) / "fd"
        with contextlib.suppress(OSError):  # of another user, or gone
            for entry in folder.iterdir():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    if str(entry.readlink()).startswith(wanted):
                        said: dict[str, Any] = json.loads(entry.read_bytes()[:_MOST])
                        yield process, said["key"], _mapped(folder / str(said["descriptor"]), said["covered"])


def _mapped(path: Path, nbytes: int) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return memoryview(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ))
    finally:
        os.close(descriptor)
