"""How far a long command is: a bar on a terminal, a plain line now and then elsewhere. Stdout is the answer's."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distckpt.tools.answer import tell
from distckpt.units import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_EVERY = 10.0
"""Seconds between plain lines: what is done sooner says nothing but its answer."""


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Call what it gives with the bytes done, from any thread."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
            yield lambda nbytes: _ignored(bar.update(nbytes))
        return
    done, told, lock = 0, time.monotonic(), threading.Lock()

    def add(nbytes: int) -> None:
        nonlocal done, told
        with lock:
            done += nbytes
            if (now := time.monotonic()) - told >= _EVERY:
                told = now
                tell(f"{what}: {size_text(done)} of {size_text(total)}", beside=True)

    yield add


def _ignored(_: object) -> None:
    """Take what nobody asks for."""
