"""What the file of a queue says: runs in order, and how many slots there are. ValueError says where it is wrong."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt.queue.gpus import gpus
from distckpt.run.triggers import duration

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_QUEUE = {"gpus", "per_gpu", "slots", "restarts", "backoff", "env", "run"}
_RUN = {"name", "root", "command", "slots", "steps", "metric", "mode", "env"}


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    root: its directory. slots: that it takes. steps: of the whole run, if known. metric: to show. mode: min or max.
    """

    name: str
    root: Path
    command: tuple[str, ...]
    slots: int
    steps: int | None
    metric: str | None
    mode: str
    env: dict[str, str]


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue. gpu_of: GPU that each slot is on; None on a machine of CPU slots.

    restarts: crashes in a row, without a checkpoint between, after which a run has failed. backoff: seconds before the
    second start; doubled with each crash.
    """

    file: Path
    runs: tuple[Run, ...]
    gpu_of: tuple[int | None, ...]
    restarts: int
    backoff: float

    @property
    def lock(self) -> str:
        """File in the folder that whoever runs the queue holds, and writes its process's number to."""
        return re.sub(r"\A[.+-]|[^A-Za-z0-9_.+-]", "_", self.file.name) + ".lock"

    @property
    def folder(self) -> Path:
        """Where the runs' commands start, and relative paths begin."""
        return self.file.parent


def load(path: str | Path) -> Queue:
    """Read a queue's file."""
    file = Path(path).absolute()
    try:
        said = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: is no TOML: {e}") from e
    try:
        return _queue(file, said)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def _queue(file: Path, said: dict[str, Any]) -> Queue:
    _refuse_unknown("the queue", said, _QUEUE)
    slots = _slots(said)
    env = _texts("env", said.get("env", {}))
    if isinstance(said.get("run"), dict):
        raise ValueError("[run]: a list is expected: write [[run]], once for each run")  # noqa: TRY004  likewise
    entries = _typed("run", said.get("run", []), list)
    runs = tuple(_run(number, entry, file.parent, env) for number, entry in enumerate(entries, 1))
    if not runs:
        raise ValueError('no [[run]]: give each run a table, with name = "...", root = "..." and command = [...]')
    for what in ("name", "root"):
        values = [run.name if what == "name" else str(run.root.resolve()) for run in runs]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"two runs have the {what} {twice[0]!r}: each must have its own")
    if large := [run for run in runs if run.slots > len(slots)]:
        raise ValueError(f"run {large[0].name!r} takes {large[0].slots} slots; there are {len(slots)}")
    restarts = _count("restarts", said.get("restarts", 5), least=0)
    return Queue(file, runs, slots, restarts, duration(said.get("backoff", "10 s"), "backoff"))


def _slots(said: dict[str, Any]) -> tuple[int | None, ...]:
    if "slots" in said:
        if "gpus" in said or "per_gpu" in said:
            raise ValueError("slots = and gpus = exclude each other: slots are for a machine without GPUs")
        return (None,) * _count("slots", said["slots"])
    given = said.get("gpus")
    if given is None:
        ids = list(range(len(gpus())))
    elif isinstance(given, list) and given:
        ids = [_count("gpus", one, least=0) for one in given]
    else:
        ids = list(range(_count("gpus", given)))
    each = _count("per_gpu", said.get("per_gpu", 1))
    return tuple(gpu for _ in range(each) for gpu in ids) or (None,)


def _run(number: int, said: Any, folder: Path, env: dict[str, str]) -> Run:
    where = f"run {number}"
    said = _typed(where, said, dict)
    where = f"run {said.get('name', number)!r}"
    _refuse_unknown(where, said, _RUN)
    if missing := {"name", "root", "command"} - said.keys():
        raise ValueError(f"{where}: {', '.join(sorted(missing))} is missing")
    command = _typed(f"{where}: command", said["command"], list)
    if not command or not all(isinstance(word, str) and "\0" not in word for word in command):
        raise ValueError(f'{where}: command = {command!r}: a list of words, such as ["torchrun", "train.py"]')
    mode = said.get("mode", "min")
    if mode not in {"min", "max"}:
        raise ValueError(f"{where}: mode = {mode!r}: 'min' or 'max'")
    metric, steps = said.get("metric"), said.get("steps")
    return Run(
        _typed(f"{where}: name", said["name"], str),
        folder / _typed(f"{where}: root", said["root"], str),
        tuple(command),
        _count(f"{where}: slots", said.get("slots", 1)),
        _count(f"{where}: steps", steps) if steps is not None else None,
        _typed(f"{where}: metric", metric, str) if metric is not None else None,
        mode,
        env | _texts(f"{where}: env", said.get("env", {})),
    )


def _refuse_unknown(where: str, said: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(said.keys() - known):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; expected are {', '.join(sorted(known))}")


def _typed(where: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        name = {"list": "a list", "dict": "a table", "str": "a text"}[kind.__name__]
        raise ValueError(f"{where}: {value!r}: {name} is expected")  # noqa: TRY004  of a file, not of a call
    return value


def _count(where: str, value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < math.inf:
        raise ValueError(f"{where} = {value!r}: a whole number of at least {least} is expected")
    return value


def _texts(where: str, value: Any) -> dict[str, str]:
    texts = {name: str(text) for name, text in _typed(where, value, dict).items()}
    if wrong := [name for name, text in texts.items() if not name or "=" in name or "\0" in name + text]:
        raise ValueError(f"{where}: {wrong[0]!r}: no name or value of a variable")
    return texts
