"""The GPUs of this machine, as nvidia-smi tells. None where there is no nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass

_ASKED = ("index", "utilization.gpu", "memory.used", "memory.total")
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """busy: percent. used, total: MiB. None: not told."""

    index: int
    busy: float | None
    used: float | None
    total: float | None


def gpus() -> list[Gpu]:
    """What nvidia-smi tells of each GPU. Empty where it is missing, or fails."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    try:
        told = subprocess.run(  # noqa: S603  the driver's own program
            [program, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in told.stdout.splitlines()]
    return [Gpu(int(row[0]), *map(_number, row[1:])) for row in rows if len(row) == len(_ASKED) and row[0].isdigit()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # "[N/A]"
