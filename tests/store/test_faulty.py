"""The proxy does what it says, before a real server and with a plain client."""

from __future__ import annotations

import http.client
import time

import pytest

from tests.store import servers
from tests.store.faulty import Fault, Faulty

DATA = bytes(range(256)) * 1024


@pytest.fixture
def bucket():
    return servers.start("moto").bucket()


@pytest.fixture
def proxy(bucket):
    with Faulty(bucket.address) as proxy:
        yield proxy


def ask(address, method, key, body=None, timeout=10):
    """Status and body of the answer; moto lets anybody in."""
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    try:
        connection.request(method, key, body=body, headers={"Authorization": "AWS test:x"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.fixture
def through(bucket, proxy):
    """Ask by way of the proxy."""
    name = bucket.uri.split("/")[2]
    return lambda method, key, body=None, **o: ask(
        bucket.at(proxy.endpoint).address, method, f"/{name}/{key}", body, **o
    )


@pytest.fixture
def direct(bucket):
    name = bucket.uri.split("/")[2]
    return lambda method, key, body=None: ask(bucket.address, method, f"/{name}/{key}", body)


def test_without_a_fault_all_goes_through(through, direct, proxy):
    assert through("PUT", "a", DATA)[0] == 200
    assert direct("GET", "a") == through("GET", "a") == (200, DATA)
    assert through("GET", "b")[0] == 404
    assert through("HEAD", "a") == (200, b"")
    assert proxy.count("^GET ") == 2


def test_a_rule_meets_the_request_it_names_and_no_other(through, proxy):
    proxy.on("PUT .*/a$", Fault(status=503), after=1, times=2)
    assert [through("PUT", key, b"1")[0] for key in "abaaba"] == [200, 200, 503, 503, 200, 200]


def test_a_refused_request_never_reaches_the_server(through, direct, proxy):
    for status in (500, 503, 429):
        proxy.on("PUT", Fault(status=status))
        assert through("PUT", "a", DATA)[0] == status
    assert direct("GET", "a")[0] == 404


def test_a_lost_answer_leaves_what_the_server_did(through, direct, proxy):
    proxy.on("PUT", Fault(lost=True))
    with pytest.raises(ConnectionError):
        through("PUT", "a", DATA)
    assert direct("GET", "a") == (200, DATA)


def test_an_upload_that_breaks_off_leaves_nothing(through, direct, proxy):
    for sent in (0, 1, 100_000):
        proxy.on("PUT", Fault(upload=sent))
        with pytest.raises(ConnectionError):
            through("PUT", "a", DATA)
        assert direct("GET", "a")[0] == 404


def test_an_answer_that_breaks_off_is_short_of_its_length(through, direct, proxy):
    direct("PUT", "a", DATA)
    for kept in (0, 1, 100_000):
        proxy.on("GET", Fault(body=kept))
        with pytest.raises(http.client.IncompleteRead) as cut:
            through("GET", "a")
        assert len(cut.value.partial) == kept


def test_a_flipped_bit_arrives_as_if_nothing_were(through, direct, proxy):
    direct("PUT", "a", DATA)
    proxy.on("GET", Fault(flip=70_000))
    status, data = through("GET", "a")
    assert status == 200
    assert [i for i in range(len(DATA)) if data[i] != DATA[i]] == [70_000]


def test_a_hang_lasts_until_the_client_leaves(through, direct, proxy):
    proxy.on("PUT", Fault(hang=True))
    with pytest.raises(TimeoutError):
        through("PUT", "a", DATA, timeout=0.3)
    assert direct("GET", "a") == (200, DATA)


def test_latency_and_bandwidth_take_their_time(through, proxy):
    proxy.latency = 0.2
    began = time.monotonic()
    assert through("PUT", "a", b"1")[0] == 200
    assert time.monotonic() - began > 0.2
    proxy.latency = 0
    proxy.bandwidth(4 * len(DATA))
    began = time.monotonic()
    assert through("PUT", "a", DATA)[0] == 200
    assert time.monotonic() - began > 0.2
