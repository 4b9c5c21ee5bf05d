"""The process that runs what `after_commit=` lists, for one commit.

It takes a lease on the checkpoint, so that it stays, and runs what is due, one command after another, at a low
priority. One such process at a time: a commit that comes while it is busy is passed over, and what was due is due again
at the next. What became of each is an event (`after`), and by those it is known what is due: a restart changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, Any

from distckpt.errors import KeyExists
from distckpt.format.layout import StepDir
from distckpt.run.after import After
from distckpt.run.events import note, read
from distckpt.run.lease import lease
from distckpt.run.publish import pointing
from distckpt.run.triggers import Triggers, duration
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOCK = "after.lock"
_NICE = 10
_MOST_SAID = 1000
_NOT_FOUND, _TIME_UP = 127, 124
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "DISTCKPT_EXIT_FILE"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP"),
)
"""How variables begin by which a command would take itself for a rank of the training job."""


def main(root: str, directory: str, told: str) -> None:
    """Run what is due."""
    store, found = LocalStore(root), StepDir.parse(directory)
    assert found is not None
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    commands = [After.from_json(said) for said in json.loads(told)]
    try:
        with store.locked(_LOCK):
            for after in commands:
                if is_due(after, store, found, time.time()):
                    _run(after, store, found)
    except KeyExists:
        note(store, "after", step=found.step, skipped="what runs after an earlier commit is not done yet")


def is_due(after: After, store: LocalStore, directory: StepDir, now: float) -> bool:
    """Whether a command is to run for a checkpoint now, going by the run's events and its `best`."""
    if after.on == "best" and pointing(store).get("best") != str(directory):
        return False
    went_well = [e for e, _ in read(store.root) if _went_well(e, after.name)]
    if after.every is None or not went_well:
        return True
    triggers, last = Triggers.of(after.every), went_well[-1]
    steps = directory.step - int(last["step"])
    return now - float(last["began"]) >= triggers.seconds or any(steps >= n for n in triggers.steps)


def _went_well(event: Mapping[str, Any], name: str) -> bool:
    return event["event"] == "after" and event.get("name") == name and event.get("code") == 0


def _run(after: After, store: LocalStore, directory: StepDir) -> None:
    seconds, began = duration(after.timeout, "timeout"), time.time()
    with lease(store, directory, seconds + 60), tempfile.TemporaryFile() as output:
        code = _code(after.words(store.root, directory), after.folder, seconds, output.fileno())
        output.seek(max(0, output.seek(0, os.SEEK_END) - _MOST_SAID))
        said = output.read().decode(errors="replace").strip()
    note(
        store,
        "after",
        name=after.name,
        step=directory.step,
        directory=str(directory),
        code=code,
        began=began,
        seconds=round(time.time() - began, 1),
        said=said if code else None,
    )


def _code(words: list[str], folder: str, seconds: float, output: int) -> int:
    """Exit code of a command: as a shell has it where it could not be started, or was killed for its time was up."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}
    try:
        process = subprocess.Popen(  # noqa: S603  the user's own command
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=folder,
            env={"OMP_NUM_THREADS": "1", **env},
        )
    except OSError as e:
        os.write(output, f"{words[0]}: {e}".encode())
        return _NOT_FOUND
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.write(output, f"\nkilled after {seconds:.0f} s (timeout=)".encode())
        return _TIME_UP
