"""Power cuts: every file operation of a program is recorded, and what a cut may leave of them is put together anew.

The weakest file system that POSIX allows (as ALICE has it): what was written to a file is on the disk once the file
was fsynced, a name once its directory was; of all that was done and not yet fsynced any part may be there, in any
order. A rename is one change, whole or not at all.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import pickle
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.syscalls import BYTES, CHANGES, seen


@dataclass(frozen=True)
class Change:
    """One thing that becomes durable by itself: names that appear or vanish, or bytes of a file.

    synced_by: fsync of what makes it durable: a directory's path, or a file's number.
    """

    synced_by: object
    names: tuple[tuple[str, object], ...] = ()
    """(path, what it is from then on): the number of a file, "directory", ("symlink", target), None: nothing."""
    data: tuple[int, int, bytes] | None = None
    """(file, offset, bytes)."""
    size: tuple[int, int] | None = None
    """(file, bytes) of a truncation."""


@dataclass(frozen=True)
class Synced:
    """An fsync that returned."""

    what: object


@dataclass(frozen=True)
class Acknowledged:
    """What the program was told is safe."""

    step: int


@dataclass
class Recording:
    """What this process does below a directory, in order: (when, process, name of the call, what it was told)."""

    root: Path
    done: list = field(default_factory=list)

    def acknowledged(self, step):
        self.done.append((time.monotonic(), os.getpid(), "acknowledged", (step,)))

    def recording(self):
        """Have os report what it does."""
        return seen(self.root, self._answer, CHANGES)

    def _answer(self, call):
        began = time.monotonic()
        data = _given(call) if call.name in BYTES else b""  # before anybody changes it
        made = call.make()
        told = tuple(os.fspath(a) if isinstance(a, os.PathLike) else a for a in call.args)
        if call.name == "open":
            told = (made, told[0], told[1], os.path.isdir(told[0]))
        elif call.name == "write":
            told = (told[0], data[:made], os.fstat(told[0]).st_size - made)  # opened to append
        elif call.name in BYTES:
            told = (told[0], data[:made], told[2])
        # what another process does while a sync lasts is not made durable by it
        self.done.append((began if call.name == "fsync" else time.monotonic(), os.getpid(), call.name, told))
        return made


def _given(call):
    return b"".join(map(bytes, call.args[1])) if call.name == "pwritev" else bytes(call.args[1])


def record(root, folder):
    """From now on record this process, such as the writer; what it has done is in a file of `folder` when it ends."""
    recording, stack = Recording(Path(root)), contextlib.ExitStack()
    stack.enter_context(recording.recording())
    atexit.register(lambda: Path(folder, str(os.getpid())).write_bytes(pickle.dumps(recording.done)))
    atexit.register(stack.close)


def events_of(*recordings):
    """What several processes have done, as one history."""
    history = _History()
    for _, process, name, told in sorted((one for done in recordings for one in done), key=lambda one: one[0]):
        getattr(history, f"on_{name}")(process, *told)
    return history.events


@dataclass
class _History:
    events: list = field(default_factory=list)
    files: dict = field(default_factory=dict)
    """Path -> number of the file, or what else is there."""
    opened: dict = field(default_factory=dict)
    """(process, descriptor) -> number of a file, or path of a directory."""

    def _change(self, path, what, *more):
        self.events.append(Change(os.path.dirname(path), (*more, (path, what))))

    def on_acknowledged(self, _, step):
        self.events.append(Acknowledged(step))

    def on_open(self, process, descriptor, path, flags, is_directory):
        if not is_directory and path not in self.files and flags & os.O_CREAT:
            self.files[path] = len(self.events) + 1  # a number that no other file has
            self._change(path, self.files[path])
        self.opened[process, descriptor] = path if is_directory else self.files.get(path)

    def on_close(self, process, descriptor):
        self.opened.pop((process, descriptor), None)

    def on_write(self, process, descriptor, data, offset):
        if isinstance(file := self.opened.get((process, descriptor)), int):
            self.events.append(Change(file, data=(file, offset, data)))

    on_pwrite = on_pwritev = on_write

    def on_ftruncate(self, process, descriptor, size):
        if isinstance(file := self.opened.get((process, descriptor)), int):
            self.events.append(Change(file, size=(file, size)))

    def on_reserve(self, *_):
        """Room that is set aside is not content: the file is cut to its size when all is written."""

    def on_fsync(self, process, descriptor):
        if (what := self.opened.get((process, descriptor))) is not None:
            self.events.append(Synced(what))

    def on_link(self, _, source, target):
        self.files[target] = self.files[source]
        self._change(target, self.files[target])

    def on_replace(self, _, source, target):
        self.files[target] = self.files.pop(source)
        self._change(target, self.files[target], (source, None))

    on_rename = on_replace

    def on_unlink(self, _, path, *__):
        self.files.pop(path, None)
        self._change(path, None)

    on_rmdir = on_unlink

    def on_mkdir(self, _, path, *__):
        self._change(path, "directory")

    def on_symlink(self, _, target, path, *__):
        self.files[path] = ("symlink", target)
        self._change(path, self.files[path])


def states(events, draw: random.Random, each: int):
    """Yield (what a cut leaves, steps acknowledged before it): of each moment none, all, all but one, one, and `each`
    random parts of what was not yet durable; each tree once. Moments come in random order.
    """
    seen = set()
    for cut in draw.sample(range(len(events) + 1), len(events) + 1):
        done = events[:cut]
        changes = [e for e in done if isinstance(e, Change)]
        durable = _durable(done)
        loose = [c for c in changes if id(c) not in durable]
        acknowledged = [e.step for e in done if isinstance(e, Acknowledged)]
        choices = [set(), set(map(id, loose))]
        choices += [{id(c)} for c in loose] + [{id(c) for c in loose if c is not left} for left in loose]
        choices += [{id(c) for c in loose if draw.random() < 0.5} for _ in range(each if loose else 0)]
        for chosen in choices:
            tree = tree_of([c for c in changes if id(c) in durable or id(c) in chosen])
            key = (_digest(tree), max(acknowledged, default=None))
            if key not in seen:
                seen.add(key)
                yield tree, acknowledged


def _durable(done):
    """Changes that an fsync has made last."""
    found, waiting = set(), {}
    for event in done:
        if isinstance(event, Change):
            waiting.setdefault(event.synced_by, []).append(event)
        elif isinstance(event, Synced):
            found.update(map(id, waiting.pop(event.what, [])))
    return found


def tree_of(changes):
    """(names, contents of files) after these changes."""
    names, contents = {}, {}
    for change in changes:
        for path, what in change.names:
            if what is None:
                names.pop(path, None)
            else:
                names[path] = what
        if change.data:
            file, offset, data = change.data
            content = contents.setdefault(file, bytearray())
            content.extend(bytes(max(0, offset + len(data) - len(content))))
            content[offset : offset + len(data)] = data
        if change.size:
            file, size = change.size
            content = contents.setdefault(file, bytearray())
            content[size:] = b""
            content.extend(bytes(size - len(content)))
    return names, contents


def _digest(tree):
    names, contents = tree
    told = hashlib.sha256()
    for path, what in sorted(names.items()):
        told.update(
            f"{path} {what if not isinstance(what, int) else hashlib.sha256(contents.get(what, b'')).hexdigest()}\n".encode()
        )
    return told.hexdigest()


def lay_out(tree, root: Path, at: Path):
    """Make the tree that lay at `root` anew at `at`. What lies in a directory that is not there is lost."""
    names, contents = tree
    at.mkdir()
    for path, what in sorted(names.items()):
        place = at / Path(path).relative_to(root)
        if not place.parent.is_dir():
            continue
        if what == "directory":
            place.mkdir()
        elif isinstance(what, tuple):
            place.symlink_to(what[1])
        else:
            place.write_bytes(contents.get(what, b""))
