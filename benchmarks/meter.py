"""What one timed act cost: wall time, CPU, memory, bytes; of all ranks together, their child processes included."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.ranks import World

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class Failed(Exception):
    """An act raised on some rank; the text says where and what."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One act: seconds of the slowest rank; CPU seconds and bytes of all ranks; memory of the hungriest.

    memory: growth of the peak of resident bytes. called: bytes that went through read and write calls; stored: that
    went from and to the device.
    """

    seconds: float
    cpu: float
    memory: int
    read_called: int
    written_called: int
    read_stored: int
    written_stored: int


def measure(world: World, act: Callable[[], object]) -> Sample:
    """Time an act that every rank does. Collective; raises Failed on every rank if one rank's raises."""
    error = ""
    world.barrier()
    _forget_peak()
    resident, before, started = _status("VmRSS"), _usage(), time.perf_counter()
    try:
        act()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as e:  # noqa: BLE001  it is raised on every rank, below
        error = f"rank {world.rank}: {type(e).__name__}: {e}"
    seconds = time.perf_counter() - started
    spent = [b - a for a, b in zip(before, _usage(), strict=True)]
    mine = (error, seconds, spent, max(0, _status("VmHWM") - resident))
    told = world.gather(mine)
    if errors := [e for e, *_ in told if e]:
        raise Failed("; ".join(errors[:4]))
    cpu, *moved = (sum(column) for column in zip(*(usage for _, _, usage, _ in told), strict=True))
    return Sample(max(s for _, s, _, _ in told), cpu, max(m for *_, m in told), *map(int, moved))


def seconds(act: Callable[[], object]) -> float:
    """Wall time of an act of this process alone."""
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _usage() -> list[float]:
    """[CPU seconds, bytes by read calls, by write calls, from the device, to it] of this process and its children."""
    found = [time.process_time(), *_io("self")]
    found[0] += sum(os.times()[2:4])
    for pid in descendants():
        try:
            numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            child = [sum(map(int, numbers[11:15])) * _TICK, *_io(str(pid))]
        except (FileNotFoundError, ProcessLookupError):  # it has ended since, and is counted by who waited for it
            continue
        found = [a + b for a, b in zip(found, child, strict=True)]
    return found


def descendants(pid: str = "self") -> list[int]:
    """Processes that a process started, and those that they did."""
    children: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # a thread that has ended since
                children += map(int, (task / "children").read_text().split())
    return [*children, *(below for child in children for below in descendants(str(child)))]


def _io(pid: str) -> list[float]:
    """Bytes by read calls, by write calls, from the device, to it. Zeros where the kernel does not tell."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except (PermissionError, FileNotFoundError):
        return [0, 0, 0, 0]
    told = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    return [told["rchar"], told["wchar"], told["read_bytes"], told["write_bytes"]]


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak is that of the process's life, and what grows beyond it is still seen
        return


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


COLUMNS = tuple(f.name for f in fields(Sample))
