"""`distckpt preflight RUN`: the checklist before a long run: whether the directory is fit, and what a save will cost.

Probes are hidden files that are removed again. What it cannot know, such as how much a save has, it takes from the
run's newest checkpoint, or is told.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import TYPE_CHECKING

from distckpt.errors import DistckptError, KeyExists, StoreError
from distckpt.run.history import History
from distckpt.run.preemption import GRACE, Preemption
from distckpt.run.retention import listed
from distckpt.store.base import FOR_GOOD, read_all, write_all
from distckpt.store.local import LocalStore, local_path
from distckpt.store.pieces import goes_direct
from distckpt.tools.answer import Answer, table
from distckpt.units import as_bytes, duration_text, size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    Check = tuple[str, str, str]

_OK, _WARN, _FAIL = "ok", "warn", "FAIL"
_PROBE = 64 << 20
_PIECE = 4 << 20
_SKEW = 2.0
"""Seconds that the file system's clock may differ by before it is told."""
_AT_ONCE = 4
"""Checkpoints that must fit: the two newest, which nothing removes, and two being written."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("run_path", metavar="RUN", help="directory of a run; it need not exist yet")
    add("--bytes", type=as_bytes, metavar="SIZE", help="of one checkpoint, all ranks together (else as the newest)")
    add("--keep", type=int, default=_AT_ONCE, metavar="N", help="checkpoints that are to fit (4)")
    add("--writers", type=int, default=1, metavar="N", help="nodes that write at once (1)")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    root = local_path(given.run_path)
    checks = list(_writable(root, given.bytes, max(1, given.keep), max(1, given.writers)))
    checks += _stopping()
    failed = any(state == _FAIL for _, state, _ in checks)
    value = [{"check": name, "state": state.lower(), "text": text} for name, state, text in checks]
    lines = table([(state, name, text) for name, state, text in checks])
    return Answer([*lines, "not fit for a long run" if failed else "fit"], value, code=int(failed))


def _writable(root: Path, nbytes: int | None, keep: int, writers: int) -> Iterator[Check]:
    """Checks of the directory, in a probe directory of its own there, or in the parent where it is yet to be made."""
    home = root
    while not home.exists():
        home = home.parent
    if not home.is_dir():
        yield "path", _FAIL, f"{home} is a file, not a directory"
        return
    yield "path", _OK, f"{root}" if home == root else f"{root} is yet to be made, in {home}"
    probe = home / f".distckpt-probe-{secrets.token_hex(4)}"
    store = LocalStore(probe)
    try:
        write_all(store, "written", b"1")
        yield "write", _OK, "written, synced and renamed"
        yield _hard_links(store)
        yield _clock(store)
        yield _direct(probe)
        seconds = _timed(store)
        rate = _PROBE / seconds
        yield "rate", _OK, f"{size_text(_PROBE)} durable in {seconds:.2f} s: {size_text(int(rate))}/s from here"
        yield from _cost(root, home, nbytes, keep, rate * writers)
    except DistckptError as e:
        yield "write", _FAIL, str(e)
    finally:
        with contextlib.suppress(DistckptError):  # what could not be written need not be removed
            for entry in store.list(""):
                store.delete(entry.name)
        with contextlib.suppress(OSError):
            probe.rmdir()


def _hard_links(store: LocalStore) -> Check:
    """create() makes the commit: link() must refuse where the name is taken."""
    try:
        store.create("created", b"1")
        store.create("created", b"2")
    except KeyExists:
        return "hard links", _OK, "create-if-absent holds: of two commits one wins"
    except StoreError as e:
        return "hard links", _FAIL, f"no checkpoint could be committed here: {e}"
    return "hard links", _FAIL, "create-if-absent does not hold: two jobs could both commit"


def _clock(store: LocalStore) -> Check:
    before = time.time()
    write_all(store, "clock", b"1")
    off = max(before - store.changed("clock"), store.changed("clock") - time.time(), 0.0)
    if read_all(store, "clock", limit=1) != b"1":
        raise StoreError(f"{store}: what was written is not what is read")
    if off > _SKEW:
        return "clock", _WARN, f"the file system's differs by {off:.1f} s from this node's: leases and gc go by it"
    return "clock", _OK, "as the file system's"


def _direct(probe: Path) -> Check:
    path = probe / "direct"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        direct = goes_direct(descriptor)
    except OSError as e:
        return "O_DIRECT", _WARN, f"cannot be tried: {e.strerror}"
    finally:
        os.close(descriptor)
    return "O_DIRECT", _OK, "past the page cache" if direct else "not here: writes go through the page cache"


def _timed(store: LocalStore) -> float:
    """Seconds of a durable write, after one to warm up."""
    piece = memoryview(bytearray(os.urandom(_PIECE)))
    store.write("rate", [piece], size=_PIECE, stable=FOR_GOOD)
    started = time.monotonic()
    store.write("rate", [piece] * (_PROBE // _PIECE), size=_PROBE, stable=FOR_GOOD)
    return time.monotonic() - started


def _cost(root: Path, home: Path, nbytes: int | None, keep: int, rate: float) -> Iterator[Check]:
    """Room for so many checkpoints, and how long one takes to write."""
    status = os.statvfs(home)
    free = status.f_bavail * status.f_frsize
    if nbytes is None:
        newest = next((c.candidate for c in listed(History(LocalStore(root))) if c.candidate.nbytes), None)
        nbytes = newest.nbytes if newest else None
    if nbytes is None:
        yield "room", _WARN, f"{size_text(free)} free; --bytes says how much one checkpoint has"
        return
    state = _OK if free >= keep * nbytes else _FAIL if free < 2 * nbytes else _WARN
    yield (
        "room",
        state,
        f"{size_text(free)} free; {keep} checkpoints of {size_text(nbytes)} take {size_text(keep * nbytes)}",
    )
    seconds = nbytes / rate
    grace = GRACE
    state = _OK if seconds < grace else _WARN
    short = (
        "" if state == _OK else ": longer than the grace; have the signal sent earlier (--signal), or rely on `every`"
    )
    yield "save", state, f"about {seconds:.0f} s until committed, {duration_text(grace)} of grace{short}"


def _stopping() -> Iterator[Check]:
    """How the job will be told to stop."""
    job = os.environ.get("SLURM_JOB_ID")
    end = Preemption().deadline
    if job is None:
        yield (
            "signals",
            _OK,
            f"no SLURM job; preemption=True takes SIGTERM, SIGUSR1, SIGINT; {GRACE:.0f} s until the kill",
        )
        return
    left = f"ends in {duration_text(round(end - time.time()))}" if end else "its end is not known (SLURM_JOB_END_TIME)"
    yield (
        "signals",
        _OK if end else _WARN,
        f"SLURM job {job} {left}; --signal=USR1@S and --requeue are in launch/slurm/",
    )
    restarts = os.environ.get("SLURM_RESTART_COUNT")
    if restarts:
        yield "requeued", _OK, f"{restarts} times so far"
