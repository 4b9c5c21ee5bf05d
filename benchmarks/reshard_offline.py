"""Offline conversions beside the peers': seconds, bytes moved, peak memory, files. A DeepSpeed tag and a DCP directory.

Every program is a process of its own that imports what it needs first: seconds, bytes (/proc/self/io) and memory are
counted from there on, memory as the growth of the peak of resident bytes. Each round runs every program once, in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.report import Report, Table
from benchmarks.rounds import Ratio

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.ranks import World

_COMMON = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
def status(name, path="/proc/self/status"):
    return next(int(line.split()[1]) for line in open(path) if line.startswith(name))
def measure(work):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS"), status("rchar", "/proc/self/io"), status("wchar", "/proc/self/io")
    started = time.monotonic()
    work()
    os.sync()
    took = time.monotonic() - started
    after = status("VmHWM"), status("rchar", "/proc/self/io"), status("wchar", "/proc/self/io")
    told = [took, (after[0] - before[0]) / 1024, (after[1] - before[1]) / 1e6, (after[2] - before[2]) / 1e6]
    print("MEASURED " + json.dumps(told))
"""

_TAG = """
import torch, torch.distributed as dist, deepspeed
from torch import nn
rank, size, folder, width, depth = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size), CROSS_RANK="0",
                  CROSS_SIZE="1", LOCAL_WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29599")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
deepspeed.init_distributed("gloo", verbose=False)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
config = {"train_batch_size": size, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True,
          "zero_force_ds_cpu_optimizer": False, "bf16": {"enabled": True}, "steps_per_print": 10**9}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(torch.ones(1, width, dtype=torch.bfloat16)).float().square().mean())
engine.step()
engine.save_checkpoint(folder, tag="tag")
"""

_DCP = """
import torch
from torch.distributed.checkpoint import save
folder, width, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = {f"{i}.weight": torch.randn(width, width) for i in range(3 * depth)}
save({"model": model}, checkpoint_id=folder, no_dist=True)
"""

PROGRAMS = {
    "tag -> run": {
        "distckpt": "from distckpt.tools.copy import copy\nmeasure(lambda: copy(tag, out, to='distckpt'))",
        "ds_to_universal": (
            "from deepspeed.checkpoint import ds_to_universal as d\nfrom argparse import Namespace\n"
            "args = Namespace(input_folder=tag, output_folder=out, num_extract_workers=1, num_merge_workers=1, "
            "keep_temp_folder=False, strict=False, inject_missing_state=True)\nmeasure(lambda: d.main(args))"
        ),
    },
    "tag -> weights": {
        "distckpt": (
            "from distckpt.tools.copy import Change, copy\n"
            "measure(lambda: copy(tag, out, 'safetensors', change=Change(only=('model',))))"
        ),
        "zero_to_fp32": (
            "from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as convert\n"
            "measure(lambda: convert(os.path.dirname(tag), out, max_shard_size=None, tag='tag'))"
        ),
    },
    "DCP -> .pt": {
        "distckpt": "from distckpt.tools.copy import copy\nmeasure(lambda: copy(dcp, out, to='torch'))",
        "dcp_to_torch_save": (
            "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save as convert\n"
            "measure(lambda: convert(dcp, out))"
        ),
    },
}
"""Conversion -> program -> what it does."""


def reshard_offline(world: World, options: Options) -> Report:
    """Convert on rank 0, while the others wait. `options.nbytes`: of masters and moments together."""
    report = Report("reshard-offline")
    with options.media(world) as media:
        if world.rank == 0:
            _convert(report, media["disk"], options)
        world.barrier()
    return report


def _convert(report: Report, root: Path, options: Options) -> None:
    width = 1024
    depth = max(1, options.nbytes // (3 * 4 * width * width))
    _make_sources(root, width, depth)
    for conversion, programs in PROGRAMS.items():
        seen: dict[str, list[list[float]]] = {name: [] for name in programs}
        for _ in range(options.rounds):
            for name, code in programs.items():
                seen[name].append(_measured(root, code))
        title = f"{conversion} (masters and moments: {options.nbytes / 1e6:.0f} MB)"
        report.tables.append(_table(title, seen))
        ours, (peer, theirs) = seen["distckpt"], next((n, r) for n, r in seen.items() if n != "distckpt")
        report.ratios[f"disk.vs_{peer}"] = Ratio.of([t[0] / o[0] for o, t in zip(ours, theirs, strict=True)])


def _make_sources(root: Path, width: int, depth: int) -> None:
    (root / "ds").mkdir()
    ranks = [_start(_TAG, str(rank), "2", str(root / "ds"), str(width), str(depth)) for rank in range(2)]
    if sum(rank.wait(timeout=600) != 0 for rank in ranks):
        raise RuntimeError("DeepSpeed could not make the tag to convert")
    if _start(_DCP, str(root / "dcp"), str(width), str(depth)).wait(timeout=600):
        raise RuntimeError("DCP could not make the directory to convert")


def _start(code: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _COMMON + code, *arguments], stdout=subprocess.DEVNULL)


def _measured(root: Path, code: str) -> list[float]:
    """[seconds, MB of memory, MB read, MB written, files] of one program."""
    out = root / "out"
    places = f"tag, dcp, out = {str(root / 'ds' / 'tag')!r}, {str(root / 'dcp')!r}, {str(out)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", _COMMON + "import torch\n" + places + code],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = next((line for line in done.stdout.splitlines() if line.startswith("MEASURED ")), None)
    if done.returncode or told is None:
        raise RuntimeError(f"{code}\n{done.stderr[-2000:]}")
    files = 1 if out.is_file() else sum(p.is_file() for p in out.rglob("*"))
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return [*json.loads(told.removeprefix("MEASURED ")), files]


def _table(title: str, seen: dict[str, list[list[float]]]) -> Table:
    rows = [["program", "seconds", "memory, MB", "read, MB", "written, MB", "files"]]
    for name, rounds in seen.items():
        seconds, *counts = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append([name, f"{seconds:.2f}", *(f"{count:.0f}" for count in counts)])
    return Table(title, rows)
