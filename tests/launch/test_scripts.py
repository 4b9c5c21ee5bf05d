"""The scripts of launch/, without starting anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck") and os.environ.get("CI") != "true":
        pytest.skip("shellcheck is not installed")
    scripts = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/**/*.sbatch"), ROOT / ".ci" / "run"])
    assert len(scripts) > 6
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


_NAPS = "for i in {1..200}; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("child", "told", "code"),
    [
        ("exit 0", None, 0),
        ("exit 7", None, 7),
        (_NAPS, signal.SIGTERM, 75),  # killed by it, before there was anything to save
        (_NAPS, signal.SIGUSR1, 75),
        (f"trap : INT; {_NAPS.replace('200', '20')}; exit 1", signal.SIGINT, 76),
        (f"trap : TERM; {_NAPS.replace('200', '20')}; exit 76", signal.SIGTERM, 76),
        (f"trap : TERM; {_NAPS.replace('200', '20')}; exit 0", signal.SIGTERM, 0),
    ],
)
def test_a_command_gets_its_signals_and_its_end_is_the_scripts(child, told, code):
    script = f'source {ROOT}/launch/forward.sh; forward bash -c "$1"; exit "$code"'
    command = ["bash", "-c", script, "-", f"echo up; {child}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        if told:
            time.sleep(0.1)  # until the child has its traps
            process.send_signal(told)
        assert process.wait(20) == code
