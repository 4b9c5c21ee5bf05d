"""`distckpt verify CHECKPOINT`: every byte of a checkpoint is read, and compared with its checksum.

--quick reads no tensor: is each file there, of its size, its header and its table of checksums as the commit says?
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, NotACheckpoint, StoreError
from distckpt.format.checksum import BLOCK
from distckpt.format.layout import CHECKSUMS_CHUNK, OBJECTS_CHUNK
from distckpt.format.partition import regions_of
from distckpt.run.lease import lease
from distckpt.run.retention import listed
from distckpt.saving.commit import is_committed
from distckpt.signing import fingerprint, trusted
from distckpt.tools.answer import Answer, checkpoint_at, run_at
from distckpt.tools.progress import progress
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from distckpt.loading.open import Checkpoint, DataFile
    from distckpt.run.history import History

_WINDOW = 16 * BLOCK
_MOST_WINDOWS = 1024
_NAMED = 8
"""Tensors that a line names."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong with a file; `tensors`: fqns that it hits. unread: the store refused, so nobody knows."""

    file: str
    problem: str
    tensors: list[str]
    unread: bool = False


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", metavar="CHECKPOINT", help="a step, `last`, or a run (its newest); a path or URI")
    parser.add_argument("--step", type=int, help="step of the run")
    parser.add_argument("--all", action="store_true", help="every committed checkpoint of the run")
    parser.add_argument(
        "--quick", action="store_true", help="no tensor: sizes of files, their headers and tables of checksums"
    )


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    if given.all and given.step is not None:
        raise ValueError(f"--all --step {given.step}: every checkpoint, or one")
    if given.all:
        history = run_at(given.path)
        found = [(str(c.directory), c.found.checkpoint, c.found.problem) for c in listed(history)]
        if not found:
            raise NotACheckpoint(f"{given.path}: nothing is committed: {history.why_nothing()}")
    else:
        history, checkpoint = checkpoint_at(given.path, given.step)
        found = [(str(checkpoint.directory), checkpoint, "")]
    values: list[dict[str, Any]] = []
    for name, opened, problem in found:
        started = time.monotonic()
        hit = [Damage(f"{name}/commit.json", problem, [])] if problem else []
        if opened:
            seen = damage_of(history, opened, quick=given.quick)
            if seen is None:
                if not given.all:
                    raise NotACheckpoint(f"{given.path}: {name} has been removed meanwhile")
                continue
            hit += seen
        values.append(
            {
                "path": name,
                "bytes": opened.bytes_read if opened else 0,
                "seconds": round(time.monotonic() - started, 3),
                "quick": given.quick,
                "signed_by": fingerprint(opened.manifest.signature) if opened else "",
                "problems": [d.problem for d in hit],
                "damage": [asdict(d) for d in hit],
                "tensors": sorted({fqn for d in hit for fqn in d.tensors}),
            }
        )
    lines = [line for value in values for line in _lines(value)]
    return Answer(lines, values, code=int(any(value["problems"] for value in values)))


def _lines(value: dict[str, Any]) -> Iterator[str]:
    good = "sizes and headers are whole" if value["quick"] else "whole"
    bad = "NOT READ" if all(d["unread"] for d in value["damage"]) else "DAMAGED"
    state = bad if value["damage"] else good
    whose = f"; {'' if trusted() else 'says that it is '}signed by {value['signed_by']}" if value["signed_by"] else ""
    yield f"{value['path']}: {state}, {size_text(value['bytes'])} read in {value['seconds']:.1f} s{whose}"
    yield from (f"  {problem}" for problem in value["problems"])
    if hit := value["tensors"]:
        rest = f" and {len(hit) - _NAMED} more (--json names all)" if len(hit) > _NAMED else ""
        yield f"  {len(hit)} tensors are hit: {', '.join(hit[:_NAMED])}{rest}"


def damage_of(history: History, checkpoint: Checkpoint, *, quick: bool = False) -> list[Damage] | None:
    """`damage`, while nobody removes the checkpoint; None where retention has removed it before, or is at it."""
    with lease(history.store, checkpoint.directory):
        found = damage(checkpoint, quick=quick)
    return None if found and not is_committed(history.store, checkpoint.directory) else found


def damage(checkpoint: Checkpoint, *, quick: bool = False) -> list[Damage]:
    """What is wrong with a checkpoint's files: everything that can be told, not only the first."""
    files = range(len(checkpoint.manifest.files))
    total = sum(f.size for f in checkpoint.manifest.files)
    workers = ThreadPoolExecutor(checkpoint.store.pace.in_flight, "distckpt-verify")
    with progress(0 if quick else total, str(checkpoint.directory)) as tell, workers as pool:
        found = [hit for hits in pool.map(partial(_of_header, checkpoint), files) for hit in hits]
        gone = {hit.file for hit in found}
        if not quick:
            whole = [file for i in files if _key(checkpoint, i) not in gone and (file := checkpoint.data_file(i))]
            windows = ((file, start) for file in whole for start in range(0, file.covered, _WINDOW))
            look = partial(_of_window, checkpoint, tell)
            while some := list(islice(windows, _MOST_WINDOWS)):  # of 100 TB, all at once would fill the memory
                found += [hit for hits in pool.map(look, some) for hit in hits]
    for name, info in checkpoint.manifest.objects.items():
        try:
            checkpoint.object(name)
        except (Corrupt, FormatError, StoreError) as e:  # noqa: PERF203  the others are wanted, too
            found.append(Damage(f"{checkpoint.directory}/{info.name}", str(e), [], isinstance(e, StoreError)))
    return found


def _key(checkpoint: Checkpoint, index: int) -> str:
    name = checkpoint.manifest.files[index].name
    return name if "/" in name else f"{checkpoint.directory}/{name}"


def _of_header(checkpoint: Checkpoint, index: int) -> list[Damage]:
    """Damage that makes all of a file unreadable."""
    try:
        checkpoint.data_file(index)
    except (Corrupt, FormatError, StoreError) as e:
        held = [fqn for fqn, info in checkpoint.manifest.tensors.items() if regions_of(info.partition, index)]
        return [Damage(_key(checkpoint, index), str(e), held, isinstance(e, StoreError))]
    return []


def _of_window(checkpoint: Checkpoint, tell: Callable[[int], None], window: tuple[DataFile, int]) -> list[Damage]:
    """Damage of the blocks of a stretch of a file."""
    file, start = window
    view = memoryview(bytearray(min(_WINDOW, file.covered - start)))
    try:
        checkpoint.read(file.key, start, [view])
    except (Corrupt, StoreError) as e:
        return [Damage(file.key, str(e), _tensors(file, start, start + len(view)), isinstance(e, StoreError))]
    found = []
    for offset in range(0, len(view), BLOCK):
        at = start + offset
        try:
            file.verify(at // BLOCK, [[view[offset : offset + BLOCK]]])
        except Corrupt as e:  # the next block may be damaged, too
            found.append(Damage(file.key, str(e), _tensors(file, at, min(at + BLOCK, file.covered))))
    tell(len(view))
    return found


def _tensors(file: DataFile, start: int, stop: int) -> list[str]:
    return [name for name in file.names(start, stop) if name not in {OBJECTS_CHUNK, CHECKSUMS_CHUNK, "the header"}]
