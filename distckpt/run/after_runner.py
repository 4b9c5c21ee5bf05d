"""The process that runs what `after_commit=` lists, on the newest checkpoint or the best.

It takes a lease on the checkpoint, so that it stays, and runs what is due, one command after another, at a low
priority. One such process at a time: it looks again once it is done, so that of commits that come meanwhile the newest
has its turn. What became of each is an event (`after`), and by those it is known what is due: a restart changes
nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time

from distckpt.errors import KeyExists, KeyMissing, failure_text
from distckpt.format.checksum import digest
from distckpt.format.layout import COMMIT, StepDir
from distckpt.format.manifest import MAX_BYTES
from distckpt.run.after import After
from distckpt.run.events import note, read, record
from distckpt.run.lease import lease
from distckpt.run.publish import pointing
from distckpt.run.triggers import Triggers, duration
from distckpt.run.writer import NOT_OURS
from distckpt.store.base import read_all
from distckpt.store.local import LocalStore

_LOCK = "after.lock"
_AGAIN = 0.5
"""Seconds after which it is tried once more, if another process is at it: that may have looked for the last time."""
_NICE = 10
_MOST_SAID = 1000
_NOT_FOUND, _TIME_UP = 127, 124
_OF_A_RANK = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "DISTCKPT_EXIT_FILE"),
    *("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP"),
)
"""How variables begin by which a command would take itself for a rank of the training job."""


def main(root: str, directory: str, told: str) -> None:
    """Run what is due after the commit of a checkpoint, and after those that come meanwhile."""
    store, found = LocalStore(root), StepDir.parse(directory)
    assert found is not None
    for number in NOT_OURS:
        signal.signal(number, lambda *_: None)  # for the training process; the commands have them as ever
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    commands = [After.from_json(said) for said in json.loads(told)]
    try:
        if _run_all(commands, store, found):
            return
        time.sleep(_AGAIN)
        if not _run_all(commands, store, found):
            note(store, "after", step=found.step, skipped="what runs after an earlier commit is not done yet")
    except Exception as e:  # noqa: BLE001  there is nobody else to tell
        note(store, "after", step=found.step, skipped=f"it failed: {failure_text(e)}")


def _run_all(commands: list[After], store: LocalStore, found: StepDir) -> bool:
    """Run what is due until nothing is. False where another process is at it."""
    try:
        with store.locked(_LOCK):
            while any([_ran(after, store, found) for after in commands]):  # noqa: C419  each of them has its turn
                pass
    except KeyExists:
        return False
    return True


def _ran(after: After, store: LocalStore, found: StepDir) -> bool:
    """Run a command if it is due, on the newest checkpoint there is now, or the best."""
    named = pointing(store)
    newest = StepDir.parse(named.get("last", "")) or found
    directory = StepDir.parse(named.get("best", "")) if after.on == "best" else newest
    if directory is None or not is_due(after, store, directory, time.time()):
        return False
    _run(after, store, directory)
    return True


def is_due(after: After, store: LocalStore, directory: StepDir, now: float) -> bool:
    """Whether a command is to run on a checkpoint now, going by the run's events: once, if at all."""
    commit = _commit(store, directory)
    ran = [e for e, _ in read(store.root) if e["event"] == "after" and e.get("name") == after.name]
    # not by dates: clocks differ; nor by the name alone: a directory of that name may have been removed since
    if not commit or any((e["directory"], e.get("commit")) == (str(directory), commit) for e in ran):
        return False
    went_well = [e for e in ran if e["code"] == 0]
    if after.every is None or not went_well:
        return True
    triggers, last = Triggers.of(after.every), went_well[-1]
    seconds, steps = now - float(last["began"]), directory.step - int(last["step"])
    # less than nothing: the clock was set back, or the run was
    return not 0 <= seconds < triggers.seconds or any(not 0 <= steps < n for n in triggers.steps)


def _commit(store: LocalStore, directory: StepDir) -> str:
    """Digest of a commit; "" where there is none."""
    try:
        return digest(read_all(store, f"{directory}/{COMMIT}", limit=MAX_BYTES))
    except KeyMissing:
        return ""


def _run(after: After, store: LocalStore, directory: StepDir) -> None:
    seconds, began = duration(after.timeout, "timeout"), time.time()
    commit = _commit(store, directory)
    with lease(store, directory, seconds + 60), tempfile.TemporaryFile() as output:
        code = _code(after.words(store.root, directory), after.folder, seconds, output.fileno())
        output.seek(max(0, output.seek(0, os.SEEK_END) - _MOST_SAID))
        said = output.read().decode(errors="replace").strip()
    record(
        store,
        "after",
        name=after.name,
        step=directory.step,
        directory=str(directory),
        commit=commit,
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
