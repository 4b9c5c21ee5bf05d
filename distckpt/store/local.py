"""A directory of a file system as a store, durable against a power cut.

A write is: temp file, preallocate, write, fsync, rename, fsync of the directory (and of each parent it had to make).
A create is the same with link() in place of rename: link refuses where the name exists, on every POSIX file system
and over NFS. Temp files are hidden from `list`. A failed fsync is never retried: the kernel may have dropped the pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, KeyExists, KeyMissing, KeyTruncated, StoreError, Unsupported
from distckpt.store.base import FOR_GOOD, Entry, Pace, check, read_all
from distckpt.store.pieces import LARGE, after, write_pieces

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_MOST_BUFFERS = 1024  # IOV_MAX of Linux
_MOST_RACES = 100
_LONGEST = 200
_TEMPORARY = re.compile(r"\A\.tmp-[0-9a-f]{8}-")
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_NO_KEY = {errno.ELOOP, errno.ENODEV}
"""What a symlink, or a FIFO, is to who reads a key: no key, as `list` has it."""
_ADVICE = {
    errno.ENOSPC: "the file system is full: free room, or keep fewer checkpoints",
    errno.EDQUOT: "the quota is used up: free room, or keep fewer checkpoints",
    errno.EFBIG: "larger than a file may be here: raise `ulimit -f`, or use a file system that takes larger ones",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
    errno.EROFS: "the file system is mounted read-only",
    errno.EACCES: "permission denied: check owner and mode of the directory",
    errno.EPERM: "operation not permitted: check owner and mode, and that the file system has hard links",
    errno.ELOOP: "it is a symbolic link, which could lead out of the directory: replace it by the file itself",
    errno.ENOTDIR: "a part of the path is a file, not a directory",
}


def local_path(path: str | os.PathLike[str]) -> Path:
    """Absolute path. Unsupported for a URI, which would be taken for a directory called `s3:`."""
    if _URI_AS_PATH.match(str(path)) and "://" not in str(path):
        raise Unsupported(f"{path}: is a URI that was made a Path, which takes a slash away: give it as text")
    if "://" in str(path):
        raise Unsupported(f"{path}: is a URI; only paths of a mounted file system can be saved to and loaded from")
    return Path(path).absolute()


_URI_AS_PATH = re.compile(r"(?:file|memory|s3|gs|az):/")

Temporary = list[tuple[str, float, int]]


class LocalStore:
    """Keys below `root`, a directory that is made when first written to."""

    pace = Pace()

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = local_path(root)
        self.held: dict[str, memoryview] = {}
        """Beginnings of files that lie in memory, too, and are read from there: see run/held.py."""

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    @property
    def address(self) -> dict[str, str]:
        """See Store.address."""
        return {"root": str(self.root)}

    def list(self, prefix: str) -> list[Entry]:
        """See Store.list."""
        found = []
        with _mapped("list", self._path(prefix, prefix=True)) as path:
            try:
                with os.scandir(path) as entries:
                    for entry in entries:
                        if entry.is_symlink() or entry.name.startswith("."):
                            continue
                        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                            size = None if entry.is_dir(follow_symlinks=False) else entry.stat().st_size
                            found.append(Entry(entry.name, size))
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(found)

    def head(self, key: str) -> int:
        """See Store.head."""
        with _mapped("look at", self._path(key), missing=_MISSING) as path:
            status = path.lstat()
            _check_regular(status.st_mode)
            return status.st_size

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Store.read."""
        if self.held and _read_held(self.held.get(key), start, buffers):
            return
        with _mapped("read", self._path(key), missing=_MISSING) as path, _opened(path) as file:
            _fill(path, file, start, buffers)

    def content(self, key: str, limit: int) -> bytes:
        """See Whole. Of one file: another may take its name meanwhile."""
        with _mapped("read", self._path(key), missing=_MISSING) as path, _opened(path) as file:
            if (size := os.fstat(file).st_size) > limit:
                raise FormatError(f"{path} has {size} bytes; at most {limit} are read")
            _fill(path, file, 0, [memoryview(data := bytearray(size))])
            return bytes(data)

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:
        """See Store.write."""
        path = self._path(key)
        with self._temporary(path, pieces, size, stable=stable) as temp, _mapped("write", path):
            temp.replace(path)
        _sync_directory(path.parent)

    def create(self, key: str, data: bytes) -> None:
        """See Store.create."""
        path = self._path(key)
        with self._temporary(path, [memoryview(data)], len(data)) as temp, _mapped("create", path):
            try:
                os.link(temp, path)
            except FileExistsError:
                # over NFS the reply to a link that succeeded can be lost and the retry finds our own file
                if path.stat().st_size != len(data) or read_all(self, key, limit=len(data)) != data:
                    raise KeyExists(f"{path}: exists with other content") from None
        _sync_directory(path.parent)

    def append(self, key: str, line: bytes) -> None:
        """Add to the end of a file, in one piece beside whoever else does; made if need be. Not made durable."""
        path = self._path(key)
        with _mapped("append to", path):
            _make_directory(path.parent)
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_WAY_OUT, 0o666)
            try:
                _check_regular(os.fstat(file).st_mode)
                if (written := os.write(file, line)) != len(line):
                    raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes were written")
            finally:
                os.close(file)

    def delete(self, key: str) -> None:
        """See Store.delete. Directories left empty go too, as prefixes do in an object store."""
        path = self._path(key)
        with _mapped("delete", path):
            try:
                path.unlink(missing_ok=True)
            except NotADirectoryError:
                return
            self._remove_empty(path.parent)

    def _remove_empty(self, path: Path) -> None:
        """Remove a directory and its parents as far as they are empty; make that, and what was removed, durable."""
        while path != self.root and _remove_if_empty(path):
            path = path.parent
        _sync_directory(path)

    def link_hint(self, name: str, target: str) -> None:
        """Point the symlink `name` at `target`, atomically. A convenience for people; no reader follows it."""
        path = self._path(name)
        temp = _temporary_name(path)
        with _mapped("link", path):
            temp.symlink_to(target)
            try:
                temp.replace(path)
            finally:
                temp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self, key: str) -> Iterator[None]:
        """Hold a key while the block runs and this process lives. KeyExists if another process holds it.

        A file system without locks holds nothing.
        """
        path = self._path(key)
        descriptor = None
        try:
            with _mapped("lock", path):
                _make_directory(path.parent)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as e:
                    raise KeyExists(f"{path}: another process holds it") from e
                except OSError as e:
                    if e.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                        raise
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def discard_temporary(self, key: str) -> None:
        """Remove what killed writes of a key left behind. Nobody else must be writing it."""
        written = self._path(key).name
        prefix = key.rpartition("/")[0]
        for name, _, _ in self.unfinished(prefix):
            if _TEMPORARY.sub("", name) == written[:_LONGEST]:
                self.discard(prefix, name)

    def unfinished(self, prefix: str) -> Temporary:
        """Temp files directly below `prefix`, of writes in progress or killed: name, when it last changed, bytes."""
        found = []
        with _mapped("list", self._path(prefix, prefix=True)) as path:
            for temp in path.iterdir() if path.is_dir() else ():
                if _TEMPORARY.match(temp.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = temp.lstat()
                        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                            found.append((temp.name, status.st_mtime, status.st_size))
        return sorted(found)

    def discard(self, prefix: str, name: str) -> None:
        """Remove a temp file that `unfinished` named, and directories left empty. Its write, if it goes on, fails."""
        if not _TEMPORARY.match(name) or "/" in name:
            raise StoreError(f"{name!r} is no temp file")
        with _mapped("delete", self._path(prefix, prefix=True) / name) as path:
            path.unlink(missing_ok=True)
            self._remove_empty(path.parent)

    def changed(self, key: str) -> float:
        """When a key was written, in seconds by the file system's clock. KeyMissing."""
        with _mapped("look at", self._path(key), missing=_MISSING) as path:
            return path.lstat().st_mtime

    def room(self) -> int | None:
        """See Roomy.room. It knows of no quota; and some network file systems say 0 whatever is free."""
        try:
            status = os.statvfs(next(place for place in (self.root, *self.root.parents) if place.exists()))
        except OSError:
            return None
        return status.f_frsize * (status.f_bavail if os.geteuid() else status.f_bfree) or None

    def unlink_hint(self, name: str) -> None:
        """Remove the symlink `name`, where there is one."""
        path = self._path(name)
        with _mapped("unlink", path):
            if path.is_symlink():
                path.unlink(missing_ok=True)

    def hint(self, name: str) -> str | None:
        """What the symlink `name` points at; None where there is none."""
        with _mapped("read", self._path(name)) as path:
            return str(path.readlink()) if path.is_symlink() else None

    def hints(self) -> dict[str, str]:
        """Symlinks of the root, and what each points at."""
        found = {}
        with _mapped("list", self.root), contextlib.suppress(FileNotFoundError), os.scandir(self.root) as entries:
            for entry in entries:
                if entry.is_symlink() and not entry.name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        found[entry.name] = str(Path(entry.path).readlink())
        return found

    def arriving(self, prefix: str) -> set[str]:
        """Names below a prefix that a living process is writing, as far as the file system's locks tell."""
        found, folder = set[str](), self._path(prefix, prefix=True)
        for name, _, _ in self.unfinished(prefix):
            with contextlib.suppress(KeyMissing), _mapped("look at", folder / name, missing=_MISSING) as path:
                if _is_held(path):  # else it has arrived meanwhile, or who wrote it is dead
                    found.add(_TEMPORARY.sub("", name))
        return found

    def _path(self, key: str, *, prefix: bool = False) -> Path:
        """Path of a key. StoreError where a directory on the way is a symlink: it could lead out of the store."""
        place = self.root
        for part in check(key, prefix=prefix).split("/")[:-1]:
            place /= part
            with _mapped("follow", place):
                if place.is_symlink():
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        return self.root / key

    @contextlib.contextmanager
    def _temporary(
        self, path: Path, pieces: Iterable[memoryview], size: int, *, stable: int = FOR_GOOD
    ) -> Iterator[Path]:
        """A durable temp file beside `path` that holds the pieces; gone when the block ends."""
        temp = _temporary_name(path)
        with _mapped("write", path):
            descriptor = self._open_new(temp)
            try:
                try:
                    if size >= LARGE:
                        _hold(descriptor)
                    written = write_pieces(descriptor, pieces, size, stable=stable)
                    if written != size:
                        raise StoreError(f"{path}: the pieces have {written} bytes, {size} were announced")
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                yield temp
            finally:
                temp.unlink(missing_ok=True)

    def _open_new(self, temp: Path) -> int:
        for _ in range(_MOST_RACES):
            with contextlib.suppress(FileNotFoundError):  # a delete removed the empty directory in between
                _make_directory(temp.parent)
                return os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        raise StoreError(f"cannot write {temp.parent}: the directory cannot be made, or vanishes as often as it is")


def _temporary_name(path: Path) -> Path:
    """Hidden name beside `path`; not longer than a name may be, however long that of `path` is."""
    return path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name[:_LONGEST]}")


def _read_held(memory: memoryview | None, start: int, buffers: Sequence[memoryview]) -> bool:
    """Fill the buffers from memory, if it has all that is asked for."""
    if memory is None or start + sum(map(len, buffers)) > len(memory):
        return False
    for buffer in buffers:
        buffer[:] = memory[start : start + len(buffer)]
        start += len(buffer)
    return True


def _hold(descriptor: int) -> None:
    """Lock a file while it is open, so that others see whether who writes it still lives. No lock is no error."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False  # a file system without locks
    return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Descriptor of a file to read. A symlink is refused: it could lead out of the run's directory."""
    descriptor = os.open(path, os.O_RDONLY | _NO_WAY_OUT)
    try:
        _check_regular(os.fstat(descriptor).st_mode)
        yield descriptor
    finally:
        os.close(descriptor)


def _fill(path: Path, file: int, start: int, buffers: Sequence[memoryview]) -> None:
    """Fill the buffers from byte `start` of a file on. KeyTruncated."""
    for first in range(0, len(buffers), _MOST_BUFFERS):
        wanted = [b for b in buffers[first : first + _MOST_BUFFERS] if len(b)]
        while wanted:
            if not (got := os.preadv(file, wanted, start)):
                raise KeyTruncated(f"{path}: ends at byte {start}, byte {start + sum(map(len, wanted))} was asked for")
            start += got
            wanted = after(wanted, got)


_NO_WAY_OUT = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # to open a FIFO could last for ever


def _check_regular(mode: int) -> None:
    """Raise what a symlink, or a file that holds no bytes, is for who wants to read it."""
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENODEV, "it is a device, a socket or a FIFO, not a file")


def _make_directory(path: Path) -> None:
    """Make a directory and its parents, each durable in its own parent."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    try:
        _sync_directory(path.parent)
    except StoreError:
        # a retry would find the directory, take it for durable, and report a success that a power cut undoes
        _remove_if_empty(path)
        raise


def _remove_if_empty(path: Path) -> bool:
    """Whether the directory is gone; False where something lies in it, or it may not be removed."""
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _sync_directory(path: Path) -> None:
    """Make the names in a directory durable. One that a delete removed meanwhile has none."""
    with _mapped("sync", path), contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _mapped(verb: str, path: Path, *, missing: tuple[type[OSError], ...] = ()) -> Iterator[Path]:
    """Turn the block's OSError into a StoreError that says what, where and what to do, `missing` into KeyMissing."""
    try:
        yield path
    except StoreError:
        raise
    except missing as e:
        raise KeyMissing(f"cannot {verb} {path}: no such key") from e
    except OSError as e:
        advice = _ADVICE.get(e.errno or 0, "")
        kind = KeyMissing if missing and e.errno in _NO_KEY else StoreError
        error = kind(f"cannot {verb} {path}: {e.strerror or e}" + (f" ({advice})" if advice else ""))
        error.errno = e.errno
        raise error from e
