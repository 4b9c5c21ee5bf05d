"""A sample of the campaign of requests; and that it finds a store that does wrong."""

from __future__ import annotations

import warnings

import pytest

from distckpt.store.client import Client
from distckpt.store.object import ObjectStore
from tests.faults import requests
from tests.faults.requests import EVER, Bench, Case
from tests.store import servers
from tests.store.faulty import Faulty


@pytest.fixture(scope="module")
def benches():
    bucket = servers.start("moto").bucket()
    with Faulty(bucket.address) as proxy:
        yield Bench(proxy, bucket)


@pytest.fixture
def bench(benches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield benches


@pytest.mark.parametrize(
    ("of", "fault", "at"),
    [
        ("save", "500", 1),
        ("save", "429", 6),
        ("save", "reset in the upload", 9),
        ("save", "answer lost", 18),
        ("save", "answer cut off", 12),
        ("save in the background", "503", 40),
        ("load", "reset at once", 3),
        ("load", "answer cut off", 9),
        ("load", "slow answer", 5),
        ("resume", "answer lost", 20),
    ],
)
def test_a_request_that_fails_once_costs_nothing(bench, of, fault, at):
    assert bench.judged(Case(of, fault, at)) == ("whole", None)


@pytest.mark.parametrize(("of", "fault", "at"), [("save", "503", 2), ("save", "412", 8), ("load", "500", 3)])
def test_requests_that_fail_from_one_on_are_told_on_every_rank(bench, of, fault, at):
    assert bench.judged(Case(of, fault, at, EVER)) == ("told", None)


@pytest.mark.parametrize("at", [0, 8, 14, 20])
def test_a_bit_that_is_flipped_on_the_way_is_never_taken(bench, at):
    verdict, problem = bench.judged(Case("load", requests.FLIPPED, at))
    assert verdict in {"whole", "told"}, problem


@pytest.mark.full
def test_a_replication_that_cannot_go_on_is_made_good_by_the_next_job(bench):
    assert bench.judged(Case("replication", "503", 20, EVER)) == ("whole", None)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_sample_of_every_fault_there_is():
    tally = requests.campaign(seed=1, seconds=500, most=48)
    assert not tally.problems, str(tally)
    assert tally.cases == 48


def test_a_store_that_does_not_ask_again_is_found(bench, monkeypatch):
    case = Case("load", "answer cut off", 0)
    assert bench.judged(case) == ("whole", None)
    monkeypatch.setattr(Client, "ask", Client.ask_once)
    verdict, problem = bench.judged(case)
    assert verdict == "PROBLEM"
    assert "should have been asked for again" in problem


def test_a_store_that_takes_half_an_answer_for_all_of_it_is_found(bench, monkeypatch):
    def create(store, key, data):
        if not store._put_if_absent(key, data[: len(data) // 2] if key.endswith("commit.json") else data):
            store._settled(key, data)

    monkeypatch.setattr(ObjectStore, "create", create)
    assert bench.judged(Case("save", "500", 1))[0] == "PROBLEM"
