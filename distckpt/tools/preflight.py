"""`distckpt preflight RUN`: the checklist before a long run: whether its place is fit, and what a save will cost.

Probes are hidden files, or objects, that are removed again. What it cannot know, such as how much a save has, it takes
from the run's newest checkpoint, or is told.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.errors import DistckptError, KeyExists, StoreError
from distckpt.run.history import History
from distckpt.run.preemption import GRACE, Preemption
from distckpt.run.retention import listed
from distckpt.store.base import FOR_GOOD, Dated, read_all, write_all
from distckpt.store.local import LocalStore
from distckpt.store.open import located, open_store
from distckpt.store.pieces import goes_direct
from distckpt.tools.answer import Answer, count, table
from distckpt.units import as_bytes, duration_text, size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from distckpt.store.base import Store

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
    add("run_path", metavar="RUN", help="directory or URI of a run; it need not exist yet")
    add("--bytes", type=as_bytes, metavar="SIZE", help="of one checkpoint, all ranks together (else as the newest)")
    add("--keep", type=count, default=_AT_ONCE, metavar="N", help="checkpoints that are to fit (4)")
    add("--writers", type=count, default=1, metavar="N", help="nodes that write at once (1)")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    where, writers = located(given.run_path), max(1, given.writers)
    if isinstance(where, Path):
        checks = list(_writable(where, given.bytes, max(1, given.keep), writers))
    else:
        checks = list(_reachable(where, given.bytes, writers))
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
        yield _clock(store, store, "file system")
        yield _direct(probe)
        seconds = _timed(store)
        rate = _PROBE / seconds
        yield "rate", _OK, f"{size_text(_PROBE)} durable in {seconds:.2f} s: {size_text(int(rate))}/s from here"
        nbytes = nbytes or _newest(LocalStore(root))
        yield _room(home, nbytes, keep)
        yield from _save(nbytes, rate * writers)
    except DistckptError as e:
        yield "write", _FAIL, str(e)
    finally:
        with contextlib.suppress(DistckptError):  # what could not be written need not be removed
            for entry in store.list(""):
                store.delete(entry.name)
        with contextlib.suppress(OSError):
            probe.rmdir()


def _reachable(uri: str, nbytes: int | None, writers: int) -> Iterator[Check]:
    """Checks of a URI: each thing that a run does there, so that what the credentials do not allow is told by name."""
    store = open_store(f"{uri}/.distckpt-probe-{secrets.token_hex(4)}")
    rates: list[float] = []
    tries: list[tuple[str, Callable[[], Check]]] = [
        ("write", lambda: _written(store)),
        ("read", lambda: _read(store)),
        ("list", lambda: _listed(store)),
        ("create", lambda: _conditions(store)),
        *([("clock", lambda: _clock(store, store, "server"))] if isinstance(store, Dated) else []),
        ("rate", lambda: _rates(store, rates)),
        ("delete", lambda: _deleted(store)),
    ]
    for name, attempt in tries:
        try:
            yield attempt()
        except DistckptError as e:  # noqa: PERF203  what else is not allowed is wanted, too
            yield name, _FAIL, str(e)
            if name == "write":
                return
    if rates:
        yield from _save(nbytes or _newest(open_store(uri)), rates[0] * writers)


def _written(store: Store) -> Check:
    write_all(store, "written", b"1")
    return "write", _OK, "the credentials are taken"


def _read(store: Store) -> Check:
    if read_all(store, "written", limit=1) != b"1":
        raise StoreError(f"{store}: what was written is not what is read")
    return "read", _OK, "what was written is there at once"


def _listed(store: Store) -> Check:
    if "written" not in {entry.name for entry in store.list("")}:
        raise StoreError(f"{store}: what was written is not listed: a run could not be resumed")
    return "list", _OK, "and listed"


def _conditions(store: Store) -> Check:
    """What create() warns of is told: a server without conditions."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        store.create("created", b"1")
        try:
            store.create("created", b"2")
        except KeyExists:
            if told:
                return "create", _WARN, str(told[0].message).partition(": ")[2]
            return "create", _OK, "the server keeps If-None-Match, in a race too: of two commits one wins"
    return "create", _FAIL, "create-if-absent does not hold: two jobs could both commit"


def _rates(store: Store, rates: list[float]) -> Check:
    """Put and get so many bytes as a run does, several requests at once. rates: the first is told there."""
    rates.append(_PROBE / _timed(store))
    started = time.monotonic()
    with ThreadPoolExecutor(store.pace.in_flight) as pool:
        starts = range(0, _PROBE, _PIECE)
        list(pool.map(lambda start: store.read("rate", start, [memoryview(bytearray(_PIECE))]), starts))
    down = _PROBE / (time.monotonic() - started)
    return "rate", _OK, f"{size_text(int(rates[0]))}/s up, {size_text(int(down))}/s down, from here"


def _deleted(store: Store) -> Check:
    for entry in store.list(""):
        store.delete(entry.name)
    return "delete", _OK, "and removed again"


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


def _clock(store: Store, dates: Dated, whose: str) -> Check:
    before = time.time()
    write_all(store, "clock", b"1")
    changed = dates.changed("clock")
    off = max(before - changed, changed - time.time(), 0.0)
    if read_all(store, "clock", limit=1) != b"1":
        raise StoreError(f"{store}: what was written is not what is read")
    if off > _SKEW:
        return "clock", _WARN, f"the {whose}'s differs by {off:.1f} s from this node's: leases and gc go by it"
    return "clock", _OK, f"as the {whose}'s"


def _direct(probe: Path) -> Check:
    path = probe / "direct"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        direct = goes_direct(descriptor)
    except OSError as e:
        return "O_DIRECT", _WARN, f"cannot be tried: {e.strerror}"
    finally:
        os.close(descriptor)
    return "O_DIRECT", _OK, "past the page cache" if direct else "not here: writes go through the page cache"


def _timed(store: Store) -> float:
    """Seconds of a durable write, after one to warm up."""
    piece = memoryview(bytearray(os.urandom(_PIECE)))
    store.write("rate", [piece], size=_PIECE, stable=FOR_GOOD)
    started = time.monotonic()
    store.write("rate", [piece] * (_PROBE // _PIECE), size=_PROBE, stable=FOR_GOOD)
    return time.monotonic() - started


def _newest(store: Store) -> int | None:
    """Bytes of the run's newest checkpoint; None where there is none."""
    return next((c.candidate.nbytes for c in listed(History(store)) if c.candidate.nbytes), None)


def _room(home: Path, nbytes: int | None, keep: int) -> Check:
    """Room for so many checkpoints."""
    free = LocalStore(home).room()
    if free is None:
        return "room", _WARN, "the file system does not say how much is free"
    if nbytes is None:
        return "room", _WARN, f"{size_text(free)} free; --bytes says how much one checkpoint has"
    state = _OK if free >= keep * nbytes else _FAIL if free < 2 * nbytes else _WARN
    return (
        "room",
        state,
        f"{size_text(free)} free; {keep} checkpoints of {size_text(nbytes)} take {size_text(keep * nbytes)}",
    )


def _save(nbytes: int | None, rate: float) -> Iterator[Check]:
    """How long a checkpoint takes to write."""
    if nbytes is None:
        return
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
