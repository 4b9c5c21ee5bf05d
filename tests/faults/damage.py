"""Damage of every kind at every class of position of every file of a committed checkpoint: found and stepped back from.

    python -m tests.faults damage --seconds 300 --seed 1

Two ranks hold two steps. A case damages the newer: loading it must fail on both, naming the file (and the tensor, where
a block of one is hit), and a resume must take the older on both. Half of the cases are of a signed run.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path

import pytest

from distckpt import Checkpointer
from distckpt.errors import Corrupt, FormatError
from distckpt.format import datafile
from distckpt.format.checksum import BLOCK
from distckpt.format.layout import fqn_of
from distckpt.format.manifest import decode
from distckpt.signing import REQUIRE_SIGNATURE, SIGN_KEY
from distckpt.store.memory import MemoryStore
from tests import layouts
from tests.faults.sharded import Sharded, on_threads
from tests.faults.tally import Tally

TWO = 2
STEP = "step-00000002"


class Large(Sharded):
    """Data files of two blocks."""

    SHAPES = {"model.rows": (600, 600), "optim.rows.exp_avg": (600, 600), "model.same": (5, 3)}


class Whole:
    """A run of steps 1 and 2, and step 2 of another attempt with other values, in memory."""

    def __init__(self, kind=Large):
        self.kind, self.store = kind, MemoryStore()
        self._save(self.store, 0)
        again = MemoryStore()
        self._save(again, 5)
        self.other_attempt = again._data

    def _save(self, store, value):
        def work(comm):
            with Checkpointer(store, comm=comm, arena_bytes=4096, wait=True) as c:
                for step in (1, 2):
                    c.save(step, self.kind(comm.rank, TWO, value + step))

        assert on_threads(TWO, work) == [None, None]

    @property
    def files(self):
        """(what it is, key) of every file that the commit of step 2 stands for."""
        return {kind_of(entry.name): f"{STEP}/{entry.name}" for entry in self.store.list(STEP)}

    def damaged(self, changes):
        """The run with other bytes under some keys (None: without the key)."""
        store = MemoryStore()
        store._data = {k: v for k, v in (self.store._data | changes).items() if v is not None}
        return store

    def classes(self, kind):
        """Class of position -> [start, stop) of it, in a file of this kind."""
        data = self.store._data[key := self.files[kind]]
        if not kind.startswith("rank"):
            end = data.rindex(b',"digest"') if b',"digest"' in data else len(data)
            return {"text": (0, end), "digest": (end, len(data))} if end < len(data) else {"text": (0, end)}
        info = next(f for f in decode(self.store._data[f"{STEP}/commit.json"], None).files if key.endswith(f.name))
        chunks = datafile.decode_header(data[: info.header], info.size)
        used = len(data[: info.header].rstrip())
        found = {"header's length": (0, 8), "header": (8, used), "padding": (used, info.header)}
        found |= {fqn_of(name): (c.start, c.stop) for name, c in chunks.items()}
        return {**found, "block's end": (BLOCK - 1, BLOCK + 1), "last byte": (len(data) - 1, len(data))}


def kind_of(name):
    return name if name == "commit.json" else name.split(".")[0]


def each_rank(store, work):
    with layouts.quiet():
        return on_threads(TWO, lambda comm: work(Checkpointer(store, comm=comm, timeout=5, wait=True), comm.rank))


def problem(whole, changes, *told):
    """What is wrong with how damage is met; None if each rank says all of `told`, and goes back to step 1."""
    store = whole.damaged(changes)

    def load(checkpointer, rank):
        checkpointer.load(whole.kind(rank, TWO), step=2)

    def resume(checkpointer, rank):
        state = whole.kind(rank, TWO)
        report = checkpointer.resume(state)
        return state.is_at(1), report.step, report.fell_back_from

    for error in each_rank(store, load):
        if not isinstance(error, (Corrupt, FormatError)):
            return f"NOT FOUND by a load: {error!r}"
        if not all(word in str(error) for word in told):
            return f"{told} not told: {error}"
    first, *others = each_rank(store, resume)
    if any(first != other for other in others):
        return f"ranks went on from different steps: {first} {others}"
    if isinstance(first, Exception):
        return f"no resume: {first!r}"
    is_whole, step, fell_back = first
    if (is_whole, step, list(fell_back)) != (True, 1, [2]) or not all(word in fell_back[2] for word in told):
        return f"resumed {first}"
    return None


def _flip(data, start, stop, draw):
    at = draw.randrange(start, stop)
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def _other(data, start, stop, draw):
    at, count = draw.randrange(start, stop), draw.choice((1, 2, 4, 64, 4096))
    made = data[:at] + draw.randbytes(len(data[at : min(at + count, stop)])) + data[min(at + count, stop) :]
    return made if made != data else None


def _zero(data, start, stop, draw):
    at = draw.randrange(start, stop)
    made = data[:at] + bytes(stop - at) + data[stop:]
    return made if made != data else None


def _cut(data, start, stop, draw):
    return data[: draw.randrange(start, stop)]


def _leave_out(data, start, stop, draw):
    at = draw.randrange(start, stop)
    return data[:at] + data[at + draw.randrange(1, 64) :]


def _put_in(data, start, stop, draw):
    at = draw.randrange(start, stop)
    return data[:at] + draw.randbytes(draw.randrange(1, 64)) + data[at:]


IN_PLACE = {"a flipped bit": _flip, "other bytes": _other, "zeros": _zero}
"""Damage that leaves a file as long as it is: that of a block of a tensor is told with its fqn."""
CHANGES = IN_PLACE | {"cut": _cut, "bytes left out": _leave_out, "bytes put in": _put_in}


def _exchanged(whole, kind, how, draw):
    """Another file in the place of this one: (changes, what must be told)."""
    files, data = whole.files, whole.store._data
    key = files[kind]
    match how:
        case "gone" if kind != "commit.json":
            return {key: None}
        case "of step 1":
            return {key: next(v for k, v in data.items() if k.startswith("step-00000001/") and kind_of(k[14:]) == kind)}
        case "of another attempt" if kind != "commit.json":
            other = whole.other_attempt
            return {key: next(v for k, v in other.items() if k.startswith(STEP) and kind_of(k[14:]) == kind)}
        case "swapped":
            second = files[draw.choice(sorted(files.keys() - {kind}))]
            return {key: data[second], second: data[key]}
        case "of another attempt":  # a stale commit: files that it names are not there
            return {key: whole.other_attempt[f"{STEP}/commit.json"]}
    return None


def campaign(seed, seconds, most=1 << 62):
    """Damage, load and resume, until the time is up or so many cases are done."""
    from tests.run.test_signing import key_pair

    draw, tally, until = random.Random(seed), Tally(), time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        private, public = key_pair(Path(folder), "key")
        runs = {False: Whole()}
        patch.setenv(SIGN_KEY, private)
        runs[True] = Whole()
        patch.delenv(SIGN_KEY)
        while time.monotonic() < until and tally.cases < most:
            signed = draw.random() < 0.5
            for name, value in ((SIGN_KEY, private), (REQUIRE_SIGNATURE, public)):
                os.environ.pop(name, None) if not signed else os.environ.update({name: value})
            _case(runs[signed], draw, tally, f"case {tally.cases} of seed {seed}")
        os.environ.pop(SIGN_KEY, None)
        os.environ.pop(REQUIRE_SIGNATURE, None)
    return tally


def _case(whole, draw, tally, name):
    kind = draw.choice(sorted(whole.files))
    key = whole.files[kind]
    if draw.random() < 0.15:
        how = draw.choice(("gone", "of step 1", "of another attempt", "swapped"))
        what, changes, told = f"{kind}: {how}", _exchanged(whole, kind, how, draw), [f"{STEP}/"]
    else:
        place, (start, stop) = draw.choice(sorted(whole.classes(kind).items()))
        how = draw.choice(sorted(CHANGES))
        data = CHANGES[how](whole.store._data[key], start, stop, draw)
        what, changes, told = f"{kind}, {place}: {how}", data and {key: data}, [key]
        if how in IN_PLACE and "." in place and kind.startswith("rank"):
            told.append(place)
    if changes:
        found = problem(whole, changes, *told)
        tally.add(what.replace("rank-00000", "rank").replace("rank-00001", "rank"), "PROBLEM" if found else "found",
                  found and f"{name}: {what}: {found}")  # fmt: skip
