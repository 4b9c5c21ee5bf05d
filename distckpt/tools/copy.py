"""Copy a checkpoint from any format that is read into any that is written: import, export, reshard, backup.

Streaming and verified: every byte that has a checksum is checked on the way, and nothing is under the destination
before all of it is. Offline: no process group; several processes or nodes share the files out by a plan that each makes
for itself.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from distckpt import __version__
from distckpt.errors import Corrupt, RankFailed, StateWarning, StoreError, Unsupported
from distckpt.foreign.files import PlainFile
from distckpt.format import manifest
from distckpt.format.checksum import digest
from distckpt.loading.stream import ROOM
from distckpt.run.lease import lease
from distckpt.run.source import open_source
from distckpt.signing import algorithm
from distckpt.store.open import located
from distckpt.tools.formats import FORMATS, DeepSpeed, Distckpt, Format, Safetensors, Torch, is_taken, refuse_taken
from distckpt.tools.in_place import InPlace
from distckpt.tools.transfer import Staging, Worker, collect, outputs_of, write_share
from distckpt.tools.view import Change, View

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store
    from distckpt.tools.lora import Lora

_LEAST_ROOM, _MOST_ROOM = 1 << 20, 64 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to read: of a run (its newest, or that of `step`), a step directory, or another tool's.

    step: of another tool's, what it is called. names: as in Checkpointer.load. order: names of the optimizer's
    parameters by group, for a source that has them by position. lora: of its model a LoRA adapter alone, or merged.
    """

    path: str
    step: int | None = None
    names: tuple[tuple[str, str], ...] = ()
    order: tuple[tuple[str, ...], ...] | None = None
    lora: Lora | None = None

    def open(self) -> Checkpoint:
        """Open it. NotACheckpoint."""
        found = open_source(self.path, step=self.step, names=dict(self.names) or None, order=self.order)
        return self.lora.of(found) if self.lora else found


@dataclass(slots=True)
class CopyReport:
    """What a copy did, or (dry run) would do. nbytes: of the tensors; files: key -> bytes; seconds: wall time.

    bytes_read: by this process. bytes_written: of its share, by an interrupted try before, too. notes: what has no
    place in the destination.
    """

    destination: str
    nbytes: int
    files: dict[str, int]
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked for, as another process can be told it."""

    source: Source
    destination: str
    to: Format
    change: Change
    room: int


def copy(
    source: str | os.PathLike[str] | Source,
    destination: str | os.PathLike[str],
    to: str | Format = "distckpt",
    *,
    change: Change = Change(),  # noqa: B008  it is frozen
    verify: bool = False,
    memory: int | None = None,
    worker: Worker = Worker(),  # noqa: B008  as well
    dry_run: bool = False,
    tell: Callable[[int], None] = lambda _: None,
) -> CopyReport:
    """Copy a checkpoint, as another format or the same.

    destination: a path; of a run, a URI too. to: "distckpt" (the destination is a run), "dcp" (a directory),
    "safetensors", "hf" (a file `*.safetensors`, or a directory as Hugging Face has it), "torch" (a file); or a value
    of tools/formats.py, such as `DeepSpeed(stage=3, ranks=16)`, which puts a tag into the destination. change: what is
    left out, renamed, cast, divided otherwise. verify: check another tool's records against their CRC-32 first, and
    read the result back. memory: bytes that buffers take at most. worker: this process's share of a copy that several
    do, who share the destination; the first finishes it. dry_run: only plan. tell: called with the bytes of each file
    written. What cannot be carried is warned of, and noted.
    """
    room = ROOM if memory is None else max(_LEAST_ROOM, min(_MOST_ROOM, memory // worker.processes // 8))
    origin = source if isinstance(source, Source) else Source(str(source))
    request = _Request(origin, str(destination), format_of(to), change, room)
    started = time.monotonic()
    plan = _Plan(request)
    sizes = {o.name: o.size for o in plan.sink.outputs}
    report = CopyReport(plan.where, plan.view.nbytes, sizes, notes=[*plan.view.notes, *plan.sink.notes])
    shares = worker.divided()
    report.bytes_written = sum(o.size for share in shares for o in outputs_of(plan.sink, share))
    if dry_run:
        if not worker.index:
            refuse_taken(plan.sink, plan.destination)
        return report
    if worker.index:
        # where the others have made it whole meanwhile, nothing is left to do; where not, the first one says why
        if not is_taken(plan.sink, plan.destination):
            plan.write(request, shares, tell, verify=verify)
    else:
        with plan.staging.held(), plan.leased():
            refuse_taken(plan.sink, plan.destination)
            for note in report.notes:
                warnings.warn(note, StateWarning, stacklevel=2)
            plan.write(request, shares, tell, verify=verify)
            plan.finish(collect(plan.sink, plan.staging, worker), verify=verify)
    report.bytes_read, report.seconds = plan.view.bytes_read, time.monotonic() - started
    return report


def format_of(to: str | Format) -> Format:
    """Format called `to`. ValueError."""
    if not isinstance(to, str):
        return to
    if to not in FORMATS:
        raise ValueError(f"to={to!r}: one of {', '.join(FORMATS)}")
    return FORMATS[to]()


class _Plan:
    """A request, planned: the same in every process that plans it."""

    def __init__(self, request: _Request) -> None:
        self._to, change = request.to, request.change
        self.destination = _resolved(request.destination)
        if not isinstance(self.destination, Path) and not isinstance(request.to, Distckpt):
            raise Unsupported(
                f"{self.destination}: only distckpt's own format is written to a URI, not {type(request.to).__name__}: "
                "give a directory, and upload what is there then"
            )
        if isinstance(request.to, DeepSpeed) and (change.dtype or change.files):
            raise ValueError("a tag's dtype and number of ranks are DeepSpeed(dtype=, ranks=), not a Change's")
        if isinstance(request.to, (Safetensors, Torch)) and change.files:
            raise ValueError(f"{change.files} files: {type(request.to).__name__} is not divided by a number of files")
        checkpoint = request.source.open()
        change = replace(change, step=request.source.step if checkpoint.foreign else None)
        self.view = View(checkpoint, change, request.source.order or ())
        told = [__version__, manifest.to_json(self.view.manifest), asdict(change), repr(request.to)]
        told += [repr(request.source.lora), algorithm().name]
        identity = [
            str(located(request.source.path)),
            str(self.destination),
            *map(repr, _files_of(self.view)),
        ]
        self.attempt = digest(json.dumps([told, identity], sort_keys=True, default=str).encode())[:12]
        self.sink = request.to.sink(self.view, self.destination, self.attempt, request.room)
        self.staging: Staging | InPlace = (
            Staging(self.sink, self.destination, self.attempt)
            if isinstance(self.destination, Path)
            else InPlace(self.sink, self.destination, self.attempt)
        )

    @property
    def where(self) -> str:
        """What the copy is called in the end."""
        return f"{self.destination}/{self.sink.top}" if self.sink.kind == "inside" else str(self.destination)

    def leased(self) -> contextlib.AbstractContextManager[object]:
        """Keep retention from the source, if that is a run's, while the block reads it."""
        base = self.view.base
        return contextlib.nullcontext() if base.foreign else lease(cast("Store", base.store), base.directory)

    def write(self, request: _Request, shares: list[Worker], tell: Callable[[int], None], *, verify: bool) -> None:
        """Write these shares: by processes of their own, if there are several. Corrupt if the source has changed."""
        if verify:
            self.view.verify_all()
        if len(shares) == 1:
            write_share(self.sink, self.staging, shares[0], tell)
        else:
            _in_processes(request, shares, self, tell)
        self.refuse_changed()

    def refuse_changed(self) -> None:
        """Corrupt if another tool's file is no longer what it was when it was opened: what was read is a mix then."""
        for name, *was in _files_of(self.view):
            now = PlainFile(Path(name))
            if was != [now.size, now.changed]:
                raise Corrupt(f"{name}: was changed while it was being copied: start again once nobody writes it")

    def finish(self, results: Mapping[str, Any], *, verify: bool) -> None:
        """Write what makes the copy whole, check it, and put it where it is to be."""
        try:
            self._check(self.staging.complete(self.sink.finish(results)), verify=verify)
        except Corrupt:
            self.staging.forget()
            raise
        refuse_taken(self.sink, self.destination)
        self.staging.publish()

    def _check(self, copied: Checkpoint, *, verify: bool) -> None:
        """Corrupt unless what was written opens, and has the tensors that it should."""
        for index in range(len(copied.manifest.files)):
            copied.data_file(index)
        lacking = [
            fqn
            for fqn, info in self.view.manifest.tensors.items()
            if fqn.startswith("model.") and not fqn.startswith("model.extra_state.")
            if (found := copied.manifest.tensors.get(copied.manifest.aliases.get(fqn, fqn))) is None
            or (found.shape, found.dtype) != (info.shape, self.sink.dtypes.get(fqn, info.dtype))
        ]
        if lacking:
            raise Corrupt(f"{copied.name}: was written without {lacking[:5]}; it was not put at {self.where}")
        if verify:
            again = View(copied, Change())
            if not isinstance(self._to, Safetensors):
                again.verify_all()
            again.read_all()


def _resolved(destination: str) -> str | Path:
    """URI, or path that nothing on the way to is a symlink. Unsupported, StoreError."""
    place = located(destination)
    try:
        return place.resolve() if isinstance(place, Path) else place
    except (OSError, RuntimeError) as e:
        raise StoreError(f"cannot follow {destination}: {e}") from e


def _files_of(view: View) -> list[tuple[str, int, int]]:
    """What tells whether another tool's files are still those that a copy began with."""
    return [(f.name, f.size, f.changed) for f in view.sources if isinstance(f, PlainFile)]


def _in_processes(request: _Request, shares: list[Worker], plan: _Plan, tell: Callable[[int], None]) -> None:
    """Write the shares of several workers, each in a process of its own. RankFailed, with what each raised."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    running = [context.Process(target=_work, args=(request, s, plan.attempt, answers), daemon=True) for s in shares]
    for process in running:
        process.start()
    problems = []
    for process, share in zip(running, shares, strict=True):
        while process.is_alive():
            process.join(0.1)
            while not answers.empty():
                problems += _told(answers.get(), tell)
        if process.exitcode:
            problems.append(f"worker {share.index} ended with exit code {process.exitcode}")
    while not answers.empty():
        problems += _told(answers.get(), tell)
    if problems:
        raise RankFailed(f"copying to {plan.where}: " + "; ".join(problems))


def _told(answer: int | str, tell: Callable[[int], None]) -> list[str]:
    if isinstance(answer, str):
        return [answer]
    tell(answer)
    return []


def _work(request: _Request, share: Worker, attempt: str, answers: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    try:
        plan = _Plan(request)
        if plan.attempt != attempt:
            raise Corrupt(f"{request.source.path}: was changed while it was being copied: start again")
        write_share(plan.sink, plan.staging, share, answers.put)
    except Exception as e:  # noqa: BLE001  it is raised again in the process that started this one
        answers.put(f"worker {share.index}: {type(e).__name__}: {e}")


def _end_with_parent() -> None:
    """A worker that outlives a killed parent would be in the way of the next try."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
