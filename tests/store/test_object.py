"""An object store behind faults: every verb does what it says or raises, in time, and nothing wrong is written or read."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distckpt.errors import KeyExists, KeyMissing, StoreError, Unsupported
from distckpt.store import object as objects
from distckpt.store.base import FOR_GOOD, Entry, read_all, write_all
from distckpt.store.object import ObjectStore
from distckpt.store.open import open_store
from tests.store import servers
from tests.store.faulty import Fault, Faulty

SMALL = bytes(range(256))
PART = 1 << 16
LARGE = random.Random(0).randbytes(3 * PART + 12_345)
LIMIT = 1 << 30

pytestmark = pytest.mark.filterwarnings("ignore:.*does not keep:distckpt.errors.StateWarning")


@pytest.fixture(params=servers.params)
def bucket(request):
    return servers.start(request.param).bucket()


KEEPS_CONDITIONS = {"moto", "azurite", "ceph"}


@pytest.fixture(autouse=True)
def all_is_small_and_soon(monkeypatch):
    monkeypatch.setattr(objects, "PART", PART)
    monkeypatch.setattr(objects, "_PIECE", PART // 4)
    monkeypatch.setattr(objects, "SETTLES", 0.3)


@pytest.fixture
def proxy(bucket):
    with Faulty(bucket.address) as proxy:
        yield proxy


@pytest.fixture
def direct(bucket):
    return ObjectStore(bucket.uri, bucket.options)


@pytest.fixture
def through(bucket, proxy, monkeypatch):
    """A store by way of the proxy, with a deadline. Whether its server keeps conditions is known."""

    def open_it(seconds):
        there = bucket.at(proxy.endpoint)
        monkeypatch.setattr(ObjectStore, "_probe", lambda _: bucket.server in KEEPS_CONDITIONS)
        return ObjectStore(there.uri, there.options, timeout=seconds)

    return open_it


@pytest.fixture
def store(through):
    return through(20)


def in_pieces(data, size=1000):
    return (memoryview(data)[i : i + size] for i in range(0, len(data), size))


VERBS = {
    "list": lambda store: store.list("d"),
    "head": lambda store: store.head("d/there"),
    "read": lambda store: read_all(store, "d/there", limit=LIMIT),
    "write": lambda store: write_all(store, "d/new", SMALL),
    "create": lambda store: store.create("d/new", SMALL),
    "delete": lambda store: store.delete("d/there"),
}
RETURNS = {"list": [Entry("there", len(SMALL))], "head": len(SMALL), "read": SMALL}


def check(verb, returned, direct):
    """What a verb returned and did is what it says."""
    assert returned == RETURNS.get(verb)
    entries = {"write": ["new", "there"], "create": ["new", "there"], "delete": []}.get(verb, ["there"])
    assert [e.name for e in direct.list("d")] == entries
    if "new" in entries:
        assert read_all(direct, "d/new", limit=LIMIT) == SMALL


# one fault


PASSING = {
    "500": Fault(status=500),
    "503": Fault(status=503),
    "429": Fault(status=429),
    "reset": Fault(upload=0),
    "lost": Fault(lost=True),
    "cut": Fault(body=100),
}


@pytest.mark.parametrize("fault", PASSING)
@pytest.mark.parametrize("verb", VERBS)
def test_a_fault_that_passes_is_survived(store, direct, proxy, verb, fault):
    write_all(direct, "d/there", SMALL)
    proxy.on("", PASSING[fault])
    check(verb, VERBS[verb](store), direct)


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(upload=0), Fault(hang=True)], ids=["503", "reset", "hang"])
def test_a_fault_that_stays_is_an_error_in_time(through, direct, proxy, fault):
    write_all(direct, "d/there", SMALL)
    store = through(0.5)
    proxy.on("", fault, times=10**6)
    fails_in_time(store, "/d")


def fails_in_time(store, why):
    """Every verb, all at once."""

    def ask(verb):
        with pytest.raises(StoreError, match=why):
            verb(store)

    began = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(ask, VERBS.values()))
    assert time.monotonic() - began < 5


def test_a_signal_is_handled_while_the_server_hangs(store, proxy):
    class Rang(Exception):
        pass

    def ring(*_):
        raise Rang

    proxy.on("", Fault(hang=True), times=100)
    before = signal.signal(signal.SIGUSR1, ring)
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR1])
    try:
        timer.start()
        began = time.monotonic()
        with pytest.raises(Rang):
            store.head("d/there")
        assert time.monotonic() - began < 5
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)


# create


def test_a_create_whose_answer_is_lost_is_ours_if_it_is(store, direct, proxy):
    proxy.on("PUT .*/commit$", Fault(lost=True), times=2)
    store.create("d/commit", b"ours")
    assert read_all(direct, "d/commit", limit=LIMIT) == b"ours"
    assert direct.list("d") == [Entry("commit", 4)]


def test_a_create_whose_answer_is_lost_is_not_ours_if_another_was_first(store, direct, proxy):
    direct.create("d/commit", b"them")
    proxy.on("PUT .*/commit$", Fault(lost=True), times=2)
    with pytest.raises(KeyExists):
        store.create("d/commit", b"ours")
    assert read_all(direct, "d/commit", limit=LIMIT) == b"them"


def test_a_create_that_another_overtakes_while_it_retries_is_not_ours(store, direct, proxy, monkeypatch):
    proxy.on("PUT .*/commit$", Fault(upload=0, delay=0.3))
    put = objects.ObjectStore._put_if_absent

    def overtaken(self, key, data):
        if key == "d/commit" and self is store:
            write_all(direct, "d/commit", b"them")
        return put(self, key, data)

    monkeypatch.setattr(objects.ObjectStore, "_put_if_absent", overtaken)
    if not store._keeps_conditions():
        pytest.skip("claims decide")
    with pytest.raises(KeyExists):
        store.create("d/commit", b"ours")
    assert read_all(direct, "d/commit", limit=LIMIT) == b"them"


def test_a_create_with_a_hang_at_its_answer_is_settled_by_reading(through, direct, proxy):
    proxy.on("PUT .*/commit$", Fault(hang=True))
    through(3).create("d/commit", b"ours")
    assert read_all(direct, "d/commit", limit=LIMIT) == b"ours"


@pytest.mark.parametrize("fault", ["500", "reset", "lost"])
def test_whether_a_server_keeps_conditions_is_found_out_behind_faults_too(bucket, proxy, direct, fault):
    there = bucket.at(proxy.endpoint)
    for nth in (0, 1, 2, 9):
        proxy.clear()
        proxy.on("PUT", PASSING[fault], after=nth, times=2)
        objects._probed.clear()
        kept = ObjectStore(there.uri, there.options, timeout=20)._keeps_conditions()
        assert kept == (bucket.server in KEEPS_CONDITIONS)
    assert servers.leftovers(bucket.uri, bucket.options) == []


# read


@pytest.mark.parametrize("kept", [0, 1, PART, 2 * PART - 1])
def test_a_body_that_ends_early_is_asked_for_again(store, direct, proxy, kept):
    direct.write("a", in_pieces(LARGE), size=len(LARGE))
    proxy.on("GET", Fault(body=kept), times=2)
    assert read_all(store, "a", limit=LIMIT) == LARGE


def test_a_body_that_always_ends_early_is_an_error(through, direct, proxy):
    write_all(direct, "a", SMALL)
    store = through(1)
    proxy.on("GET", Fault(body=0), times=10**6)
    with pytest.raises(StoreError):
        store.read("a", 0, [memoryview(bytearray(256))])


# write


@pytest.mark.parametrize(
    "fault",
    [
        *(Fault(status=status) for status in (500, 503, 429)),
        *(Fault(upload=sent) for sent in (0, 1, PART - 1)),
        Fault(lost=True),
        Fault(hang=True),
    ],
    ids=["500", "503", "429", "reset", "broken", "cut", "lost", "hang"],
)
def test_a_large_write_survives_a_fault_at_any_of_its_requests(bucket, store, direct, proxy, fault):
    store.write("seen", in_pieces(LARGE), size=len(LARGE))

    def write(nth):
        with Faulty(bucket.address) as proxy:
            proxy.on("", fault, after=nth)
            there = bucket.at(proxy.endpoint)
            data = LARGE[nth:] + bytes(nth)
            ObjectStore(there.uri, there.options, timeout=5).write(f"a{nth}", in_pieces(data), size=len(data))
            assert any(request.fault == fault for request in proxy.requests)
        assert read_all(direct, f"a{nth}", limit=LIMIT) == data

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(len(proxy.requests))))


@pytest.mark.parametrize("stable", [0, FOR_GOOD])
def test_a_large_write_that_fails_leaves_the_key_and_no_upload(bucket, store, direct, proxy, stable):
    write_all(direct, "a", b"old")

    def broken():
        yield from in_pieces(LARGE[: 2 * PART])
        raise RuntimeError("cause")

    with pytest.raises(RuntimeError, match="cause"):
        store.write("a", broken(), size=len(LARGE), stable=stable)
    with pytest.raises(StoreError, match="announced"):
        store.write("a", in_pieces(LARGE), size=len(LARGE) + 1, stable=stable)
    assert read_all(direct, "a", limit=LIMIT) == b"old"
    assert servers.leftovers(bucket.uri, bucket.options) == []


@pytest.mark.parametrize("seed", range(3))
def test_behind_any_faults_a_verb_does_what_it_says_or_raises(store, direct, proxy, seed):
    draw = random.Random(seed)
    faults = [*PASSING.values(), Fault(upload=1000), Fault(body=0)]
    holds = {}
    for step in range(40):
        proxy.shake(draw.randrange(2**32), faults, 0.3)
        key, data = f"d/{draw.randrange(3)}", b"%d," % step * draw.choice([1, 100])
        try:
            match draw.choice(["read", "write", "create", "delete"]):
                case "read":
                    assert read_all(store, key, limit=LIMIT) in holds.get(key, {None})
                case "write":
                    holds[key] = holds.get(key, {None}) | {data}
                    write_all(store, key, data)
                    holds[key] = {data}
                case "create":
                    holds[key] = holds.get(key, {None}) | {data}
                    store.create(key, data)
                    holds[key] = {data}
                case "delete":
                    holds[key] = holds.get(key, {None}) | {None}
                    store.delete(key)
                    holds[key] = {None}
        except KeyMissing:
            assert None in holds.get(key, {None})
        except StoreError:
            pass
        proxy.clear()
        assert content(direct, key) in holds.get(key, {None})


def content(store, key):
    try:
        return read_all(store, key, limit=LIMIT)
    except KeyMissing:
        return None


# memory

MEASURE = """
import json, sys
from distckpt.store import object as objects
objects.PART, objects.IN_FLIGHT = 1 << 19, 2
store = objects.ObjectStore(sys.argv[1], json.loads(sys.argv[2]))
size = 16 << 20
whole = memoryview(bytearray(size))
slab = whole[: 1 << 19]

def now(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) >> 10

def measure(name, call):
    open("/proc/self/clear_refs", "w").write("5")
    before = now("VmRSS")
    call()
    print(name, now("VmHWM") - before)

store.write("warm", [slab] * 8, size=4 << 20)
store.read("warm", 0, [whole[: 4 << 20]])
measure("slabs", lambda: store.write("a", (slab for _ in range(size >> 19)), size=size))
measure("one", lambda: store.write("a", [whole], size=size))
measure("stable", lambda: store.write("a", [whole], size=size, stable=objects.FOR_GOOD))
measure("read", lambda: store.read("a", 0, [whole]))
"""


def test_memory_is_bounded_by_the_parts_in_flight():
    bucket = servers.start("moto").bucket()
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, bucket.uri, json.dumps(bucket.options)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=60,
    )
    assert said.returncode == 0, said.stderr
    took = dict(line.split() for line in said.stdout.splitlines())
    assert all(int(mib) < 8 for mib in took.values()), took


# what is wrong with a bucket


def test_a_bucket_that_is_not_there_is_said(bucket):
    scheme = bucket.uri.partition("://")[0]
    store = ObjectStore(f"{scheme}://no-such-bucket/run", bucket.options)
    for verb in ("head", "read", "write", "create"):
        with pytest.raises(StoreError, match=r"no-such-bucket/run"):
            VERBS[verb](store)


def test_a_server_that_is_not_there_is_said(bucket):
    there = bucket.at(f"http://127.0.0.1:{servers.free_port()}")
    store = ObjectStore(there.uri, there.options, timeout=0.5)
    fails_in_time(store, "does not answer")


def test_wrong_credentials_are_said_at_once_and_are_no_part_of_it():
    bucket = servers.start("azurite").bucket()
    wrong = base64.b64encode(b"a wrong key").decode()
    store = ObjectStore(bucket.uri, bucket.options | {"account_key": wrong})
    for verb in VERBS.values():
        began = time.monotonic()
        with pytest.raises(StoreError, match="check the credentials") as said:
            verb(store)
        assert time.monotonic() - began < 5
        assert wrong not in str(said.value)
        assert "sig" not in str(said.value).lower().replace("signature", "")


def test_a_write_that_is_interrupted_stops(store, direct, proxy):
    """What goes on in the thread that sends takes no more pieces, which their owner may reuse."""

    class Rang(Exception):
        pass

    def ring(*_):
        raise Rang

    proxy.latency = 0.5
    taken = []

    def pieces():
        for i in range(100):
            taken.append(i)
            yield memoryview(bytes(PART))
            if i == 4:
                os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, ring)
    try:
        with pytest.raises(Rang):
            store.write("a", pieces(), size=100 * PART)
    finally:
        signal.signal(signal.SIGUSR1, before)
    after = len(taken)
    deadline = time.monotonic() + 30
    while any(thread.name == "distckpt-object" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert len(taken) <= after + 1 < 100
    assert direct.list("") == []


def test_a_uri_that_names_another_place_than_it_seems_to_is_refused_and_no_secret_is_shown():
    for end in ("/..", "/a/../b", "/a//b", "/a/%2E%2E/b", "/a#1", "/a\n"):
        with pytest.raises(Unsupported, match="its parts must not be"):
            ObjectStore(f"s3://bucket{end}")
    for uri in ("az://box/run?sv=1&sig=SECRET", "s3://key:SECRET@bucket/run", "s3://bucket?key=SECRET"):
        with pytest.raises(Unsupported, match="takes no credentials") as caught:
            ObjectStore(uri)
        assert "SECRET" not in str(caught.value)
    assert ObjectStore("s3://bucket/run%231/").root == "s3://bucket/run%231"
    for path in (Path("s3://bucket/run"), "s3:/bucket/run"):
        with pytest.raises(Unsupported, match="give it as text"):
            open_store(path)
