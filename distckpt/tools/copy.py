"""Copy a checkpoint from any format that is read into any that is written: import, export, reshard, backup.

Streaming and verified: every byte that has a checksum is checked on the way, and nothing is under the destination
before all of it is. Offline: no process group; several processes or nodes share the files out by a plan that each makes
for itself.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, RankFailed, RunConflict, StateWarning
from distckpt.foreign.dcp_write import METADATA, dcp_sink
from distckpt.foreign.deepspeed_write import Wanted, deepspeed_sink
from distckpt.foreign.safetensors_write import safetensors_sink
from distckpt.foreign.torch_write import torch_sink
from distckpt.format import manifest
from distckpt.format.checksum import digest
from distckpt.format.layout import StepDir
from distckpt.loading.stream import ROOM
from distckpt.run.history import History
from distckpt.run.launches import read_launches
from distckpt.run.source import open_source
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore
from distckpt.tools.run_sink import run_sink
from distckpt.tools.transfer import Staging, Worker, collect, move_into_place, write_share
from distckpt.tools.view import Change, View

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from distckpt.foreign.sink import Sink

FORMATS = ("distckpt", "dcp", "deepspeed", "safetensors", "torch")

_LEAST_ROOM, _MOST_ROOM = 1 << 20, 64 << 20


@dataclass(slots=True)
class CopyReport:
    """What a copy did, or (dry run) would do. nbytes: of the tensors; files: key -> bytes; seconds: wall time.

    bytes_read, bytes_written: of this process. notes: what has no place in the destination.
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

    source: str
    destination: str
    to: str
    step: int | None
    names: tuple[tuple[str, str], ...]
    change: Change
    shard_bytes: int
    room: int
    order: tuple[tuple[str, ...], ...] | None = None
    tag: Wanted | None = None


def copy(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    to: str = "distckpt",
    step: int | None = None,
    names: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    rename: Sequence[tuple[str, str]] = (),
    dtype: str | None = None,
    world_size: int | None = None,
    zero_stage: int | None = None,
    tag: str | None = None,
    round_robin: bool = False,
    frozen: Sequence[str] = (),
    sub_group_size: int = 1_000_000_000,
    order: Sequence[Sequence[str]] | None = None,
    shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    memory: int | None = None,
    workers: int = 1,
    worker: Worker | None = None,
    timeout: float = 600.0,
    dry_run: bool = False,
    tell: Callable[[int], None] = lambda _: None,
) -> CopyReport:
    """Copy a checkpoint: of a run (its newest, or that of `step`), a step directory, or another tool's.

    to: "distckpt" (the destination is a run; `step` is what the checkpoint is called there, where the source is another
    tool's), "dcp" (a directory), "safetensors" (a file `*.safetensors`, or a directory as Hugging Face has it, files of
    at most `shard_bytes`), "torch" (a file). names: as in Checkpointer.load. only: leads of the names to keep. rename:
    (regular expression, replacement) for names of parameters. dtype: of the model's floating-point tensors. world_size:
    how many files to divide the tensors over (distckpt and dcp); to="deepspeed", which writes a tag into the
    destination: ranks of the engine that will load it, as zero_stage, round_robin, frozen, sub_group_size (see Wanted)
    and dtype are its own; tag: None for DeepSpeed's name of the step. order: names of the optimizer's parameters by
    group, for a source that has them by position. verify: check another tool's records against their
    CRC-32 first, and read the result back. memory: bytes that buffers take at most. workers: processes on this machine.
    worker: this machine's share of a copy that several do (`Worker(rank, world_size)`), through a file system they
    share; rank 0 finishes it. timeout: seconds it waits for the others while nothing comes. dry_run: only plan. tell:
    called with the bytes of each file written. What cannot be carried is warned of, and noted.
    """
    if to not in FORMATS:
        raise ValueError(f"to={to!r}: one of {', '.join(FORMATS)}")
    room = ROOM if memory is None else max(_LEAST_ROOM, min(_MOST_ROOM, memory // max(1, workers) // 8))
    change = Change(only=tuple(only) if only else None, rename=tuple(rename), dtype=dtype, files=world_size)
    wanted = None
    if to == "deepspeed":
        wanted = Wanted(zero_stage, world_size, dtype, tag, round_robin, tuple(frozen), sub_group_size)
        change = replace(change, dtype=None, files=None)
    request = _Request(
        str(source),
        str(destination),
        to,
        step,
        tuple((names or {}).items()),
        change,
        shard_bytes,
        room,
        tuple(tuple(of_group) for of_group in order) if order is not None else None,
        wanted,
    )
    started = time.monotonic()
    plan = _Plan(request)
    report = CopyReport(
        plan.where,
        plan.view.nbytes,
        {o.name: o.size for o in plan.sink.outputs},
        notes=[*plan.view.notes, *plan.sink.notes],
    )
    if dry_run:
        return report
    plan.refuse_taken()
    share = worker or Worker()
    if share.index == 0:
        for note in report.notes:
            warnings.warn(note, StateWarning, stacklevel=2)
    if verify:
        plan.view.verify_all()
    total = share.count * workers
    if workers == 1:
        write_share(plan.sink, plan.staging, share, tell)
    else:
        _in_processes(request, [Worker(share.index * workers + i, total) for i in range(workers)], plan, tell)
    if share.index == 0:
        plan.finish(collect(plan.sink, plan.staging, total, timeout), verify=verify)
    report.bytes_read, report.seconds = plan.view.bytes_read, time.monotonic() - started
    report.bytes_written = sum(report.files.values())
    return report


class _Plan:
    """A request, planned: the same in every process that plans it."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._destination = Path(request.destination).absolute()
        checkpoint = open_source(
            request.source, step=request.step, names=dict(request.names) or None, order=request.order
        )
        foreign_step = request.step if checkpoint.foreign else None
        self.view = View(checkpoint, replace(request.change, step=foreign_step))
        told = [
            manifest.to_json(self.view.manifest),
            asdict(request.change),
            request.to,
            request.shard_bytes,
            repr(request.tag),
        ]
        identity = [str(Path(request.source).absolute()), str(self._destination), *map(repr, _files_of(self.view))]
        self.digest = digest(json.dumps([told, identity], sort_keys=True, default=str).encode())[:12]
        self.staging = Staging(self._destination, self.digest)
        self._directory: StepDir | None = None
        self.sink = self._planned()

    def _planned(self) -> Sink:
        request, name = self._request, self._destination.name
        if request.to == "dcp":
            return dcp_sink(self.view, request.room)
        if request.tag:
            return deepspeed_sink(self.view, request.tag, request.room)
        if request.to == "torch":
            return torch_sink(self.view, name, request.room)
        if request.to == "safetensors":
            alone = name if name.endswith(".safetensors") else None
            return safetensors_sink(self.view, alone, request.shard_bytes, request.room)
        step = self.view.manifest.step
        taken = History(LocalStore(self._destination)).next_generation(step) if self._destination.is_dir() else 1
        self._directory = StepDir(step, taken)
        return run_sink(self.view, self._directory, self.digest, request.room)

    @property
    def where(self) -> str:
        """What the copy is called in the end."""
        return str(self._destination / self.sink.top) if self.sink.kind == "inside" else str(self._destination)

    def refuse_taken(self) -> None:
        """RunConflict where the destination holds something already."""
        if self._directory:
            store = LocalStore(self._destination) if self._destination.is_dir() else None
            step = self._directory.step
            if store and (read_launches(store) or any(f.directory.step == step for f in History(store).committed())):
                raise RunConflict(
                    f"{store}: holds step {step} already, or is a run that jobs have resumed, where a copy would not "
                    "count: copy into a new directory"
                )
        elif self.sink.kind == "inside":
            if (self._destination / self.sink.top).exists():
                raise RunConflict(f"{self.where}: exists already; give another tag or destination, or remove it first")
        elif (self._destination / METADATA).exists():
            raise RunConflict(f"{self._destination}: holds a DCP checkpoint already; give a new directory")
        elif self._destination.is_file() or (self._destination.is_dir() and any(self._destination.iterdir())):
            raise RunConflict(f"{self._destination}: exists already; give another destination, or remove it first")

    def finish(self, results: Mapping[str, Any], *, verify: bool) -> None:
        """Write what makes the copy whole, check it, and move it into place."""
        for name, data in self.sink.finish(results):
            write_all(self.staging.data, name, data)
        top = self._destination.name if self.sink.kind == "file" else self.sink.top
        self._check(self.staging.data.root / top, verify=verify)
        move_into_place(self.sink, self.staging, self._destination, top)
        for name, data in self.sink.pointers:
            write_all(LocalStore(self._destination), name, data)

    def _check(self, written: Path, *, verify: bool) -> None:
        """Corrupt unless what was written opens, and has the tensors that it should."""
        copied = open_source(written, order=self.sink.order)
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
            raise Corrupt(f"{written}: was written without {lacking[:5]}; it was not moved to {self.where}")
        if verify:
            again = View(copied, Change())
            if self._request.to != "safetensors":
                again.verify_all()
            again.read_all()


def _files_of(view: View) -> list[tuple[str, int, int]]:
    """What tells whether another tool's files are still those that a copy began with."""
    return [(f.name, f.size, getattr(f, "changed", 0)) for f in getattr(view.base, "sources", ())]


def _in_processes(request: _Request, shares: list[Worker], plan: _Plan, tell: Callable[[int], None]) -> None:
    """Write the shares of several workers, each in a process of its own. RankFailed, with what each raised."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.SimpleQueue()
    running = [context.Process(target=_work, args=(request, share, answers), daemon=True) for share in shares]
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


def _work(request: _Request, share: Worker, answers: Any) -> None:
    try:
        plan = _Plan(request)
        write_share(plan.sink, plan.staging, share, answers.put)
    except Exception as e:  # noqa: BLE001  it is raised again in the process that started this one
        answers.put(f"worker {share.index}: {type(e).__name__}: {e}")
