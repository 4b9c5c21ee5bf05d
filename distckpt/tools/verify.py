"""`distckpt verify CHECKPOINT`: every byte of a checkpoint is read, and compared with its checksum."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, StoreError
from distckpt.format.checksum import BLOCK
from distckpt.run.lease import lease
from distckpt.run.retention import listed
from distckpt.tools.answer import Answer, checkpoint_at, run_at
from distckpt.units import size_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from distckpt.loading.open import Checkpoint, DataFile

_WINDOW = 16 * BLOCK


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("path", metavar="CHECKPOINT", help="a step, `last`, or a run (its newest); a path or URI")
    parser.add_argument("--step", type=int, help="step of the run")
    parser.add_argument("--all", action="store_true", help="every committed checkpoint of the run")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    if given.all:
        history = run_at(given.path)
        found = [(str(c.directory), c.found.checkpoint, c.found.problem) for c in listed(history)]
    else:
        history, checkpoint = checkpoint_at(given.path, given.step)
        found = [(str(checkpoint.directory), checkpoint, "")]
    values: list[dict[str, Any]] = []
    for name, opened, problem in found:
        started = time.monotonic()
        problems = [problem] if problem else []
        if opened:
            with lease(history.store, opened.directory):
                problems += damage(opened)
        nbytes = opened.bytes_read if opened else 0
        values.append({"path": name, "bytes": nbytes, "seconds": time.monotonic() - started, "problems": problems})
    lines = []
    for value in values:
        state = "DAMAGED" if value["problems"] else "whole"
        lines += [f"{value['path']}: {state}, {size_text(value['bytes'])} read in {value['seconds']:.1f} s"]
        lines += [f"  {problem}" for problem in value["problems"]]
    return Answer(lines, values, code=int(any(value["problems"] for value in values)))


def damage(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a checkpoint's files: everything that can be told, not only the first."""
    files = range(len(checkpoint.manifest.files))
    with ThreadPoolExecutor(checkpoint.store.pace.in_flight, "distckpt-verify") as pool:
        problems = [problem for index in files for problem in _of_file(checkpoint, index, pool)]
    for name in checkpoint.manifest.objects:
        try:
            checkpoint.object(name)
        except (Corrupt, FormatError, StoreError) as e:  # noqa: PERF203  the others are wanted, too
            problems.append(str(e))
    return problems


def _of_file(checkpoint: Checkpoint, index: int, pool: ThreadPoolExecutor) -> Iterator[str]:
    """Problems of one file, several windows of which are read at once; where one cannot be read, no further ones."""
    try:
        file = checkpoint.data_file(index)
        for problems in pool.map(partial(_of_window, checkpoint, file), range(0, file.covered, _WINDOW)):
            yield from problems
    except (Corrupt, FormatError, StoreError) as e:
        yield str(e)


def _of_window(checkpoint: Checkpoint, file: DataFile, start: int) -> list[str]:
    view = memoryview(bytearray(min(_WINDOW, file.covered - start)))
    checkpoint.read(file.key, start, [view])
    problems = []
    for offset in range(0, len(view), BLOCK):
        try:
            file.verify((start + offset) // BLOCK, [[view[offset : offset + BLOCK]]])
        except Corrupt as e:  # noqa: PERF203  the next block may be damaged, too
            problems.append(str(e))
    return problems
