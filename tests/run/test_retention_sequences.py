"""Any sequence of saves, failures, crashes, rewinds and readers: what the rules and P6 protect is never removed.

The store itself is the oracle: it looks at the run at the moment of every deletion.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import Checkpointer, Keep
from distckpt.errors import DistckptError, StateWarning
from distckpt.format import manifest
from distckpt.format.layout import COMMIT, StepDir
from distckpt.run.history import History
from distckpt.run.lease import lease, leased
from distckpt.run.publish import Retention, retain
from distckpt.run.retention import listed
from distckpt.run.sweep import leftovers, sweep
from distckpt.store.memory import MemoryStore
from tests.faults.failpoints import FaultyStore, Fuse
from tests.faults.sharded import Sharded


class Crash(BaseException):
    """The process ends here: no `except` of the code may go on."""


def crash(point):
    raise Crash(point)


class Guarded(MemoryStore):
    """A store that looks at the run whenever something is deleted from it."""

    def delete(self, key):
        directory = StepDir.parse(key.partition("/")[0])
        if directory:
            self.look(directory, key)
        super().delete(key)

    def look(self, directory, key):
        history = History(self)
        found = listed(history)
        counting = [c.directory for c in found if c.candidate.state == "committed"]
        others = [c for c in found if c.directory != directory]
        if key.endswith(COMMIT):
            assert directory not in counting[:2], f"{key} is one of the two newest"
            assert directory not in leased(self), f"{key} is being read"
            counted = [c for c in others if c.candidate.state == "committed"]
            assert not any(directory in c.candidate.refers_to for c in counted), f"{key} is referred to"
            assert not (directory in counting and any(c.candidate.asked for c in found if c.directory == directory))
        else:
            named = {f if "/" in f else f"{c.directory}/{f}" for c in found for f in names(c)}
            assert key not in named, f"{key} is named by a commit"

    def share(self):
        """Make the newest checkpoint use a file of the one before its predecessor, as frozen weights would be."""
        valid = list(History(self).valid())
        if len(valid) < 3:
            return
        new, old = valid[0], valid[2]
        file = old.manifest.files[0]._replace(name=f"{old.directory}/{old.manifest.files[0].name}")
        if "/" not in old.manifest.files[0].name:
            whole = replace(new.manifest, files=(*new.manifest.files, file))
            self._data[f"{new.directory}/{COMMIT}"] = manifest.encode(whole)


def names(listed_one):
    found = listed_one.found.checkpoint
    return (
        [*(f.name for f in found.manifest.files), *(o.name for o in found.manifest.objects.values())] if found else []
    )


class Run:
    """A run as its jobs see it, one after another."""

    def __init__(self, keep):
        self.keep, self.store, self.fuse = keep, Guarded(), Fuse(crash)
        self.leases, self.steps, self.values = contextlib.ExitStack(), 0, 0
        self.job = None
        self.begin()

    def end(self):
        """The process is gone, and its heart with it; nothing else of it is told."""
        if self.job:
            self.job._job._heartbeat._stop.set()

    def begin(self, step=None):
        """A new process: it resumes."""
        self.end()
        self.fuse.disarm()
        self.live = Sharded(0, 1, 0)
        self.job = Checkpointer(FaultyStore(self.store, self.fuse), keep=self.keep, wait=True, timeout=0.2)
        history = History(self.store)
        report = self.job.resume(self.live, step=step)
        valid = list(history.valid())
        assert (report is None) == (not valid)
        if report:
            self.steps = report.step
            metrics = next(c for c in valid if c.directory.step == report.step).manifest.metrics
            assert self.live.is_at(metrics["value"])
            assert report.step == (valid[0].directory.step if step is None else step)

    def save(self, ahead, loss):
        self.values += 1
        self.steps += ahead
        self.live.set(self.values)
        self.job.save(self.steps, self.live, {"value": self.values, "loss": loss})

    def fails(self, at, *, ends, ahead, loss):
        """The n-th thing asked of the store fails: the process ends there, or only that call does."""
        self.fuse = self.job._store._fuse = Fuse(crash) if ends else Fuse()
        self.fuse.arm(at, forever=ends)
        with contextlib.suppress(Crash, DistckptError):
            self.save(ahead, loss)
        self.fuse.disarm()
        if ends:
            self.begin()

    def rewind(self, back):
        if valid := list(History(self.store).valid()):
            self.begin(step=valid[min(back, len(valid) - 1)].directory.step)

    def lease(self, which):
        if valid := list(History(self.store).valid()):
            self.leases.enter_context(lease(self.store, valid[min(which, len(valid) - 1)].directory))

    def look_after(self, at):
        """Somebody prunes and clears up from outside, and ends at the n-th thing asked of the store."""
        fuse = Fuse(crash)
        fuse.arm(at, forever=True)
        history = History(FaultyStore(self.store, fuse))
        with contextlib.suppress(Crash):
            if next(history.committed(), None):
                retain(history, Retention(Keep(last=1)))
            sweep(history, leftovers(history))


NUMBER = st.integers(1, 45)
OPERATIONS = st.one_of(
    st.tuples(st.just("save"), st.integers(1, 3), st.integers(0, 9)),
    st.tuples(st.just("save"), st.integers(1, 3), st.integers(0, 9)),
    st.tuples(st.just("crash"), NUMBER, st.integers(0, 9)),
    st.tuples(st.just("fail"), NUMBER, st.integers(0, 9)),
    st.tuples(st.just("rewind"), st.integers(0, 3)),
    st.tuples(st.just("restart")),
    st.tuples(st.just("lease"), st.integers(0, 4)),
    st.tuples(st.just("release")),
    st.tuples(st.just("share")),
    st.tuples(st.just("look after"), NUMBER),
)
RULES = st.sampled_from(
    [
        Keep(last=1),
        Keep(last=2, best=("loss", "min", 1)),
        Keep(every_steps=4),
        Keep(bytes=1),
        Keep(last=1, fn=lambda step, _: "odd" if step % 5 == 0 else None),
    ]
)


@settings(max_examples=40)
@given(RULES, st.lists(OPERATIONS, min_size=3, max_size=14))
def test_no_sequence_removes_what_is_protected_and_every_resume_works(keep, operations):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StateWarning)
        run = Run(keep)
        for operation in operations:
            match operation:
                case ("save", ahead, loss):
                    run.save(ahead, loss)
                case ("crash" | "fail" as kind, at, loss):
                    run.fails(at, ends=kind == "crash", ahead=1, loss=loss)
                case ("rewind", back):
                    run.rewind(back)
                case ("restart",):
                    run.begin()
                case ("lease", which):
                    run.lease(which)
                case ("release",):
                    run.leases.close()
                case ("share",):
                    run.store.share()
                    run.job._history._opened.clear()  # it may rely on commits not changing
                case ("look after", at):
                    run.look_after(at)
        run.leases.close()
        run.begin()
        run.save(1, 0)
        assert run.job.steps()[-1] == run.steps
        run.end()


def test_the_oracle_sees_a_deletion_that_must_not_be():
    """A retention that keeps one only would be caught."""
    run = Run(Keep(last=1))
    for _ in range(2):
        run.save(1, 0)
    for directory in (StepDir(1), StepDir(2)):
        with contextlib.suppress(AssertionError):
            run.store.delete(f"{directory}/{COMMIT}")
            raise SystemError("it was not seen")
    assert run.job.steps() == [1, 2]
    run.end()
