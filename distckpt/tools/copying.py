"""What the commands of the copier have in common: their options, and how one of them is run."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.tools.answer import Answer, tell
from distckpt.units import as_bytes

if TYPE_CHECKING:
    from distckpt.tools.copy import CopyReport, Source
    from distckpt.tools.formats import Format
    from distckpt.tools.lora import Lora
    from distckpt.tools.view import Change

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def offer(parser: argparse._ActionsContainer, *names: str) -> None:
    """Add options that several commands have."""
    for name in names:
        said = dict(_OPTIONS[name])
        if isinstance(said.get("default"), list):
            said["default"] = []
        parser.add_argument(f"--{name}", **said)


def refuse_unused(given: argparse.Namespace, to: str) -> None:
    """ValueError for an option that would change nothing of this format."""
    for option, formats in _OF_FORMAT.items():
        if getattr(given, option, None) not in (None, False, []) and to not in formats:
            raise ValueError(f"--{option.replace('_', '-')} is for --to {' or '.join(formats)}, not {to}")


def format_at(destination: str, default: str = "distckpt") -> str:
    """Format that the name of a destination says."""
    if destination.endswith(".safetensors"):
        return "safetensors"
    return "torch" if destination.endswith((".pt", ".pth", ".bin")) else default


def format_of(given: argparse.Namespace, to: str, config: str | None = None) -> Format:
    """Format of this name, with the options given. config: see Safetensors."""
    from distckpt.tools.formats import FORMATS, DeepSpeed, Safetensors

    if to == "deepspeed":
        made = DeepSpeed(
            given.zero_stage,
            given.world_size,
            given.dtype,
            given.tag,
            round_robin=given.round_robin,
            frozen=tuple(given.frozen),
        )
        return replace(made, sub_group_size=given.sub_group_size) if given.sub_group_size else made
    found = FORMATS[to]()
    if isinstance(found, Safetensors):
        return Safetensors(given.shard_size or found.shard_bytes, config)
    return found


def source_of(given: argparse.Namespace, lora: Lora | None = None) -> Source:
    """Checkpoint that is to be read."""
    from distckpt.tools.copy import Source

    order = tuple(tuple(group) for group in given.param_order) if given.param_order else None
    return Source(given.source, given.step, tuple(given.name), order, lora)


def change_of(given: argparse.Namespace, to: str) -> Change:
    """What is to be changed. A tag's dtype and ranks are the format's."""
    from distckpt.tools.view import Change

    own = to == "deepspeed"
    return Change(
        only=tuple(given.only) if given.only else None,
        rename=tuple(given.rename),
        dtype=None if own else given.dtype,
        files=None if own else getattr(given, "world_size", None),
    )


def answered(given: argparse.Namespace, source: Source, destination: str, to: Format, change: Change) -> Answer:
    """Copy, and say what was done; of the tasks of a job the first says it."""
    report = copied(given, source, destination, to, change)
    if not is_first():
        return Answer((), None)
    return Answer(lines_of(report, dry_run=given.dry_run), {"dry_run": given.dry_run, **asdict(report)})


def is_first() -> bool:
    """Whether this task of a job speaks for all."""
    return _place()[0] == 0


def is_alone() -> bool:
    """Whether this is the only task: others may see another moment of what they share."""
    return _place()[1] == 1


def copied(given: argparse.Namespace, source: Source, destination: str, to: Format, change: Change) -> CopyReport:
    """Plan, show how far it is, and copy; a run's pointers and meta.json say what is there."""
    from distckpt.run.history import History
    from distckpt.run.publish import make_known
    from distckpt.store.open import open_store
    from distckpt.tools.copy import copy
    from distckpt.tools.formats import Distckpt
    from distckpt.tools.transfer import Worker

    worker = Worker(*_place(), given.workers, given.timeout)
    bar = _Bar(shown=sys.stderr.isatty() and not given.json and worker.index == 0)
    more: dict[str, Any] = {"change": change, "memory": given.memory, "worker": worker, "tell": bar.add}
    report = copy(source, destination, to, dry_run=True, **more)
    if given.dry_run:
        return report
    bar.total = report.bytes_written
    try:
        report = copy(source, destination, to, verify=given.verify, **more)
    except KeyboardInterrupt:
        tell("interrupted: the same command goes on where it stopped", beside=True)
        raise
    bar.end()
    if isinstance(to, Distckpt) and worker.index == 0:
        make_known(History(open_store(destination)), None)
    return report


def lines_of(report: CopyReport, *, dry_run: bool) -> list[str]:
    """Say what a copy did, or would do."""
    verb = "would write" if dry_run else "wrote"
    size = sum(report.files.values())
    lines = [f"{verb} {report.destination}: {len(report.files)} files, {size / 1e6:,.1f} MB in {report.seconds:.1f} s"]
    lines += [f"  {name}: {nbytes:,} bytes" for name, nbytes in report.files.items() if dry_run]
    return lines + [f"  note: {note}" for note in report.notes]


def _place() -> tuple[int, int]:
    """(rank, ranks) of a job that torchrun or srun has started, else (0, 1): a batch script is a task by itself."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(rank, "").isdecimal() and os.environ.get(count, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[count])
    return 0, 1


# -- options -----------------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of at least 1 is expected")
    return int(text)


def _order(text: str) -> list[list[str]]:
    try:
        found = json.loads(Path(text).read_text())
    except (OSError, ValueError) as e:
        raise argparse.ArgumentTypeError(f"{text}: {e}") from None
    if isinstance(found, list) and all(isinstance(g, list) and all(isinstance(n, str) for n in g) for g in found):
        return found
    raise argparse.ArgumentTypeError(f"{text}: a list of lists of names is expected")


def _bytes(text: str) -> int:
    try:
        found = as_bytes(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: more than nothing is expected")
    return found


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left:
        raise argparse.ArgumentTypeError(f"{text!r}: two names with = between them are expected")
    return left, right


def _regex(text: str) -> tuple[str, str]:
    left, right = _pair(text)
    try:
        re.compile(left)
    except re.error as e:
        raise argparse.ArgumentTypeError(f"{left!r}: no regular expression: {e}") from None
    return left, right


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: is no directory")
    return Path(text)


_OPTIONS: dict[str, dict[str, Any]] = {
    "step": {"type": int, "help": "step of a run to read; or what another tool's checkpoint is called in a run"},
    "only": {"action": "append", "metavar": "PART", "help": "part to keep, such as model (may be given again)"},
    "rename": {
        "action": "append",
        "type": _regex,
        "metavar": "REGEX=NEW",
        "default": [],
        "help": "for names of parameters (may be given again)",
    },
    "dtype": {
        "type": lambda name: _DTYPES.get(name, name),
        "help": "of the model's floating-point tensors: bf16, fp16, ...",
    },
    "world-size": {
        "type": _positive,
        "metavar": "N",
        "help": "files to divide tensors over; ranks of a DeepSpeed engine",
    },
    "shard-size": {"type": _bytes, "metavar": "SIZE", "help": "most bytes of a safetensors file (5GB)"},
    "config": {
        "type": _folder,
        "metavar": "DIR",
        "help": "directory whose config, tokenizer and other small files are copied along",
    },
    "base": {
        "type": _folder,
        "metavar": "DIR",
        "help": "where the base model lies, if the checkpoint has the adapter alone",
    },
    "adapter": {"metavar": "NAME", "help": "of several adapters, which (default: default)"},
    "name": {
        "action": "append",
        "type": _pair,
        "metavar": "ENTRY=LEAD",
        "default": [],
        "help": "entry of another tool's state dict that is the model, or ...: ema.model=model",
    },
    "param-order": {
        "type": _order,
        "metavar": "FILE",
        "help": "JSON: names of the optimizer's parameters, a list a group, where the source has them by position",
    },
    "zero-stage": {
        "type": int,
        "choices": range(4),
        "help": "of the engine that will load the tag (deepspeed, as the next)",
    },
    "tag": {"help": "what the tag is called (default: global_stepN)"},
    "round-robin": {"action": "store_true", "help": "that engine has round_robin_gradients"},
    "frozen": {
        "action": "append",
        "default": [],
        "metavar": "NAME",
        "help": "parameter without gradients (--zero-stage 3)",
    },
    "sub-group-size": {"type": _positive, "metavar": "N", "help": "of that engine (--zero-stage 3)"},
    "memory": {"type": _bytes, "metavar": "SIZE", "help": "most bytes of buffers, such as 2GB"},
    "workers": {"type": _positive, "default": 1, "metavar": "N", "help": "processes on this machine"},
    "timeout": {
        "type": float,
        "default": 600.0,
        "metavar": "S",
        "help": "seconds to wait for others while nothing comes",
    },
    "verify": {"action": "store_true", "help": "check another tool's records first, and read the result back"},
    "dry-run": {"action": "store_true", "help": "print the plan, write nothing"},
}

OF_DEEPSPEED = ("zero-stage", "tag", "round-robin", "frozen", "sub-group-size")
OF_ALL = ("memory", "workers", "timeout", "dry-run")

_OF_FORMAT = {
    "zero_stage": ["deepspeed"],
    "tag": ["deepspeed"],
    "round_robin": ["deepspeed"],
    "frozen": ["deepspeed"],
    "sub_group_size": ["deepspeed"],
    "shard_size": ["hf", "safetensors"],
    "adapter": ["hf", "peft", "safetensors", "torch", "dcp"],
    "merge": ["hf", "safetensors", "torch", "dcp"],
    "world_size": ["deepspeed", "distckpt", "dcp"],
}
"""Options that only some formats have."""


class _Bar:
    """Progress on stderr."""

    def __init__(self, *, shown: bool) -> None:
        self.total = 0
        self._shown, self._done, self._started = shown, 0, time.monotonic()

    def add(self, nbytes: int) -> None:
        """Count bytes written."""
        self._done += nbytes
        if self._shown:
            rate = self._done / max(1e-9, time.monotonic() - self._started)
            share = self._done / max(1, self.total)
            full = int(30 * share)
            text = (
                f"\r[{'#' * full}{'.' * (30 - full)}] {share:4.0%} {self._done / 1e6:,.0f} MB, {rate / 1e6:,.0f} MB/s"
            )
            print(text, end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            print(file=sys.stderr)
