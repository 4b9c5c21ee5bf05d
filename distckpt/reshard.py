"""`python -m distckpt.reshard SRC DST`: any checkpoint that is read, as any that is written.

    python -m distckpt.reshard runs/first exported.safetensors --only model --dtype bfloat16
    python -m distckpt.reshard dcp_dir runs/next --step 4000 --world-size 8 --workers 4
    python -m distckpt.reshard runs/first s3://bucket/first --verify
    python -m distckpt.reshard runs/first tags --to deepspeed --zero-stage 3 --world-size 16 --dtype bf16
    srun python -m distckpt.reshard runs/first /shared/dcp --to dcp      # tasks share the files out

What SRC is is told by its content. Nothing is under DST before all of it is; one that was interrupted goes on where it
stopped when it is started again. Runs no code from SRC.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import DistckptError

if TYPE_CHECKING:
    from distckpt.tools.copy import CopyReport

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 an error (on stderr), 2 wrong usage, 130 interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _refuse_unused(parser, options)
    try:
        return _run(options)
    except (DistckptError, OSError, ValueError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from distckpt.tools.copy import copy
    from distckpt.tools.transfer import Worker

    worker = Worker(*_place(), options.workers, options.timeout)
    bar = _Bar(shown=sys.stderr.isatty() and not options.json and worker.index == 0)
    warnings.simplefilter("ignore")  # what they say is among the notes
    copied = partial(copy, memory=options.memory, worker=worker, tell=bar.add, **_wanted(options))
    report = copied(dry_run=True)
    if not options.dry_run:
        bar.total = report.bytes_written
        report = copied(verify=options.verify)
        bar.end()
    if worker.index == 0:
        _show(report, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distckpt.reshard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="a run or a step of one (path or URI), a DCP directory, a DeepSpeed tag, ...")
    add("destination", metavar="DST", help="a run's directory or URI, a directory, or a file, by --to")
    add(
        "--to",
        choices=("distckpt", "dcp", "deepspeed", "safetensors", "torch"),
        help="format (default: by the name of DST)",
    )
    add("--world-size", type=_positive, metavar="N", help="files to divide tensors over; ranks of a DeepSpeed engine")
    add("--dtype", type=lambda name: _DTYPES.get(name, name), help="of the model's floating-point tensors: bf16, ...")
    add("--only", action="append", metavar="PART", help="part to keep, such as model (may be given again)")
    add("--rename", action="append", type=_pair, metavar="REGEX=NEW", default=[], help="for names of parameters")
    add("--step", type=int, help="step of a run to read; or what a foreign SRC is called in a run")
    add("--zero-stage", type=int, choices=range(4), help="of the engine that will load the tag (--to deepspeed)")
    add("--tag", help="what the tag is called (default: global_stepN)")
    add("--round-robin", action="store_true", help="that engine has round_robin_gradients")
    add("--frozen", action="append", default=[], metavar="NAME", help="parameter without gradients (--zero-stage 3)")
    add("--sub-group-size", type=_positive, metavar="N", help="of that engine (--zero-stage 3)")
    add("--param-order", type=_order, metavar="FILE", help="JSON: names of the optimizer's parameters, a list a group")
    add(
        "--name",
        action="append",
        type=_pair,
        metavar="ENTRY=LEAD",
        default=[],
        help="entry of SRC that is the model...",
    )
    add("--shard-size", type=_bytes, metavar="SIZE", help="most bytes of a safetensors file (5GB)")
    add("--memory", type=_bytes, metavar="SIZE", help="most bytes of buffers, such as 2GB")
    add("--workers", type=_positive, default=1, help="processes on this machine")
    add("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait for others while nothing comes")
    add("--verify", action="store_true", help="check SRC's records first, and read the result back")
    add("--dry-run", action="store_true", help="print the plan, write nothing")
    add("--json", action="store_true", help="print a line of JSON instead of text")
    return parser


_OF_FORMAT = {
    "zero_stage": ["deepspeed"],
    "tag": ["deepspeed"],
    "round_robin": ["deepspeed"],
    "frozen": ["deepspeed"],
    "sub_group_size": ["deepspeed"],
    "shard_size": ["safetensors"],
    "world_size": ["deepspeed", "distckpt", "dcp"],
}
"""Options that only some formats have."""


def _refuse_unused(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program if an option is given that would change nothing."""
    to = options.to or _format_of(options.destination)
    for option, formats in _OF_FORMAT.items():
        if getattr(options, option) not in (None, False, []) and to not in formats:
            parser.error(f"--{option.replace('_', '-')} is for --to {' or '.join(formats)}, not {to}")


def _wanted(options: argparse.Namespace) -> dict[str, Any]:
    from distckpt.tools.copy import Source, format_of
    from distckpt.tools.formats import DeepSpeed, Safetensors
    from distckpt.tools.view import Change

    name, dtype, files = options.to or _format_of(options.destination), options.dtype, options.world_size
    to: Any = name
    if name == "deepspeed":
        frozen, robin = tuple(options.frozen), options.round_robin
        to = DeepSpeed(options.zero_stage, files, dtype, options.tag, round_robin=robin, frozen=frozen)
        to = replace(to, sub_group_size=options.sub_group_size) if options.sub_group_size else to
        dtype = files = None
    elif name == "safetensors" and options.shard_size is not None:
        to = Safetensors(options.shard_size)
    order = tuple(tuple(group) for group in options.param_order) if options.param_order else None
    return {
        "source": Source(options.source, options.step, tuple(options.name), order),
        "destination": options.destination,
        "to": format_of(to),
        "change": Change(
            only=tuple(options.only) if options.only else None, rename=tuple(options.rename), dtype=dtype, files=files
        ),
    }


def _format_of(destination: str) -> str:
    if destination.endswith(".safetensors"):
        return "safetensors"
    return "torch" if destination.endswith((".pt", ".pth", ".bin")) else "distckpt"


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
    match = re.fullmatch(r"([0-9.]+) *([kmgt]i?)?b?", text.strip().lower())
    try:
        return int(float(match[1]) * _UNITS[match[2] or ""]) if match else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: a size such as 2GB or 500MB is expected") from None


def _pair(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if not equals or not left:
        raise argparse.ArgumentTypeError(f"{text!r}: two names with = between them are expected")
    return left, right


def _place() -> tuple[int, int]:
    """(rank, ranks) of a job that torchrun or srun has started, else (0, 1): a batch script is a task by itself."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if os.environ.get(rank, "").isdecimal() and os.environ.get(count, "").isdecimal():
            return int(os.environ[rank]), int(os.environ[count])
    return 0, 1


def _show(report: CopyReport, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps({"dry_run": options.dry_run, **asdict(report)}))
        return
    verb = "would write" if options.dry_run else "wrote"
    size = sum(report.files.values())
    print(f"{verb} {report.destination}: {len(report.files)} files, {size / 1e6:,.1f} MB in {report.seconds:.1f} s")
    for name, nbytes in report.files.items() if options.dry_run else ():
        print(f"  {name}: {nbytes:,} bytes")
    for note in report.notes:
        print(f"  note: {note}")


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


if __name__ == "__main__":
    sys.exit(main())
