"""Power cuts: every file operation of a program is recorded, and what a cut may leave of them is put together anew.

The weakest file system that POSIX allows (as ALICE has it): what was written to a file is on the disk once the file
was fsynced, a name once its directory was; of all that was done and not yet fsynced any part may be there, in any
order. A rename is one change, whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import random
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
    """What was done below a directory."""

    root: Path
    events: list = field(default_factory=list)
    files: dict = field(default_factory=dict)
    """Path -> number of the file."""
    opened: dict = field(default_factory=dict)
    """Descriptor -> number of a file, or path of a directory."""

    def acknowledged(self, step):
        self.events.append(Acknowledged(step))

    def recording(self):
        """Have os report what it does."""
        return seen(self.root, self._answer, CHANGES)

    def _inside(self, path):
        text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        return text if text.startswith(str(self.root)) else None

    def _answer(self, call):
        if call.name in BYTES:  # what it was told to write, before anybody changes it
            descriptor, what, *offset = call.args
            given = b"".join(map(bytes, what)) if call.name == "pwritev" else bytes(what)
            done = call.make()
            self._wrote(descriptor, given[:done], *(offset or [None]))
            return done
        done = call.make()
        getattr(self, f"on_{call.name}")(done, *call.args)
        return done

    def on_open(self, descriptor, path, flags=0, *_, **__):
        if not (path := self._inside(path)):
            return
        if os.path.isdir(path):
            self.opened[descriptor] = path
        else:
            if path not in self.files and flags & os.O_CREAT:
                self.files[path] = len(self.events) + 1  # a number that no other file has
                self.events.append(Change(os.path.dirname(path), ((path, self.files[path]),)))
            self.opened[descriptor] = self.files.get(path)

    def _wrote(self, descriptor, data, offset):
        if isinstance(file := self.opened.get(descriptor), int):
            if offset is None:
                offset = os.fstat(descriptor).st_size - len(data)  # opened to append
            self.events.append(Change(file, data=(file, offset, data)))

    def on_ftruncate(self, _, descriptor, size):
        if isinstance(file := self.opened.get(descriptor), int):
            self.events.append(Change(file, size=(file, size)))

    def on_reserve(self, _, descriptor, size):
        """Room that is set aside is not content: the file is cut to its size when all is written."""

    def on_close(self, _, descriptor):
        self.opened.pop(descriptor, None)

    def on_fsync(self, _, descriptor):
        if (what := self.opened.get(descriptor)) is not None:
            self.events.append(Synced(what))

    def on_link(self, _, source, target):
        if target := self._inside(target):
            self.files[target] = self.files[os.fspath(source)]
            self.events.append(Change(os.path.dirname(target), ((target, self.files[target]),)))

    def on_replace(self, _, source, target):
        if target := self._inside(target):
            source = os.fspath(source)
            what = self.files.pop(source, None)
            if what is None:
                what = ("symlink", os.readlink(target))
            else:
                self.files[target] = what
            self.events.append(Change(os.path.dirname(target), ((source, None), (target, what))))

    on_rename = on_replace

    def on_unlink(self, _, path, *__):
        if path := self._inside(path):
            self.files.pop(path, None)
            self.events.append(Change(os.path.dirname(path), ((path, None),)))

    def on_rmdir(self, _, path, *__):
        if path := self._inside(path):
            self.events.append(Change(os.path.dirname(path), ((path, None),)))

    def on_mkdir(self, _, path, *__):
        if path := self._inside(path):
            self.events.append(Change(os.path.dirname(path), ((path, "directory"),)))

    def on_symlink(self, _, target, path, *__):
        if path := self._inside(path):
            self.events.append(Change(os.path.dirname(path), ((path, ("symlink", os.fspath(target))),)))


def states(events, draw: random.Random, each: int):
    """Yield (what a cut leaves, steps acknowledged before it): of each moment none, all, all but one, one, and `each`
    random parts of what was not yet durable; each tree once.
    """
    seen = set()
    for cut in range(len(events) + 1):
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
