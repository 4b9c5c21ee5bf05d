"""What only a file system can get wrong: durability, faults, full and read-only disks, symlinks."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from distckpt import system
from distckpt.errors import KeyExists, KeyMissing, StoreError
from distckpt.store import pieces as pieces_of_files
from distckpt.store.base import Entry, read_all, write_all
from distckpt.store.local import LocalStore
from tests import disks

OLD, NEW = b"old content", b"the new content, which is longer"


def get(store, key):
    return read_all(store, key, limit=1 << 30)


def hidden(root: Path):
    return [p for p in root.rglob(".*")]


@pytest.fixture
def calls(monkeypatch):
    """Every system call that durability hangs on, in order: (name, path)."""
    seen = []
    paths = {}
    real = {
        name: getattr(os, name) for name in ("open", "fsync", "link", "mkdir", "close", "pwritev", "unlink", "rmdir")
    }
    replace = Path.replace

    def opened(path, *args, **kw):
        descriptor = real["open"](path, *args, **kw)
        paths[descriptor] = Path(path)
        return descriptor

    def on_descriptor(name):
        def call(descriptor, *args):
            seen.append((name, paths.get(descriptor)))
            return real[name](descriptor, *args)

        return call

    def on_path(name):
        def call(path, *args, **kw):
            seen.append((name, Path(path)))
            return real[name](path, *args, **kw)

        return call

    def replaced(self, target):
        seen.append(("replace", self))
        return replace(self, target)

    monkeypatch.setattr(os, "open", opened)
    for name in ("fsync", "pwritev"):
        monkeypatch.setattr(os, name, on_descriptor(name))
    for name in ("link", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, on_path(name))
    monkeypatch.setattr(Path, "replace", replaced)
    return seen


@pytest.mark.parametrize(("verb", "publish"), [("write", "replace"), ("create", "link")])
def test_the_file_is_synced_before_it_has_its_name_and_the_directory_after(tmp_path, calls, verb, publish):
    store = LocalStore(tmp_path)
    if verb == "write":
        store.write("a", [memoryview(NEW)], size=len(NEW))
    else:
        store.create("a", NEW)
    kinds = [(name, path.name.startswith(".tmp-")) for name, path in calls if name != "unlink"]
    assert kinds == [("pwritev", True), ("fsync", True), (publish, True), ("fsync", False)]
    assert calls[-1] == ("fsync", tmp_path)


def test_every_new_directory_is_synced_in_its_parent_before_anything_lies_in_it(tmp_path, calls):
    LocalStore(tmp_path / "runs" / "one").create("launches/x/0001.json", NEW)
    made = [path for name, path in calls if name == "mkdir"]
    assert made == [tmp_path / p for p in ("runs", "runs/one", "runs/one/launches", "runs/one/launches/x")]
    published = calls.index(next(c for c in calls if c[0] == "link"))
    for directory in made:
        at = calls.index(("mkdir", directory))
        assert ("fsync", directory.parent) in calls[at:published]
    assert calls[-1] == ("fsync", made[-1])


def test_a_directory_that_is_there_is_not_synced_again(tmp_path, calls):
    store = LocalStore(tmp_path)
    write_all(store, "d/a", OLD)
    calls.clear()
    write_all(store, "d/b", NEW)
    assert [path for name, path in calls if name == "fsync" and not path.name.startswith(".")] == [tmp_path / "d"]


@pytest.mark.parametrize(("others", "synced"), [(["a/b/d"], "a/b"), (["a/d"], "a"), ([], ".")])
def test_a_delete_is_synced_where_something_is_left(tmp_path, calls, others, synced):
    store = LocalStore(tmp_path)
    for key in ("a/b/c", *others):
        write_all(store, key, OLD)
    calls.clear()
    store.delete("a/b/c")
    assert calls[-1] == ("fsync", tmp_path / synced)
    assert [name for name, _ in calls].count("unlink") == 1


def test_a_new_directory_whose_sync_fails_is_not_taken_for_durable_by_the_retry(tmp_path, calls, monkeypatch):
    store = LocalStore(tmp_path)
    recording = os.fsync

    def fails(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError):
        write_all(store, "d/a", NEW)
    monkeypatch.setattr(os, "fsync", recording)
    calls.clear()
    write_all(store, "d/a", NEW)
    assert ("fsync", tmp_path) in calls


FAULTY = [(os, "open"), (os, "pwritev"), (os, "fsync"), (system, "reserve"), (os, "link"), (Path, "replace")]


class Faults:
    """Makes the n-th of the calls of FAULTY fail once, or from then on."""

    def __init__(self, monkeypatch, number, n, *, forever):
        self.count = 0
        for owner, name in FAULTY:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name), number, n, forever))

    def _wrap(self, real, number, n, forever):
        def call(*args, **kw):
            self.count += 1
            if self.count == n or (forever and self.count > n):
                raise OSError(number, os.strerror(number))
            return real(*args, **kw)

        return call


VERBS = {
    "write": lambda store, key: store.write(key, [memoryview(NEW[:5]), memoryview(NEW[5:])], size=len(NEW)),
    "create": lambda store, key: store.create(key, NEW),
    "delete": lambda store, key: store.delete(key),
}


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize(
    ("verb", "key"), [("write", "d/old"), ("write", "new/a/b"), ("create", "new/a/b"), ("delete", "d/old")]
)
def test_a_fault_at_any_call_leaves_old_or_new_whole_and_a_retry_succeeds(tmp_path, verb, key, number, forever):
    for n in range(1, 100):
        root = tmp_path / str(n)
        store = LocalStore(root)
        write_all(store, "d/old", OLD)
        write_all(store, "d/other", OLD)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, number, n, forever=forever)
            failure = None
            try:
                VERBS[verb](store, key)
            except StoreError as e:
                failure = e
        if failure:
            assert failure.errno == number
            assert str(root) in str(failure)
        there = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        assert there.pop(key, None) in (
            {OLD, NEW, None} if verb == "delete" else {OLD if key == "d/old" else None, NEW}
        )
        assert there == ({"d/other": OLD} if key == "d/old" else {"d/old": OLD, "d/other": OLD})
        assert hidden(root) == []
        VERBS[verb](store, key)
        assert (root / key).exists() == (verb != "delete")
        assert verb == "delete" or get(store, key) == NEW
        if not failure:
            assert faults.count < n
            assert n > 2
            return
    pytest.fail("the faults never ended")


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_preallocate_is_written_all_the_same(tmp_path, monkeypatch, number):
    asked = []

    def refused(*_):
        asked.append(1)
        raise OSError(number, os.strerror(number))

    data = bytes(range(256)) * (pieces_of_files.LARGE // 256 + 1)
    monkeypatch.setattr(pieces_of_files, "goes_direct", lambda _: True)
    monkeypatch.setattr(system, "reserve", refused)
    write_all(LocalStore(tmp_path), "a", data)
    assert get(LocalStore(tmp_path), "a") == data
    assert asked


def test_short_writes_and_short_reads_are_carried_on(tmp_path, monkeypatch):
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, buffers, at: pwritev(fd, [buffers[0][:3]], at))
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:2]], at))
    store = LocalStore(tmp_path)
    store.write("a", [memoryview(NEW), memoryview(OLD)], size=len(NEW + OLD))
    buffers = [bytearray(7), bytearray(len(NEW + OLD) - 7)]
    store.read("a", 0, [memoryview(b) for b in buffers])
    assert b"".join(buffers) == NEW + OLD


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB."""
    with disks.disk(tmp_path / "disk", "tmpfs", 1 << 20) as target:
        yield target


@pytest.mark.parametrize("preallocates", [True, False])
def test_a_full_disk_says_so_leaves_the_old_content_and_gives_the_room_back(disk, monkeypatch, preallocates):
    if preallocates:  # as where writes go past the page cache
        monkeypatch.setattr(pieces_of_files, "goes_direct", lambda _: True)
    store = LocalStore(disk)
    write_all(store, "a", OLD)
    free = os.statvfs(disk).f_bfree
    asked = []

    def pieces():
        for _ in range(512):
            asked.append(1)
            yield memoryview(bytes(32 << 10))

    with pytest.raises(StoreError, match="full: free room, or keep fewer checkpoints") as caught:
        store.write("a", pieces(), size=16 << 20)
    assert caught.value.errno == errno.ENOSPC
    assert bool(asked) != preallocates
    assert get(store, "a") == OLD
    assert hidden(disk) == []
    assert os.statvfs(disk).f_bfree == free


def test_a_read_only_directory_says_so(disk):
    store = LocalStore(disk)
    write_all(store, "d/a", OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for verb in (lambda: write_all(store, "d/a", NEW), lambda: store.create("b", NEW), lambda: store.delete("d/a")):
        with pytest.raises(StoreError, match="mounted read-only") as caught:
            verb()
        assert caught.value.errno == errno.EROFS
    assert get(store, "d/a") == OLD


def test_names_behind_a_symlink_and_hidden_ones_are_not_listed(tmp_path):
    store = LocalStore(tmp_path / "run")
    write_all(store, "d/a", OLD)
    (tmp_path / "run" / "file").symlink_to("d/a")
    (tmp_path / "run" / "directory").symlink_to("d")
    (tmp_path / "run" / "dangling").symlink_to("nowhere")
    (tmp_path / "run" / ".tmp-left-by-a-crash").write_bytes(b"half")
    assert store.list("") == [Entry("d", None)]


def test_a_hint_points_where_it_is_told_and_is_replaced_whole(tmp_path):
    store = LocalStore(tmp_path)
    write_all(store, "step-1/a", OLD)
    write_all(store, "step-2/a", NEW)
    store.link_hint("last", "step-1")
    store.link_hint("last", "step-2")
    assert (tmp_path / "last" / "a").read_bytes() == NEW
    assert [e.name for e in store.list("")] == ["step-1", "step-2"]


def test_a_hint_that_cannot_be_put_leaves_nothing(tmp_path):
    store = LocalStore(tmp_path)
    write_all(store, "last/a", OLD)
    with pytest.raises(StoreError):
        store.link_hint("last", "step-1")
    assert hidden(tmp_path) == []


def test_a_file_where_a_directory_must_be_is_told_apart_from_a_missing_one(tmp_path):
    store = LocalStore(tmp_path)
    write_all(store, "a", OLD)
    for verb in (lambda: write_all(store, "a/b", NEW), lambda: store.create("a/b/c", NEW)):
        with pytest.raises(StoreError, match="is a file, not a directory") as caught:
            verb()
        assert not isinstance(caught.value, FileNotFoundError)
    assert store.list("") == [Entry("a", len(OLD))]


def test_a_directory_that_can_never_be_made_is_an_error_and_no_endless_loop():
    with pytest.raises(StoreError, match="cannot"):
        LocalStore("/proc/distckpt").create("a", NEW)


def test_the_reply_to_a_link_may_be_lost_as_over_nfs(tmp_path, monkeypatch):
    link = os.link

    def link_twice(source, target, **kw):
        link(source, target, **kw)
        link(source, target, **kw)

    monkeypatch.setattr(os, "link", link_twice)
    store = LocalStore(tmp_path)
    store.create("a", NEW)
    assert get(store, "a") == NEW
    with pytest.raises(KeyExists):
        store.create("a", OLD)


def test_two_views_of_one_directory_are_one_store(tmp_path):
    LocalStore(tmp_path).create("a", NEW)
    assert get(LocalStore(str(tmp_path)), "a") == NEW


def test_a_symlink_is_never_followed_out_of_the_store(tmp_path):
    (tmp_path / "secret").write_bytes(b"s" * 10)
    store = LocalStore(tmp_path / "run")
    write_all(store, "step/a", b"x")
    (tmp_path / "run/step/b").symlink_to(tmp_path / "secret")
    for verb in (lambda: store.head("step/b"), lambda: store.read("step/b", 0, [memoryview(bytearray(1))])):
        with pytest.raises(KeyMissing, match="symbolic link"):
            verb()


def test_what_is_no_file_is_no_key_and_keeps_nobody_waiting(tmp_path):
    store = LocalStore(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for verb in (lambda: store.head("fifo"), lambda: store.read("fifo", 0, []), lambda: store.content("fifo", 9)):
        with pytest.raises(KeyMissing, match="a FIFO, not a file"):
            verb()
    with pytest.raises(StoreError):
        store.append("fifo", b"x")
    os.mkfifo(tmp_path / ".tmp-01234567-x")
    assert store.unfinished("") == []
    assert store.arriving("") == set()


@pytest.mark.parametrize("verb", ["read", "head", "write", "create", "delete"])
def test_a_directory_that_is_a_symlink_is_not_followed(tmp_path, verb):
    """It could lead out of the run."""
    outside, store = tmp_path / "outside", LocalStore(tmp_path / "run")
    outside.mkdir()
    (outside / "x").write_bytes(b"x")
    store.root.mkdir()
    (store.root / "step-00000001").symlink_to(outside)
    arguments = {"read": (0, [memoryview(bytearray(1))]), "head": (), "create": (b"y",), "delete": ()}
    with pytest.raises(StoreError, match="symbolic link") as caught:
        if verb == "write":
            write_all(store, "step-00000001/x", b"y")
        else:
            getattr(store, verb)("step-00000001/x", *arguments[verb])
    assert caught.value.errno == errno.ELOOP
    assert (outside / "x").read_bytes() == b"x"
