"""Durable save and load of one rank, beside torch.save, DCP, safetensors and plain system calls.

Each round runs every program once, in turn, on the same tensors; figures are medians, ratios are of one round. Every
save ends with fsync of the file and its directory. A cold load follows POSIX_FADV_DONTNEED on every file.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distckpt import Checkpointer, TrainState
from distckpt.state import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Tensors = dict[str, torch.Tensor]
SETS = {"256 MiB in 32 tensors": (32, 8 << 20), "256 MiB in 8,192 tensors": (8192, 32 << 10)}


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class _Model(nn.Module):
    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        for name, t in tensors.items():
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))


def _ours(folder: Path, tensors: Tensors) -> tuple[Callable[[], object], Callable[[], object]]:
    checkpointer = Checkpointer(folder)
    state = TrainState(model=_Model(tensors), rng=False)
    return lambda: checkpointer.save(1, state), lambda: checkpointer.load(state)


def _torch(folder: Path, tensors: Tensors) -> tuple[Callable[[], object], Callable[[], object]]:
    path = folder / "all.pt"

    def save() -> None:
        torch.save(tensors, path)
        _sync(path)

    def load() -> None:
        for name, t in torch.load(path, weights_only=True).items():
            tensors[name].copy_(t)

    return save, load


def _safetensors(folder: Path, tensors: Tensors) -> tuple[Callable[[], object], Callable[[], object]]:
    path = folder / "all.safetensors"

    def save() -> None:
        save_file(tensors, path)
        _sync(path)

    def load() -> None:
        for name, t in load_file(path).items():
            tensors[name].copy_(t)

    return save, load


def _dcp(folder: Path, tensors: Tensors) -> tuple[Callable[[], object], Callable[[], object]]:
    return (
        lambda: dcp_save(tensors, checkpoint_id=folder, no_dist=True),
        lambda: dcp_load(tensors, checkpoint_id=folder, no_dist=True),
    )


def _raw(folder: Path, tensors: Tensors) -> tuple[Callable[[], object], Callable[[], object]]:
    path = folder / "raw"
    views = [as_bytes(t) for t in tensors.values()]

    def save() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        position = 0
        for i in range(0, len(views), 256):
            wanted = sum(map(len, views[i : i + 256]))
            done = os.pwritev(descriptor, views[i : i + 256], position)
            assert done == wanted
            position += done
        os.fsync(descriptor)
        os.close(descriptor)
        _sync(path)

    def load() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        position = 0
        for i in range(0, len(views), 256):
            position += os.preadv(descriptor, views[i : i + 256], position)
        os.close(descriptor)

    return save, load


PROGRAMS = {"distckpt": _ours, "torch.save": _torch, "DCP": _dcp, "safetensors": _safetensors, "raw": _raw}


def _forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _seconds(fn: Callable[[], object]) -> float:
    started = time.perf_counter()
    fn()
    return time.perf_counter() - started


def _round(base: Path, tensors: Tensors, found: dict[str, dict[str, list[float]]]) -> None:
    for name, program in PROGRAMS.items():
        folder = Path(tempfile.mkdtemp(prefix="bench-", dir=base))
        save, load = program(folder, tensors)
        times = found.setdefault(name, {"save": [], "warm load": [], "cold load": []})
        times["save"].append(_seconds(save))
        times["warm load"].append(_seconds(load))
        _forget(folder)
        times["cold load"].append(_seconds(load))
        shutil.rmtree(folder)


def _ratio(ours: Iterable[float], theirs: Iterable[float]) -> float:
    return statistics.median(t / o for o, t in zip(ours, theirs, strict=True))


def run(folder: str, rounds: int) -> None:
    """Print a table for each set of tensors."""
    for title, (count, nbytes) in SETS.items():
        tensors = {f"w{i}": torch.randn(nbytes // 4) for i in range(count)}
        found: dict[str, dict[str, list[float]]] = {}
        with tempfile.TemporaryDirectory(prefix="distckpt-bench-", dir=folder) as base:
            for i in range(rounds + 1):
                _round(Path(base), tensors, found)
                if i == 0:
                    found.clear()  # a warm-up: imports, first touches
        print(f"\n{title}, durable, median of {rounds} rounds: GB/s (and distckpt's speed over it)")
        print("| program | save | warm load | cold load |\n| --- | ---: | ---: | ---: |")
        for name, times in found.items():
            cells = [
                f"{count * nbytes / statistics.median(times[k]) / 1e9:.2f} ({_ratio(ours, times[k]):.2f}x)"
                for k, ours in found["distckpt"].items()
            ]
            print(f"| {name} | {' | '.join(cells)} |")
