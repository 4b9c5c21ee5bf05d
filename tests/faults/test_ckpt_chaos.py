"""ckpt-chaos, a harness by others: it kills launch/train_fsdp.py at file calls of a save, and finds nothing to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULT = 'sh -c "cd {out}/step-00000004 && find . -type f ! -name commit.json | sort | xargs cat | sha256sum"'
SMALL = "--steps 4 --every 1 --width 48 --layers 1 --seq 16 --text-bytes 2000 --global-batch 4"


def harness(work, ranks, crash_rank, points):
    """Run it; it must find something to kill, and no fault."""
    alone = ["env", "RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1", "MASTER_PORT=0"] if ranks == 1 else []
    options = {
        "work": work,
        "max-points": points,
        "modes": "before",  # it tears only what is written through open() and torch.save
        "ranks": ranks,
        "crash-rank": crash_rank,
        "timeout": 300,
        "checkpoint-glob": "{out}/step-*",
        "step-regex": r"step (\d+): \d+ tensors",
        "result-cmd": RESULT,
        "fail-on": "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL",
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [*alone, sys.executable, "-m", "tests.faults.watched", "--root", "{out}", *SMALL.split()]
    ended = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", *given, "--", *command],
        cwd=ROOT,
        # it forgets to tell the rank that is to die that it is the one
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CKPT_CHAOS_CRASH_RANK": str(crash_rank)},
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = [json.loads(path.read_text()) for path in work.glob("pt_*/result.json")]
    assert sum(one["crashed"] for one in found) == len(found) - 1 == points
    assert max(one["outcome"]["newest_complete_step"] for one in found) >= 3, "it took no checkpoint for whole"


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "crash_rank", "points"), [(1, 0, 12), (2, 0, 6), (2, 1, 6)])
def test_ckpt_chaos_finds_no_failure_divergence_or_lost_work(tmp_path, ranks, crash_rank, points):
    harness(tmp_path / "work", ranks, crash_rank, points)
