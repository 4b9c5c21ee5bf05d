"""A writer process and the socket to it, as the training process sees them. One that has ended is not started again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crc32c

from distckpt.errors import StateWarning, StoreError
from distckpt.run.writer import MOST_MESSAGE, NOT_OURS
from distckpt.system import nameless_file, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

_START = """
import sys
sys.path[:] = [p for p in sys.path if p] + {path!r}
from distckpt.run.writer import main
main(sys.argv[1:])
"""
_DYING = 5.0
"""Seconds that a process has to end once it has let go of the socket."""
_LAST_WORDS = 2000


class Line:
    """Starts the process, and does not wait for it. StoreError where the system will not start it.

    timeout: seconds that any wait lasts at most. hold: see Checkpointer, in seconds. `ended`: how the process ended,
    for a message, once it has.
    """

    def __init__(self, timeout: float, hold: float = 0.0) -> None:
        self._timeout, self._owner = timeout, os.getpid()
        self.ended, self._killed = "", False
        try:
            self._words = nameless_file("distckpt-writer")  # what it says on stderr: no pipe, which could fill
            try:
                self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._process = _started(
                        [str(theirs.fileno()), str(self._owner), str(timeout), str(hold)], self._words
                    )
            except BaseException:
                os.close(self._words)
                raise
        except OSError as e:
            raise StoreError(
                f"the writer process, which saves in the background, cannot be started as {sys.executable!r}: {e}; "
                "save with wait=True to do without"
            ) from e
        self._socket.settimeout(timeout)

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Hand a message over. False if the process is gone."""
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(descriptors))
        except OSError:
            return False
        return True

    def wait(self, seconds: float) -> None:
        """Return once there is an answer, or the process is gone; after `seconds` at the latest."""
        with contextlib.suppress(OSError, ValueError):  # another thread has let go of the line
            readable([self._socket.fileno()], seconds)

    def answer(self) -> dict[str, Any] | None:
        """Take an answer; None where there is none now, or none will come: `ended` says which."""
        if self.ended or not readable([self._socket.fileno()]):
            return None
        try:
            data = self._socket.recv(MOST_MESSAGE)
        except OSError:
            data = b""
        if not data:
            self.drop()
            return None
        said: dict[str, Any] = json.loads(data)
        return said

    def finish(self) -> None:
        """Tell the process that nothing more comes, and wait until it has done what it was given; then it is killed."""
        self.send({"do": "end"})
        with contextlib.suppress(OSError):  # it has ended by itself
            self._socket.shutdown(socket.SHUT_WR)
        self._end(self._timeout)

    def drop(self) -> None:
        """Let go of a process that has ended; one that has not by now is killed. Then `ended` says how it ended."""
        if self.ended:
            return
        code = self._end(_DYING)
        said = os.pread(self._words, os.fstat(self._words).st_size, 0)[-_LAST_WORDS:].decode(errors="replace").strip()
        how = f"exit status {code}"
        if code is None:
            how = "it did not answer, and was killed"
        elif code < 0:
            how = f"killed by signal {-code}" + (", often the system's for want of memory" if code == -9 else "")
        self.ended = f"{how}; it said: {said}" if said else how
        self._socket.close()
        os.close(self._words)

    def _end(self, seconds: float) -> int | None:
        """Wait for the process, and kill it after so many seconds. Returns its exit status, None if it was killed."""
        if not self._killed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(seconds)
        self._killed = True
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel
            self._process.wait(_DYING)
        return None

    @property
    def ours(self) -> bool:
        """Whether this process has started it: a forked child leaves its parent's alone."""
        return self._owner == os.getpid()

    def forgotten(self) -> None:
        """End it for somebody who will not: finish, and tell of what nobody is left to raise."""
        if self.ended or not self.ours:
            return
        self.finish()
        failed = []
        while said := self.answer():
            failed += [said["error"][1]] if said.get("error") else []
        self.drop()
        if failed or self.ended != _WELL:
            why = failed[0] if failed else self.ended
            warnings.warn(
                f"a save in the background has failed: {why}. close() the Checkpointer, or use `with`: that raises it",
                StateWarning,
                stacklevel=2,
            )


_WELL = "exit status 0"


def _started(told: list[str], words: int) -> subprocess.Popen[bytes]:
    """Start the process. It finds modules where we do (.pth files, zips), but for Python's own, which come first."""
    ours = [Path(module).parents[depth] for module, depth in ((__file__, 2), (crc32c.__file__, 1))]
    path = [str(Path(entry).absolute()) for entry in [*ours, *sys.path] if isinstance(entry, (str, Path))]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_OURS)  # inherited: it may be told before it can ignore that
    try:
        return subprocess.Popen(  # noqa: S603  this interpreter, running our own module
            [sys.executable, "-S", "-E", "-c", _START.format(path=path), *told],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            pass_fds=[int(told[0])],
            start_new_session=True,
            cwd="/",
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
