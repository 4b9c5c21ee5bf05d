"""What runs after a commit: exports, trial loads, evaluations; commands, off the training path, on what is committed.

Whoever commits starts one process (run/after_runner.py), and does not wait for it. Imports no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distckpt.format.layout import StepDir
from distckpt.run.triggers import Triggers, duration

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable


_MOST_NAME = 200


@dataclass(frozen=True, slots=True)
class After:
    """A command that runs after a commit.

    command: its words, in which {checkpoint}, {run}, {step} and {directory} stand for the checkpoint's path, the run's,
    its step, and its name. every: "4 h" or "1000 steps" since it last went well; None: after each commit. on: "best"
    on what `best` points at, once. timeout: after which it is killed. name: in events (default: the command).
    folder: that it runs in (default: the one that we are in now).
    """

    command: tuple[str, ...]
    every: str | int | None = None
    on: Literal["commit", "best"] = "commit"
    timeout: str | float = "6 h"
    name: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.command, str) or not self.command or not all(isinstance(w, str) for w in self.command):
            raise ValueError(f"command={self.command!r}: a tuple of words, such as ('python', 'evaluate.py')")
        object.__setattr__(self, "command", tuple(self.command))
        if self.on not in {"commit", "best"}:
            raise ValueError(f"on={self.on!r}: 'commit' or 'best'")
        duration(self.timeout, "timeout")
        if Triggers.of(self.every).epochs:
            raise ValueError(f"every={self.every!r}: steps or time; to run once an epoch, save once an epoch")
        object.__setattr__(self, "name", (self.name or " ".join(self.command))[:_MOST_NAME])
        if not self.folder:
            object.__setattr__(self, "folder", str(Path.cwd()))
        try:
            self.words(Path(), StepDir(0))
        except (KeyError, IndexError, ValueError) as e:
            expected = "{checkpoint}, {run}, {step} or {directory}; a brace itself is written twice"
            raise ValueError(f"command={self.command!r}: {e!r}: {expected}") from e

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
        return asdict(self)

    @staticmethod
    def from_json(said: dict[str, Any]) -> After:
        """Command that to_json described."""
        return After(**{**said, "command": tuple(said["command"])})

    def words(self, root: Path, directory: StepDir) -> list[str]:
        """The command for a checkpoint."""
        said = {"checkpoint": str(root / str(directory)), "run": str(root), "directory": str(directory)}
        return [word.format(**said, step=directory.step) for word in self.command]


def Export(  # noqa: N802  one of the things that an after_commit= lists, beside After
    to: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002  as in the command
    options: Iterable[str] = (),
    every: str | int | None = None,
    on: Literal["commit", "best"] = "commit",
) -> After:
    """Export the checkpoint as `distckpt export {checkpoint} -o TO --to FORMAT OPTIONS...` does.

    to: a path, in which {step} stands for the step: what is there already is replaced only if options say so.
    """
    words = (sys.executable, "-m", "distckpt.cli", "export", "{checkpoint}", "-o", str(to), *options)
    return After((*words, "--to", format) if format else words, every, on, name=f"export to {to}")


def TrialLoad(*, every: str | int | None = None, on: Literal["commit", "best"] = "best") -> After:  # noqa: N802
    """Read the whole checkpoint back in a new process, against its checksums."""
    return After((sys.executable, "-m", "distckpt.cli", "verify", "{checkpoint}"), every, on, name="trial load")


def checked(commands: Iterable[After]) -> tuple[After, ...]:
    """What `after_commit=` lists. ValueError where it is something else, or two have one name."""
    found = tuple(commands)
    if wrong := [one for one in found if not isinstance(one, After)]:
        raise ValueError(f"after_commit={wrong[0]!r}: After(command), Export(path) or TrialLoad() is expected")
    names = [after.name for after in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"after_commit: two are called {twice[0]!r}: each is known by its name: give one another name="
        )
    return found


def start(root: Path, directory: StepDir, commands: tuple[After, ...]) -> None:
    """Start the process for a checkpoint just committed, and do not wait for it. OSError."""
    told = json.dumps([after.to_json() for after in commands])
    _started[:] = [process for process in _started if process.poll() is None]
    process = subprocess.Popen(  # noqa: S603  this interpreter, running our own module
        [sys.executable, "-c", _START.format(path=[p for p in sys.path if p]), str(root), str(directory), told],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=root,
    )
    _started.append(process)


_started: list[subprocess.Popen[bytes]] = []
"""Processes that nobody waits for: each is taken leave of once it has ended, when the next is started."""

_START = """
import sys
sys.path[:] = {path!r}
from distckpt.run.after_runner import main
main(*sys.argv[1:])
"""
