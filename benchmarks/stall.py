"""Asynchronous saves: how long they block the trainer, and how much they slow it while they are written.

A stall is compared with one copy of the rank's bytes into touched memory. The loops run on one rank, with its share of
the bytes and a core of its own, beside each writer in turn and beside `dd` of as many bytes; what is compared is CPU
time a step, which does not count waiting for a core.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from benchmarks import rounds
from benchmarks.meter import Sample, measure
from benchmarks.peers_async import (
    PATIENCE,
    AsyncDcp,
    AsyncDcpProcess,
    AsyncDistckpt,
    AsyncTorchCheckpointing,
    Dd,
    Memcpy,
)
from benchmarks.report import Report, Table
from benchmarks.rounds import OURS, Ratio
from benchmarks.workload import Sharded

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.ranks import Ranks, World

STALLS = (AsyncDistckpt, AsyncDcp, AsyncDcpProcess, AsyncTorchCheckpointing, Memcpy)
LOOPS = (AsyncDistckpt, AsyncDcp, Dd)
"""DCP's process is bound to the ranks that it was started with, so it cannot save for the one rank of a loop."""


def stall(ranks: Ranks, options: Options) -> Report:
    """Stalls on all ranks, then the loops on one."""
    report = Report("async")
    with ranks.world() as world:
        if world:
            _stalls(world, options, report)
    with ranks.world(1) as world:
        if world:
            _loops(world, replace(options, nbytes=options.nbytes // ranks.size), report)
    return report


def _stalls(world: World, options: Options, report: Report) -> None:
    tensors = Sharded.large(world, options.nbytes)

    def once(peer: AsyncDistckpt, folder: Path) -> dict[str, Sample]:
        blocked = measure(world, lambda: peer.stall(folder))
        finished = measure(world, lambda: peer.finish(folder))
        if folder.name == f"step-{0:08d}":
            peer.open(folder)
            rounds.load_once(peer, folder)
        return {"stall": blocked, "finish": finished}

    with options.media(world) as media:
        for medium, base in media.items():
            found = rounds.run(world, tensors, base, STALLS, once=once, count=options.rounds)  # type: ignore[arg-type]
            ran = {s.program: s for s in found if s.rounds}
            title = f"stall of an async save to {medium}: {world.size} ranks, {tensors.nbytes / 1e6:.0f} MB"
            report.add(title, found, "stall", tensors.nbytes)
            if OURS not in ran:
                continue
            lead, ours = f"{medium}." if medium != "disk" else "", ran[OURS]
            report.ratios[f"{lead}stall_over_memcpy"] = rounds.ratio(ours, ran["memcpy"], "stall")
            later = ours.median("stall")
            report.ratios[f"{lead}first_stall_over_later"] = Ratio.of([ours.first["stall"].seconds / later])
            keys = {"DCP async": "vs_dcp_async", "DCP async, process": "vs_dcp_async_process"}
            keys |= {"torch_checkpointing async": "vs_torch_checkpointing_async"}
            for program in (p for p in keys if p in ran):
                report.ratios[f"{medium}.{keys[program]}"] = rounds.ratio(ran[program], ours, "stall")


def _python_step() -> None:
    """A step bound by the interpreter."""
    total = 0
    for i in range(20_000):
        total += i * i % 7


class _TorchStep:
    """A step bound by torch's arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._a = torch.rand(384, 384, device=device)

    def __call__(self) -> None:
        self._a = (self._a @ self._a).clamp_(0, 1e-2).add_(1e-3)


def _loops(world: World, options: Options, report: Report) -> None:
    rows = [["loop", "program", "CPU ms a step", "more than beside dd", "steps a second"]]
    steps: dict[str, Callable[[], None]] = {"Python": _python_step, "torch": _TorchStep(world.device)}
    with options.media(world) as media:
        for loop, step in steps.items():
            paces = _beside(world, media["disk"] / loop, step, options, report)
            for program, found in paces.items():
                pairs = zip(found, paces[Dd.name], strict=True)
                slowdown = Ratio.of([own[0] / beside[0] - 1 for own, beside in pairs])
                cpu, speed = (Ratio.of(column).median for column in zip(*found, strict=True))
                rows.append([loop, program, f"{cpu * 1e3:.2f}", str(slowdown), f"{speed:.0f}"])
                if program == OURS:
                    report.ratios[f"loop_slowdown_{loop.lower()}"] = slowdown
    report.tables.append(Table("a loop on one core while the writer works", rows))
    ours = [found for key, found in report.ratios.items() if key.startswith("loop_slowdown_")]
    if ours:
        report.ratios["loop_slowdown"] = max(ours, key=lambda r: r.median)


def _beside(
    world: World, base: Path, step: Callable[[], None], options: Options, report: Report
) -> dict[str, list[tuple[float, float]]]:
    """The pace of a loop beside each program, by round."""
    paces: dict[str, list[tuple[float, float]]] = {}

    def once(peer: AsyncDistckpt, folder: Path) -> dict[str, Sample]:
        measure(world, lambda: peer.stall(folder))
        paces.setdefault(peer.name, []).append(_pace(peer, step))
        return {"finish": measure(world, lambda: peer.finish(folder))}

    tensors = Sharded.large(world, options.nbytes)
    found = rounds.run(world, tensors, base, LOOPS, once=once, count=options.rounds)  # type: ignore[arg-type]
    report.notes += [f"loop: {s.program} has no figures: {s.why_not}" for s in found if s.why_not]
    return {s.program: paces[s.program][1:] for s in found if s.rounds}


def _pace(peer: AsyncDistckpt, step: Callable[[], None]) -> tuple[float, float]:
    """(CPU seconds of this thread a step, steps a second) while the writer works, and at least for ten steps."""
    count, cpu, started = 0, time.thread_time(), time.perf_counter()
    while count < 10 or (peer.busy() and time.perf_counter() - started < PATIENCE):
        step()
        count += 1
    return (time.thread_time() - cpu) / count, count / (time.perf_counter() - started)
