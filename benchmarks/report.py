"""What a benchmark tells: tables and ratios, printed, written as JSON, drawn. The last line is one line of JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.rounds import OURS, Ratio, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.rounds import Series

PACKAGES = (
    *("torch", "safetensors", "deepspeed", "torch-checkpointing", "torchsnapshot-nightly", "bytecheckpoint"),
    *("obstore", "s3fs", "s3torchconnector"),
)


@dataclass(slots=True)
class Table:
    """A title, and rows of text; the first has the names of the columns."""

    title: str
    rows: list[list[str]]

    def __str__(self) -> str:
        ruler = ["---", *["---:"] * (len(self.rows[0]) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.rows[0], ruler, *self.rows[1:])]
        return "\n".join([f"\n{self.title}\n", *lines])


@dataclass(slots=True)
class Report:
    """What one benchmark found. `series`: every sample, by where and what."""

    bench: str
    ratios: dict[str, Ratio] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[Series]] = field(default_factory=dict)

    def add(self, title: str, found: list[Series], act: str, nbytes: int) -> None:
        """A table of one act of every program."""
        self.series[title] = found
        self.tables.append(Table(title, _rows(found, act, nbytes)))
        self.notes += [f"{title}: {s.program} has no figures: {s.why_not}" for s in found if s.why_not]

    def last_line(self) -> str:
        """The one line of JSON that ends the output."""
        return json.dumps({"bench": self.bench, "ratios": {k: round(r.median, 4) for k, r in self.ratios.items()}})

    def __str__(self) -> str:
        lines = [*map(str, self.tables), ""]
        lines += [f"{key}: {found}" for key, found in self.ratios.items()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)])


def _rows(found: Sequence[Series], act: str, nbytes: int) -> list[list[str]]:
    ours = next(s for s in found if s.program == OURS)
    rows = [["program", "GB/s", "ours over it", "first, s", "CPU, s", "memory, MiB", "read, MB", "written, MB"]]
    for series in found:
        if series.why_not:
            rows.append([series.program, series.why_not.partition("; ")[0][:100], *[""] * 6])
            continue
        moved = [
            f"{series.median(act, f'{way}_called') / 1e6:.0f} ({series.median(act, f'{way}_stored') / 1e6:.0f})"
            for way in ("read", "written")
        ]
        rows.append(
            [
                series.program,
                f"{nbytes / series.median(act) / 1e9:.2f}",
                str(ratio(series, ours, act)) if ours.rounds and series is not ours else "",
                f"{series.first[act].seconds:.2f}",
                f"{series.median(act, 'cpu'):.2f}",
                f"{series.median(act, 'memory') / 2**20:.0f}",
                *moved,
            ]
        )
    return rows


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, Any]:
    """Machine and versions, as they are written beside figures."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def write(reports: Sequence[Report], ranks: int, path: Path) -> None:
    """Write everything as JSON to a file, and a picture beside it."""
    drawn = draw(reports, path.with_suffix(".png"))
    content = {"machine": machine(), "ranks": ranks, "picture": drawn, "benches": [asdict(r) for r in reports]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{path}; picture: {drawn}")


def draw(reports: Sequence[Report], path: Path) -> str:
    """Draw every ratio over a program, with its spread; returns the file's name, or why there is none."""
    try:
        import matplotlib as mpl

        mpl.use("agg")
        from matplotlib import pyplot as plt
    except ImportError as e:
        return f"none: {e} (pip install matplotlib)"
    found = [(f"{r.bench}: {key}", x) for r in reports for key, x in r.ratios.items() if "vs_" in key]
    if not found:
        return "none: there is no ratio over another program to draw"
    names, bars = [name for name, _ in found], [x for _, x in found]
    spread = [[x.median - x.low for x in bars], [x.high - x.median for x in bars]]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.25 * len(found)))
    axes.barh(names, [x.median for x in bars], xerr=spread, color="#4878a8", ecolor="#333333")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("their time over ours: right of 1 is better")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name
