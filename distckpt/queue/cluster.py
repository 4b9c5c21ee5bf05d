"""A queue as a SLURM array: the cluster's own scheduler does what the runner does on one machine."""

from __future__ import annotations

import shlex
import subprocess
import zlib
from typing import TYPE_CHECKING

from distckpt.errors import NotACheckpoint, StoreError
from distckpt.queue.standing import State, standing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distckpt.queue.spec import Queue

_PATIENCE = 60.0


def commands(queue: Queue) -> list[str]:
    """A line for each run that is not finished, as a shell reads it: its variables, and its command."""
    left = [run for run in queue.runs if standing(run, queue.restarts).state is not State.FINISHED]
    return [
        " ".join([*(f"{name}={shlex.quote(value)}" for name, value in run.env.items()), shlex.join(run.command)])
        for run in left
    ]


def submit(queue: Queue, script: Path, options: Sequence[str]) -> str:
    """Submit what is not finished as an array, so many at a time as there are slots. Returns what sbatch says.

    script: launch/slurm/array.sbatch, or one like it. StoreError where sbatch cannot be had or refuses.
    """
    lines = commands(queue)
    if not lines:
        raise NotACheckpoint(f"{queue.file}: every run is finished: there is nothing to submit")
    if not script.is_file():
        raise StoreError(f"{script}: no such batch script: give --script launch/slurm/array.sbatch")
    text = "\n".join(lines) + "\n"
    # a file for each content: tasks of an array submitted before read theirs when they start
    listed = queue.file.with_suffix(f".{zlib.crc32(text.encode()):08x}.commands")
    listed.write_text(text, encoding="utf-8")
    array = f"--array=1-{len(lines)}%{len(queue.gpu_of)}"
    command = ["sbatch", array, f"--chdir={queue.folder}", *options, str(script), str(listed)]
    try:
        done = subprocess.run(  # noqa: S603  the cluster's own program
            command, capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise StoreError(f"sbatch: {e}") from e
    if done.returncode:
        raise StoreError(f"sbatch: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
