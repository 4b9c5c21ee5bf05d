"""The training program under torchrun, killed in the middle of a save and started again: what it promises, it keeps."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from launch import demo
from launch.lives import Plan, Run, Screen

ROOT = Path(__file__).parent.parent.parent
STEPS = 10


@pytest.mark.timeout(300)
def test_a_torchrun_job_killed_in_a_save_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plans = {
        "base": Plan(phase="base", dropout=0.1, ranks=(2,)),
        "killed": Plan(phase="killed", dropout=0.1, ranks=(2, 2), kills=(4,)),
    }
    with closing(Screen(2 * STEPS)) as screen:
        runs = {name: Run(tmp_path, plan, STEPS, screen) for name, plan in plans.items()}
        for run in runs.values():
            run.go()
    assert any(life.cut for life in runs["killed"].lives)
    exact = {row["step"]: row["hex"] for row in runs["base"].rows}
    assert set(exact) == set(range(1, STEPS + 1))
    assert all(row["hex"] == exact[row["step"]] for row in runs["killed"].rows)
    assert not demo.differing_chunks(*(run.committed()[STEPS] for run in runs.values()))


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_whole_demo_holds_every_promise(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout
    assert (tmp_path / "losses.png").stat().st_size > 10_000
