"""What a command of the command line answers, and what it is asked about."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint
from distckpt.format.layout import StepDir
from distckpt.loading.open import open_checkpoint
from distckpt.run.history import History
from distckpt.run.place import followed
from distckpt.store.open import open_store, parted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.loading.open import Checkpoint


@dataclass(frozen=True, slots=True)
class Answer:
    """Text lines, the same as a JSON value, and the exit code (distckpt/cli.py lists them)."""

    lines: Sequence[str]
    value: Any
    code: int = 0


def tell(line: str, *, beside: bool = False) -> None:
    """Say something before the answer is there. beside: on stderr, where stdout is for the answer alone."""
    stream = sys.stderr if beside else sys.stdout
    stream.write(line + "\n")
    stream.flush()


def seconds(text: str) -> float:
    """Seconds in an option. ValueError unless they are more than none, and as many as can be waited for."""
    found = float(text)
    if not 0 < found <= threading.TIMEOUT_MAX:
        raise ValueError(text)
    return found


def count(text: str) -> int:
    """Number of things in an option. ValueError unless there is one."""
    if (found := int(text)) < 1:
        raise ValueError(text)
    return found


def run_at(path: str) -> History:
    """Run whose directory or URI this is. NotACheckpoint where there is none."""
    whole = followed(path)
    if isinstance(whole, Path) and not whole.is_dir():
        raise NotACheckpoint(
            f"{whole}: " + ("is a file, not a run's directory" if whole.exists() else "does not exist")
        )
    history = History(open_store(whole))
    if history.is_checkpoint():
        raise NotACheckpoint(f"{whole}: is one checkpoint; give its parent, that of the run")
    if not history.directories():
        raise NotACheckpoint(f"{whole}: no run of distckpt: {history.why_nothing()}")
    return history


def checkpoint_at(path: str, step: int | None = None) -> tuple[History, Checkpoint]:
    """Checkpoint that a path or URI means: a step, what leads to one, or of a run the newest or that of `step`."""
    whole = followed(path)
    holder, name = parted(whole)
    directory = StepDir.parse(name)
    if directory and not History(open_store(whole)).directories():
        if step not in {None, directory.step}:
            raise NotACheckpoint(f"{whole}: is not step {step}; give the run's directory with --step")
        history = History(open_store(holder))
        return history, open_checkpoint(history.store, directory)
    history = run_at(str(whole))
    found = next((c for c in history.valid() if step in {None, c.directory.step}), None)
    if found is None:
        wanted = "no checkpoint that counts" if step is None else f"no checkpoint of step {step}"
        raise NotACheckpoint(f"{whole}: holds {wanted}: {history.why_nothing()}")
    return history, found


def save_text(path: Path, text: str) -> None:
    """Write a file that a command was asked for, whole or not at all. OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def fitted(lines: Sequence[str]) -> list[str]:
    """Lines as a terminal is wide, each cut at its end; where the output is none, all of them."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    return [line if width is None or len(line) <= width else f"{line[: width - 1]}…" for line in lines]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
