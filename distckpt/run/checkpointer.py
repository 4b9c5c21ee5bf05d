"""Checkpointer: a run's directory, as training code sees it: resume, step, save, load."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from operator import index
from typing import TYPE_CHECKING, Any, Literal, overload

from distckpt import __version__, signing
from distckpt import comm as comms
from distckpt.errors import (
    DistckptError,
    NotACheckpoint,
    RunConflict,
    StateWarning,
    Unsupported,
    failure_text,
)
from distckpt.garbage import uncollected
from distckpt.loading.plan import Options
from distckpt.run.after import checked
from distckpt.run.choose import Search, load_newest, loaded_whole
from distckpt.run.events import note
from distckpt.run.held import held
from distckpt.run.history import History
from distckpt.run.job import Job
from distckpt.run.places import Local, Places
from distckpt.run.preemption import Preemption, Watch
from distckpt.run.probe import Probing
from distckpt.run.publish import Retention, Then, now
from distckpt.run.save import plain_metrics
from distckpt.run.saver import Saver
from distckpt.run.schedule import Due, Schedule, StepReport
from distckpt.run.source import foreign_root, load_source
from distckpt.run.triggers import Triggers, best_interval, duration
from distckpt.saving.save import Request
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping
    from types import TracebackType

    from typing_extensions import Self

    from distckpt.comm import Comm
    from distckpt.loading.report import LoadReport
    from distckpt.run.after import After
    from distckpt.run.keep import Keep
    from distckpt.run.pending import PendingSave
    from distckpt.run.probe import Probe
    from distckpt.run.save import SaveReport
    from distckpt.run.trainstate import TrainState
    from distckpt.run.triggers import Trigger
    from distckpt.state import State
    from distckpt.store.base import Store


class Checkpointer:
    """Saves and resumes one run. Every method is collective: all ranks call it, at the same point.

    root: the run's directory, or a URI (`s3://bucket/run`, docs/object-stores.md), or a Store. every: when `step`
    saves: a number of steps (those that it divides), "20 min", "1 epoch", a function of step and epoch (the same on
    every rank), or several of these; None: only when told. preemption: take over the signals by which jobs are stopped,
    so that `step` can save and say so. wait: what `save` does by default. when_busy: what a save does that comes while
    two others are still being written: "wait" for one of them, or "skip" itself. arena_bytes: most host memory that one
    save may be staged in on this rank; a larger one is written by the call itself (None: no limit). keep: what stays
    (None: everything); the rest is removed after each commit, off the training path. local: a directory in front of
    root (or a Local): saves commit there, and are replicated to root in the background; root's `keep` is for root,
    Local has one of its own. after_commit: commands that run on what was committed, off the training path:
    `After(("python", "evaluate.py", "{checkpoint}"))`, `Export(...)`, `TrialLoad()` (run/after.py). hold: how long ("2
    min") this rank's writer holds in memory what it staged last if this process is killed, so that a job which is
    started again on this machine reads it from there. probe: a function that gives a number, such as the loss on a
    fixed batch (or a Probe, run/probe.py): recorded with each save, asked again after each load, and warned of where it
    has become another. timeout: seconds that any wait for others lasts at most. What happens is noted in the run's
    events.jsonl (docs/events.md).
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Store,
        *,
        every: Trigger | tuple[Trigger, ...] | None = None,
        preemption: Preemption | bool = False,
        wait: bool = False,
        when_busy: Literal["wait", "skip"] = "wait",
        arena_bytes: int | None = None,
        keep: Keep | None = None,
        local: Local | str | os.PathLike[str] | None = None,
        after_commit: Iterable[After] = (),
        hold: str | float | None = None,
        probe: Probe | Callable[[], Any] | None = None,
        timeout: float = 600.0,
        comm: Comm | None = None,
    ) -> None:
        signing.look()
        triggers = Triggers.of(every)
        self._places = Places(root, local, keep)
        self._store = self._places.near
        self._comm, self._given = comm or comms.default(timeout), comm is not None
        self._history = History(self._store)
        self._whole = History(self._places.whole) if local is not None else self._history
        self._keep = self._places.keep
        self._hold = duration(hold, "hold") if hold else 0.0
        self._then = Then(Retention(self._keep) if self._keep else None, checked(after_commit))
        if (hold or self._then.after) and not isinstance(self._store, LocalStore):
            raise Unsupported(f"hold= and after_commit= need a directory, which {self._store} is not: give local=, too")
        self._saver = Saver(self._comm, self._places, when_busy=when_busy, arena_bytes=arena_bytes, hold=self._hold)
        looks = self._store.root if isinstance(self._store, LocalStore) and self._comm.rank == 0 else None
        self._watch = Watch(preemption if isinstance(preemption, Preemption) else Preemption(), looks)
        self._schedule = Schedule(self._comm, triggers, self._watch if preemption else None)
        if preemption:
            self._watch.start()
        self._job = Job(self._comm, self._history, self._places)
        self._probing = Probing(self._comm, probe)
        self._wait, self._prepared, self._closed = wait, False, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(failed=error is not None)

    def close(self) -> None:
        """Wait for saves in flight, then give back processes, memory, and the process group.

        Collective where a save is in flight: raises on every rank if one has failed.
        """
        self._close(failed=False)

    def _close(self, *, failed: bool) -> None:
        if self._closed:
            return
        self._closed = True
        self._watch.close()
        try:
            self._saver.close(failed=failed)
        finally:
            if self._job.launch is not None:
                self._note("closed", failed=failed or None)
            self._job.close()
            self._comm.close()

    # -- save --------------------------------------------------------------------------------------------------------

    def step(self, step: int, state: TrainState, metrics: Mapping[str, Any] | None = None) -> StepReport:
        """Save if a save is due at this step. Called after each optimizer step; `step` counts those done.

        Where the job is to stop, the save is waited for, and the report says so: leave the loop then.
        """
        due = self._schedule.look(step, lambda: state.epoch, self._saver)
        if due.reason:
            self._note("stopping", step=step, reason=due.reason.name.lower(), exit_code=due.reason.exit_code)
            return self._stop(step, state, metrics, due)
        if not due.save:
            self._prepare(state)
            return StepReport()
        return StepReport(self.save(step, state, metrics))

    def _stop(self, step: int, state: TrainState, metrics: Mapping[str, Any] | None, due: Due) -> StepReport:
        if not due.fits:
            why = (
                f"step {step} is not saved: {due.seconds_left:.0f} s are left, and a save takes "
                f"{due.save_seconds:.0f}; the last checkpoint stands"
            )
            warnings.warn(why, StateWarning, stacklevel=3)
            self._note("skipped", step=step, why=why)
            return StepReport(None, due.reason, why)
        self._saver.when_busy = "wait"  # for there is no next one
        self._probing.hurry(due.seconds_left - 2 * due.save_seconds)
        try:
            saved = self.save(step, state, metrics, wait=False)
        except DistckptError as e:  # of an earlier save, as likely as not: that must not cost the last one
            warnings.warn(f"tried again, for it is the last chance: {e}", StateWarning, stacklevel=3)
            saved = self.save(step, state, metrics, wait=False)
        self._saver.finish()
        return StepReport(saved, due.reason)

    def suggested_interval(self, between_failures: str | float) -> float:
        """Seconds between saves that lose least, given the mean time between failures ("24 h"). Not collective.

        From what saves have cost training so far; 0.0 before the first.
        """
        return best_interval(self._saver.blocked, duration(between_failures, "between_failures"))

    @overload
    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: Literal[True],
        check_replicas: bool = False,
    ) -> SaveReport: ...
    @overload
    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: bool | None = None,
        check_replicas: bool = False,
    ) -> PendingSave | SaveReport | None: ...
    def save(
        self,
        step: int,
        state: TrainState,
        metrics: Mapping[str, Any] | None = None,
        *,
        wait: bool | None = None,
        check_replicas: bool = False,
    ) -> PendingSave | SaveReport | None:
        """Save. By default return once the state is staged, and may change: the writer process does the rest.

        wait: return only when the checkpoint is committed and durable, with a SaveReport. None: what this Checkpointer
        was told. metrics: numbers to record with it (a NumPy scalar or a tensor of one element counts as one).
        check_replicas: compare what should be equal on several ranks, too. Returns None for a save that was skipped,
        with a StateWarning. A store in memory is always waited for.
        Raises on every rank what fails on any, with rank and cause: of this save, or of an earlier one that was not
        waited for. The previous checkpoint is untouched then.
        """
        self._check(state)
        if isinstance(step, bool) or not hasattr(step, "__index__") or not 0 <= (number := index(step)) < 1 << 63:
            raise ValueError(f"step={step!r}: a count of optimizer steps, an int of at least 0")
        with uncollected():
            wait = self._wait if wait is None else wait
            metrics = self._probing.recorded(state, metrics or {})
            return self._save(number, state, metrics, wait=wait, check_replicas=check_replicas)

    def _save(
        self, step: int, state: TrainState, metrics: Mapping[str, Any], *, wait: bool, check_replicas: bool
    ) -> PendingSave | SaveReport | None:
        launch = self._job.launch if self._job.launch is not None else self._job.open_without_resume()
        recorded, asked = dict[str, Any](), list[str]()

        def capture() -> State:
            recorded.update(plain_metrics(metrics))  # here, so that every rank learns if one rank's cannot be
            if self._keep and self._comm.rank == 0:
                asked[:] = filter(None, [self._keep.asked(step, recorded)])
            return state.capture()

        request = Request(
            step=step,
            launch=launch,
            date=now(),
            metrics=recorded,
            writer={"distckpt": __version__},
            generation=lambda: self._generation(step),
            check_replicas=check_replicas,
            keep=asked,
        )
        self._schedule.saved()
        try:
            made = self._saver.save(self._history, capture, request, self._then, wait=wait)
        except Exception as e:
            self._note("failed", step=step, error=failure_text(e))
            raise
        if made is None:
            self._note("skipped", step=step, why="earlier saves are still being written")
        else:
            said = {name: getattr(state, name, None) for name in ("epoch", "samples")}
            self._note("staged", step=step, stall=round(self._saver.blocked, 4), waited=wait or None, **said)
        return made

    def _note(self, event: str, **what: Any) -> None:
        if self._comm.rank == 0:
            note(self._store, event, launch=self._job.launch, **what)

    def _prepare(self, state: TrainState) -> None:
        if self._store.address and not (self._wait or self._prepared or state.unusable):
            with uncollected():
                self._saver.prepare(state.capture)
        self._prepared = True

    def _generation(self, step: int) -> int:
        """Generation of a step about to be saved. Asked on rank 0."""
        return self._saver.next_generation(self._store, step, self._job.free_generation(step))

    def _check(self, state: Any) -> None:
        if self._closed:
            raise ValueError("this Checkpointer was closed (its `with` block has ended): make another")
        if not (hasattr(state, "capture") and hasattr(state, "unusable")):
            raise Unsupported(f"state is a {type(state).__qualname__}; a TrainState is expected: TrainState(model=...)")
        ranks = comms.current().world_size
        if not self._given and ranks != self._comm.world_size:
            raise RunConflict(
                f"this Checkpointer was made for {self._comm.world_size} rank(s), torch.distributed has {ranks} now: "
                "call init_process_group() first, then make the Checkpointer"
            )

    # -- load --------------------------------------------------------------------------------------------------------

    def resume(
        self,
        state: TrainState,
        *,
        step: int | None = None,
        strict: bool = True,
        only: tuple[str, ...] | None = None,
        cast: bool = False,
        rename: Callable[[str], str] | None = None,
        per_rank: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
        verify: bool = False,
    ) -> LoadReport | None:
        """Load the newest valid checkpoint and begin a new launch; None where there is nothing yet.

        A damaged checkpoint makes every rank fall back to the same previous one; the report says so. `step` asks for
        that step and leaves later ones behind for good. A directory that another tool saved in (DCP, safetensors), with
        no checkpoint of ours yet, is resumed from what that tool saved. Options as in `load`. RunConflict while another
        job trains on this run.
        """
        self._check(state)
        self._saver.finish()
        options = Options(
            strict=strict, only=only, cast=cast, rename=rename, per_rank=dict(per_rank or {}), verify=verify
        )
        notes = self._job.settle()
        self._saver.replicate()  # others may need what lies here alone
        search = Search(self._comm, self._whole, step)
        with held(self._store) if self._hold and isinstance(self._store, LocalStore) else nullcontext(0) as files:
            report, found = load_newest(search, state, options, then=self._job.open) or (None, None)
        whole = report and loaded_whole(report, options) and not rename
        self._saver.resumed(state.capture, found if whole else None)
        if report and files:
            report.notes.append(f"{files} data file(s) of this machine were held in memory")
        if report is None:
            if root := foreign_root(self._comm, self._store):
                report = load_source(self._comm, root, state, options, names=names)
            self._job.open(None)
        self._saver.replicate()  # what is left to send is for this launch, now that it is open
        if report:
            said = {"seconds": round(report.seconds, 3), "bytes": report.bytes_read}
            self._note("resumed", step=report.step, **said, fell_back_from=report.fell_back_from or None)
            self._prepare(state)
        self._schedule.resumed(getattr(state, "epoch", None))
        if report:
            report.notes += filter(None, [notes, *self._places.notes()])
            self._probing.compare(state, report, only, self._note)
        return report

    def load(
        self,
        state: TrainState,
        *,
        source: str | os.PathLike[str] | None = None,
        step: int | None = None,
        strict: bool = True,
        only: tuple[str, ...] | None = None,
        cast: bool = False,
        rename: Callable[[str], str] | None = None,
        per_rank: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
        verify: bool = False,
    ) -> LoadReport:
        """Load the newest valid checkpoint, or that of `step`, and leave the run alone: for evaluation and export.

        source: load from there instead: another run, one of its step directories, a DCP directory, a torch.save file,
        safetensors (docs/foreign.md). strict: whether missing and unexpected names are errors. only: leads of the names
        to load (`("model",)` reads no optimizer bytes). cast: narrow dtypes, too. rename: live name of a saved fqn.
        per_rank: {"name": "first"} gives every rank rank 0's per-rank object at another world size. names: entry of
        another tool's state dict -> what it is here (`{"ema.model": "model"}`). verify: first check the records of
        another tool's files against their CRC-32.
        NotACheckpoint where there is none.
        """
        self._check(state)
        self._saver.finish()
        options = Options(
            strict=strict, only=only, cast=cast, rename=rename, per_rank=dict(per_rank or {}), verify=verify
        )
        if source is not None:
            return load_source(self._comm, source, state, options, step=step, names=names)
        loaded = load_newest(Search(self._comm, self._whole, step), state, options)
        if loaded is None:
            raise NotACheckpoint(f"{self._whole.store} holds no committed checkpoint: {self._whole.why_nothing()}")
        self._probing.compare(state, loaded[0], only)
        return loaded[0]

    def steps(self) -> list[int]:
        """Steps of the checkpoints that count and can be opened, ascending. Not collective."""
        return sorted({c.directory.step for c in self._whole.valid()})
