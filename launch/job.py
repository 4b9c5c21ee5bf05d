"""A torchrun job on this machine that can be killed whole, and leaves no process behind whatever happens (Linux).

torchrun starts each rank in a session of its own, so killing its process group would leave the ranks training.
A job's processes are known by a mark in their environment instead, which whatever they start inherits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_MARK = "DISTCKPT_DEMO_JOB"
_PR_SET_PDEATHSIG = 1


class Job:
    """`python -m MODULE ARGS` on `ranks` ranks of this machine, as a context manager: leaving it kills what is left.

    Output goes to the end of the file `log`. OSError if torchrun cannot be started.
    """

    def __init__(self, module: str, *args: str, ranks: int, log: Path) -> None:
        self.log = log
        self.started = time.time()
        self._mark = f"{_MARK}={secrets.token_hex(8)}"
        self._seen: list[int] = []
        prctl = ctypes.CDLL(None).prctl  # looked up here: the child must not load libraries between fork and exec
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        with log.open("ab") as out:
            self._process = subprocess.Popen(
                [*torchrun, "-m", module, *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | dict([self._mark.split("=")]) | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
                # if this process is itself killed, torchrun is told to end, and ends its ranks; prctl takes no lock
                preexec_fn=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
            )

    def poll(self) -> int | None:
        """Exit status of torchrun; None while it runs."""
        return self._process.poll()

    def look(self) -> list[int]:
        """Ids of the job's processes. `kill` is fastest soon after a look: it begins with those that were seen."""
        self._seen = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and self._owns(int(p.name))]
        return self._seen

    def kill(self) -> None:
        """SIGKILL every process of the job, the ranks within a fraction of a millisecond; return when none is left."""
        self._kill(self._seen)
        deadline = time.monotonic() + 30
        while self.look():
            self._kill(self._seen)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {self._seen} of {self.log} do not die")
            time.sleep(0.005)
        self._process.wait(30)

    def _kill(self, pids: list[int]) -> None:
        # torchrun, whose id is the lowest, first: it would otherwise notice the ranks' deaths
        for pid in sorted(pids):
            if self._owns(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _owns(self, pid: int) -> bool:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            return False
        return self._mark.encode() in environment.split(b"\0")

    def tail(self, lines: int = 30) -> str:
        """Last lines of the log, with its name."""
        last = self.log.read_text(errors="replace").splitlines()[-lines:]
        return "\n".join([f"--- end of {self.log}", *last])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
