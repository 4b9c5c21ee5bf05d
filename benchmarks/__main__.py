"""`python -m benchmarks NAME`: distckpt beside its peers, in one run. benchmarks/README.md says what each measures."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.object_server import SERVERS
from benchmarks.ranks import Ranks, launch, launched, leave

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report import Report

BENCHES = {
    "save": "saving.save",
    "async": "stall.stall",
    "load": "saving.load",
    "reshard": "reshard.reshard",
    "small": "saving.small",
    "partial": "partial.partial",
    "replicated": "replicated.replicated",
    "integrity": "integrity.integrity",
    "object": "objects.objects",
    "step": "step.step",
    "plan": "plan.plan",
    "reshard-offline": "reshard_offline.reshard_offline",
}
"""Name of a benchmark -> its function."""

RESIZES = ("async", "reshard")
"""Benchmarks that need other numbers of ranks, too: given all ranks, they join what they need."""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument(
        "--quick", action="store_true", help="a few MB and two rounds: shows that it runs, proves nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, and a picture beside it")
    parser.add_argument("--gb", type=float, help="size of the state over all ranks (0.5)")
    parser.add_argument("--ranks", type=int, help="ranks (2; one a GPU where there are some)")
    parser.add_argument("--rounds", type=int, help="rounds; each runs every program once, in turn (5; above 1 GB 3)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to write: the disk that is measured")
    parser.add_argument("--server", choices=SERVERS, help="of `object`: the only store to measure on (all there are)")
    return parser.parse_args(argv)


def main() -> int:
    """Run what the command line names: under torchrun as one of its ranks, else by starting torchrun."""
    asked = parse()
    if not launched():
        return launch(asked.ranks or default_ranks(), sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to stop"))  # so that scratch folders are removed
    status = 1
    try:
        run_all(asked, Ranks.of_launch())
        status = 0
    except BaseException:  # noqa: BLE001  leave() would not show it
        traceback.print_exc()
    return leave(status)


def run_all(asked: argparse.Namespace, ranks: Ranks) -> None:
    """Run every benchmark asked for; rank 0 prints, writes, and ends with the line of JSON."""
    names = list(BENCHES) if asked.name == "all" else [asked.name]
    reports = [report for name in names if (report := run(name, ranks, asked))]
    if ranks.rank:
        return
    from benchmarks.report import write

    if asked.json:
        write(reports, ranks.size, asked.json)
    if asked.name == "all":
        together = {f"{r.bench}.{key}": round(x.median, 4) for r in reports for key, x in r.ratios.items()}
        print(json.dumps({"bench": "all", "ratios": together}))
    else:
        print(reports[0].last_line())


def default_ranks() -> int:
    """Ranks of a launch on this machine: one a GPU, else two."""
    import torch

    return torch.cuda.device_count() or 2


def run(name: str, ranks: Ranks, asked: argparse.Namespace) -> Report | None:
    """Run one benchmark on all ranks; rank 0 prints its tables. None on a rank that took no part."""
    import torch

    from benchmarks.options import Options
    from benchmarks.report import machine

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # peers tell of each step they take
    gb = asked.gb or (0.008 if asked.quick else 0.5)
    options = Options(
        folder=asked.folder,
        nbytes=int(gb * 2**30),
        rounds=asked.rounds or (2 if asked.quick else 5 if gb <= 1 else 3),
        quick=asked.quick,
        server=asked.server,
    )
    module, function = BENCHES[name].split(".")
    act = getattr(import_module(f"benchmarks.{module}"), function)
    report: Report | None = None
    if name in RESIZES:
        report = act(ranks, options)
    else:
        with ranks.world() as world:
            report = act(world, options) if world else None
    if report and ranks.rank == 0:
        print(f"\n# {name}\n{json.dumps(machine())}\n{report}", flush=True)
    return report


if __name__ == "__main__":
    sys.exit(main())
