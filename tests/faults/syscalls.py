"""Every call of `os` on what lies below a directory, seen before it is made: to have faults in it, and to record it.

Torch-free: it is at work in the writer process of background saves, too (`in_writer`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distckpt import system
from distckpt.run import line
from tests.faults.failpoints import Fuse, kill, writers

BYTES = ("write", "pwrite", "pwritev", "read", "pread", "preadv")
"""Calls that may stop short."""
CHANGES = ("open", "close", "write", "pwrite", "pwritev", "ftruncate", "reserve", "fsync", "link", "replace", "rename",
           "unlink", "mkdir", "rmdir", "symlink")  # fmt: skip
"""Calls that change what is there, or make it last; and open and close, which tell of which file."""
LOOKS = ("read", "pread", "preadv", "stat", "lstat", "readlink", "scandir", "listdir")
_TWO_PATHS = {"link", "replace", "rename", "symlink"}


@dataclass(frozen=True)
class Call:
    """A call that is about to be made. key: below the directory; of two paths the second, which comes to be."""

    name: str
    key: str
    args: tuple
    named: dict
    real: Any

    def make(self):
        return self.real(*self.args, **self.named)

    def half(self):
        """Make it with the first half of its bytes. Returns what it returns."""
        descriptor, what, *rest = self.args
        if isinstance(what, int):
            what = _half(what)
        elif self.name in {"pwritev", "preadv"}:
            what = _first(what, _half(sum(map(len, what))))
        else:
            what = memoryview(what)[: _half(len(what))]
        return self.real(descriptor, what, *rest)


def _half(nbytes):
    return (nbytes + 1) // 2


def _first(buffers, nbytes):
    found = []
    for buffer in buffers:
        found.append(memoryview(buffer)[: max(0, nbytes - sum(map(len, found)))])
    return found


@contextlib.contextmanager
def seen(root, answer, names=CHANGES + LOOKS):
    """While this lasts, what `answer(call)` returns, or raises, is the outcome of each such call below `root`."""
    root = str(root)
    modules = {name: system if name == "reserve" else os for name in names}
    real = {name: getattr(module, name) for name, module in modules.items()}
    opened = {}

    def key_of(what):
        if isinstance(what, int):
            return opened.get(what)
        text = os.fspath(what) if isinstance(what, (str, os.PathLike)) else ""
        return os.path.relpath(text, root) if text == root or text.startswith(f"{root}/") else None

    def wrapped(name):
        def call(*args, **named):
            key = key_of(args[name in _TWO_PATHS]) if args else None
            if key is None:
                return real[name](*args, **named)
            if name == "close":
                opened.pop(args[0])
            done = answer(Call(name, key, args, named, real[name]))
            if name == "open":
                opened[done] = key
            return done

        return call

    try:
        for name, module in modules.items():
            setattr(module, name, wrapped(name))
        yield
    finally:
        for name, module in modules.items():
            setattr(module, name, real[name])


def points(root, fuse, names=CHANGES + LOOKS):
    """While this lasts, each call below `root` is a point of a fuse."""
    return seen(root, points_of(fuse), names)


def points_of(fuse):
    """Make a call, having passed a point called "NAME KEY".

    One that may stop short is two: at "NAME KEY torn" half of it is done, and is all that is done if the action returns.
    """

    def answer(call):
        point = f"{call.name} {call.key}"
        if call.name == "close":  # it gives the descriptor back even where it fails
            try:
                fuse.touch(point)
            finally:
                call.make()
            return None
        fuse.touch(point)
        done = []
        if call.name in BYTES and fuse.touch(f"{point} torn", first=lambda: done.append(call.half())):
            return done[0]
        return call.make()

    return answer


def plant(root, told, at=None, error=None, forever=False, also=()):
    """From now on, kill this process at a point of what it does below `root`, or raise an OSError of this number.

    0 is no error: at a point that is torn, the call stops short.
    told: file that has the points passed, one a line, once this process has ended or is being killed; then TOLD-killed
    has the point. also: processes that are killed with it, and their writers.
    """

    def act(point):
        if error == 0:
            return
        if error:
            raise OSError(error, os.strerror(error), point)
        tell()
        Path(f"{told}-killed").write_text(point)
        kill(*also, *(set(writers(also)) - {os.getpid()}), os.getpid())

    def tell():
        Path(told).write_text("\n".join(fuse.trace))

    fuse = Fuse(act)
    fuse.arm(at, forever=forever)
    stack = contextlib.ExitStack()
    stack.enter_context(points(root, fuse))
    atexit.register(stack.close)
    atexit.register(tell)


@contextlib.contextmanager
def in_writer(function, *arguments):
    """Writer processes that are started meanwhile call this first: a function of a module that imports no torch."""
    text = f"from {function.__module__} import {function.__name__} as first\nfirst(*{arguments!r})\n"
    usual = line._START
    before, import_, after = usual.partition("from distckpt")
    line._START = before + text.replace("{", "{{").replace("}", "}}") + import_ + after
    try:
        yield
    finally:
        line._START = usual
