"""The contract of `distckpt.store.base`, for every store. A new store joins by a line in STORES."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.errors import FormatError, KeyExists, KeyMissing, KeyTruncated, StoreError
from distckpt.store import object as objects
from distckpt.store.base import Entry, read_all, write_all
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from distckpt.store.object import ObjectStore
from tests.store import races, servers

STORES = ["memory", "local", *servers.params]

pytestmark = pytest.mark.filterwarnings("ignore:.*does not keep:distckpt.errors.StateWarning")


@pytest.fixture(autouse=True)
def claims_settle_soon(monkeypatch):
    """On servers without conditions, all of them on this machine."""
    monkeypatch.setattr(objects, "SETTLES", 0.3)


def make(name, path):
    """A new store of that name; what it has of a file system lies in `path`."""
    match name:
        case "memory":
            return MemoryStore()
        case "local":
            return LocalStore(path / "run")
    bucket = servers.start(name).bucket()
    return ObjectStore(bucket.uri, bucket.options)


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return make(request.param, tmp_path)


def get(store, key):
    return read_all(store, key, limit=1 << 30)


def hidden(store):
    """What no listing shows and a write or create has left behind: temp files, claims, unfinished uploads."""
    if isinstance(store, ObjectStore):
        return servers.leftovers(store.root, store.address["options"])
    return [p for p in store.root.rglob("*") if p.name.startswith(".")] if isinstance(store, LocalStore) else []


# list


def test_an_empty_store_lists_nothing(store):
    assert store.list("") == []
    assert store.list("no/such/prefix") == []


def test_a_listing_shows_keys_with_bytes_and_prefixes_without_sorted_by_name(store):
    for key in ("b/x", "a", "b/y/z", "B", "a0", "b0/x"):
        write_all(store, key, key.encode())
    assert store.list("") == [Entry("B", 1), Entry("a", 1), Entry("a0", 2), Entry("b", None), Entry("b0", None)]
    assert store.list("b") == [Entry("x", 3), Entry("y", None)]
    assert store.list("b/y") == [Entry("z", 5)]


def test_a_listing_below_a_key_is_empty(store):
    write_all(store, "a/b", b"1")
    assert store.list("a/b") == []
    assert store.list("a/b/c") == []


def test_a_listing_never_shows_a_write_in_progress(store):
    write_all(store, "d/other", b"1")
    seen = []

    def pieces():
        yield memoryview(b"ab")
        seen.append(store.list("d"))
        yield memoryview(b"cd")

    store.write("d/new", pieces(), size=4)
    assert seen == [[Entry("other", 1)]]
    assert store.list("d") == [Entry("new", 4), Entry("other", 1)]


def test_a_write_may_take_its_pieces_from_the_store_itself(store):
    data, piece = bytes(range(256)) * (9 << 12), 1 << 20
    write_all(store, "a/from", data)

    def pieces():
        for start in range(0, len(data), piece):
            taken = memoryview(bytearray(piece))
            store.read("a/from", start, [taken])
            yield taken

    store.write("b/to", pieces(), size=len(data))
    assert get(store, "b/to") == data


# head and read


def test_head_tells_the_bytes_of_a_key(store):
    write_all(store, "a/b", b"12345")
    write_all(store, "a/empty", b"")
    assert (store.head("a/b"), store.head("a/empty")) == (5, 0)


@pytest.mark.parametrize("key", ["no", "a", "a/no", "no/no", "a/b/c"])
def test_what_is_no_key_is_missing_to_head_and_read(store, key):
    write_all(store, "a/b", b"1")
    with pytest.raises(KeyMissing):
        store.head(key)
    with pytest.raises(KeyMissing):
        store.read(key, 0, [memoryview(bytearray(1))])


def test_read_fills_its_buffers_in_order_from_the_byte_asked_for(store):
    write_all(store, "a", bytes(range(100)))
    buffers = [bytearray(n) for n in (3, 0, 1, 7)]
    store.read("a", 40, [memoryview(b) for b in buffers])
    assert [list(b) for b in buffers] == [[40, 41, 42], [], [43], list(range(44, 51))]


def test_read_takes_more_buffers_than_one_system_call_does(store):
    data = bytes(i % 251 for i in range(5000))
    write_all(store, "a", data)
    target = bytearray(4500)
    view = memoryview(target)
    store.read("a", 7, [view[i : i + 1] for i in range(4500)])
    assert bytes(target) == data[7:4507]


@pytest.mark.parametrize(("start", "sizes"), [(0, [11]), (5, [5, 1]), (10, [1]), (99, [1]), (0, [1] * 1030)])
def test_a_read_beyond_the_end_is_truncated(store, start, sizes):
    write_all(store, "a", b"0123456789")
    with pytest.raises(KeyTruncated):
        store.read("a", start, [memoryview(bytearray(n)) for n in sizes])


def test_reading_nothing_succeeds_up_to_the_end(store):
    write_all(store, "a", b"12")
    store.read("a", 2, [])
    store.read("a", 2, [memoryview(bytearray(0))])


def test_read_all_refuses_a_key_longer_than_its_limit(store):
    write_all(store, "a", b"12345")
    assert read_all(store, "a", limit=5) == b"12345"
    with pytest.raises(FormatError, match="5 bytes"):
        read_all(store, "a", limit=4)
    with pytest.raises(KeyMissing):
        read_all(store, "b", limit=4)


# write


def test_what_is_read_whole_is_of_one_write(store):
    contents = [b"short", b"longer, by far"]
    write_all(store, "last.json", contents[0])
    with ThreadPoolExecutor(1) as pool:
        writes = pool.submit(lambda: [write_all(store, "last.json", c) for _ in range(20) for c in contents])
        while not writes.done():
            assert read_all(store, "last.json", limit=100) in contents
        writes.result()


def test_write_puts_the_pieces_one_after_another(store):
    store.write("a/b/c", [memoryview(b"ab"), memoryview(b""), memoryview(b"cde")], size=5)
    assert get(store, "a/b/c") == b"abcde"


@pytest.mark.parametrize("name", STORES)
@settings(max_examples=15, deadline=None)
@given(pieces=st.lists(st.binary(max_size=2000), max_size=8))
def test_what_is_written_is_read(name, tmp_path_factory, pieces):
    store = make(name, tmp_path_factory.mktemp("store"))
    store.write("a", map(memoryview, pieces), size=sum(map(len, pieces)))
    assert get(store, "a") == b"".join(pieces)


def test_write_replaces_a_longer_content_wholly(store):
    write_all(store, "a", b"x" * 10_000)
    write_all(store, "a", b"new")
    assert get(store, "a") == b"new"


def test_a_piece_may_be_reused_once_the_next_is_asked_for(store):
    slab = bytearray(4)

    def pieces():
        for i in range(5):
            slab[:] = bytes([i]) * 4
            yield memoryview(slab)

    store.write("a", pieces(), size=20)
    assert get(store, "a") == bytes(i for i in range(5) for _ in range(4))


@pytest.mark.parametrize("size", [0, 3, 5])
@pytest.mark.parametrize("before", [b"old", None])
def test_a_wrong_size_is_refused_and_leaves_the_key_as_it_was(store, size, before):
    write_all(store, "d/other", b"1")
    if before is not None:
        write_all(store, "d/a", before)
    with pytest.raises(StoreError, match="4 bytes"):
        store.write("d/a", [memoryview(b"abcd")], size=size)
    assert [e.name for e in store.list("d")] == (["a"] if before else []) + ["other"]
    assert before is None or get(store, "d/a") == before
    assert hidden(store) == []


@pytest.mark.parametrize("error", [RuntimeError("cause"), KeyboardInterrupt()])
def test_an_error_of_the_pieces_goes_through_and_leaves_the_key_as_it_was(store, error):
    write_all(store, "a", b"old")

    def pieces():
        yield memoryview(b"ab")
        raise error

    for key in ("a", "b"):
        with pytest.raises(type(error)):
            store.write(key, pieces(), size=4)
    assert store.list("") == [Entry("a", 3)]
    assert get(store, "a") == b"old"
    assert hidden(store) == []


def test_concurrent_readers_see_the_old_content_or_the_new(store):
    size, rounds = 20_000, 60
    write_all(store, "a", b"\0" * size)
    stop = threading.Event()

    def read():
        seen = set()
        while not stop.is_set():
            assert store.head("a") == size
            data = get(store, "a")
            assert data == data[:1] * size
            seen.add(data[0])
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for i in range(rounds):
                store.write("a", [memoryview(bytes([i]) * (size // 4))] * 4, size=size)
        finally:
            stop.set()
        assert all(reader.result() <= set(range(rounds)) for reader in readers)


def test_writers_of_one_new_prefix_do_not_disturb_each_other_or_a_delete(store):
    def work(i):
        for n in range(25):
            write_all(store, f"d/e/{i}", b"x" * n)
            store.delete(f"d/e/{i}")
        write_all(store, f"d/e/{i}", b"last")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.list("d/e") == [Entry(str(i), 4) for i in range(4)]


# create


def test_create_makes_a_key_and_leaves_nothing_else(store):
    store.create("d/a", b"new")
    assert get(store, "d/a") == b"new"
    assert store.list("d") == [Entry("a", 3)]
    assert hidden(store) == []


def test_creating_what_is_there_to_the_byte_succeeds(store):
    store.create("a", b"same")
    store.create("a", b"same")
    write_all(store, "b", b"")
    store.create("b", b"")
    assert get(store, "a") == b"same"


@pytest.mark.parametrize("data", [b"diff", b"", b"longer than it"])
def test_create_refuses_a_key_with_other_content(store, data):
    store.create("a", b"same")
    with pytest.raises(KeyExists):
        store.create("a", data)
    assert get(store, "a") == b"same"
    assert hidden(store) == []


def test_create_keeps_its_own_copy_of_the_data(store):
    data = bytearray(b"abc")
    store.create("a", data)
    data[:] = b"xyz"
    assert get(store, "a") == b"abc"


def test_of_racing_threads_exactly_one_creates_the_key(store):
    threads, keys = 8, 12
    start = threading.Barrier(threads)

    def compete(i):
        won = []
        for k in range(keys):
            start.wait(30)
            try:
                store.create(f"d{k}/commit", bytes([i]))
                won.append(k)
            except KeyExists:
                pass
        return won

    with ThreadPoolExecutor(threads) as pool:
        won = list(pool.map(compete, range(threads)))
    assert sorted(k for keys_won in won for k in keys_won) == list(range(keys))
    for i, keys_won in enumerate(won):
        assert all(get(store, f"d{k}/commit") == bytes([i]) for k in keys_won)
    assert hidden(store) == []


def test_of_racing_processes_exactly_one_creates_the_key(store):
    if store.address is None:
        pytest.skip("memory of one process")
    context = multiprocessing.get_context("spawn")
    start, won = context.Barrier(3), context.Queue()
    claims = isinstance(store, ObjectStore) and not store._keeps_conditions()  # which take seconds
    keys = [f"d{k}/commit" for k in range(3 if claims else 20)]
    racers = [
        context.Process(target=races.compete, args=(store.address, keys, bytes([i]), start, won)) for i in range(3)
    ]
    for racer in racers:
        racer.start()
    found = [won.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    won.close()
    won.join_thread()
    assert sorted(key for some in found for key in some) == sorted(keys)
    assert hidden(store) == []


# delete


def test_a_deleted_key_is_gone_and_so_is_a_prefix_left_empty(store):
    write_all(store, "a/b/c", b"1")
    write_all(store, "a/d", b"1")
    store.delete("a/b/c")
    assert store.list("a") == [Entry("d", 1)]
    with pytest.raises(KeyMissing):
        store.head("a/b/c")
    store.delete("a/d")
    assert store.list("") == []
    write_all(store, "a/b/c", b"again")
    assert get(store, "a/b/c") == b"again"


def test_deleting_what_is_not_there_succeeds(store):
    write_all(store, "a/b", b"1")
    for key in ("no", "a/no", "no/no", "a/b/no"):
        store.delete(key)
    store.delete("a/b")
    store.delete("a/b")
    assert store.list("") == []


# keys

BAD = [
    "",
    "/",
    "/etc/passwd",
    "..",
    ".",
    "a/..",
    "../a",
    "a/../b",
    ".hidden",
    "a/.hidden",
    "a//b",
    "a/",
    "a\0b",
    "a\n",
    "~",
]


@pytest.mark.parametrize("key", BAD, ids=repr)
def test_a_key_that_could_lead_out_or_hide_is_refused_by_every_verb(store, key):
    write_all(store, "a", b"1")
    verbs = [
        lambda: store.head(key),
        lambda: store.read(key, 0, []),
        lambda: store.write(key, [memoryview(b"1")], size=1),
        lambda: store.create(key, b"1"),
        lambda: store.delete(key),
    ]
    for verb in verbs if key == "" else [*verbs, lambda: store.list(key)]:
        with pytest.raises(StoreError, match="not a key"):
            verb()
    assert store.list("") == [Entry("a", 1)]


def test_a_name_as_long_as_a_name_may_be_is_a_key(store):
    key = "x" * 255
    write_all(store, key, b"1")
    store.create("d/" + key, b"2")
    assert (get(store, key), get(store, "d/" + key)) == (b"1", b"2")


def test_a_store_says_what_it_is(store):
    assert type(store).__name__ in repr(store)
