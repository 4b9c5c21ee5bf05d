"""A job that is killed anywhere goes on as if nothing had been, and kills that cost something are found out."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from distckpt import Checkpointer
from distckpt.run.history import History
from distckpt.store.local import LocalStore
from tests.faults import kills
from tests.faults.killed import Job, Kill
from tests.faults.kills import Campaign, Case
from tests.faults.tally import Tally


def test_kills_at_any_file_call_of_trainers_and_writers_cost_nothing():
    tally = kills.campaign(seed=1, seconds=600, most=5, jobs=(Job("async on 2 ranks", ranks=2),))
    assert tally.cases == 5
    assert not tally.problems, str(tally)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_same_holds_for_all_kinds_of_jobs():
    tally = kills.campaign(seed=0, seconds=600)
    print(tally)
    assert not tally.problems, str(tally)


# -- what the campaign would find --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unprotected(Job):
    """A job without something that protects it."""

    without: str = ""

    def checkpointer(self, *args):
        if self.without == "roll-forward":
            History.roll_forward = lambda *_, **__: []
        elif self.without == "files that appear whole":
            LocalStore.create = _create_in_place
        elif self.without == "moments":
            Checkpointer.resume = _without_moments
        return super().checkpointer(*args)


def _create_in_place(store, key, data):
    path = store.root / key
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(file, data)
    os.close(file)


def _without_moments(checkpointer, state, resume=Checkpointer.resume):
    report = resume(checkpointer, state)
    for name, target in state.capture().tensors.items():
        if name.endswith("exp_avg"):
            target.shards[0].tensor.zero_()
    return report


@pytest.mark.parametrize(
    ("without", "verdict"),
    [("roll-forward", "LOST_WORK"), ("files that appear whole", "HARD_FAIL"), ("moments", "SILENT_DIVERGENCE")],
)
def test_a_job_without_its_protection_is_found_out(campaign, without, verdict):
    job, killed = Unprotected("waited", wait=True, without=without), ()
    if verdict == "HARD_FAIL":
        points = campaign.points(job, torn=False)
        (where,) = [where for where, point in points.items() if point == "write run/launches/0003.json torn"]
        killed = (Kill(*where),)
    campaign.take(Case(job, killed, torn=verdict == "LOST_WORK"))
    assert [found for _, found in campaign.tally.counts] == [verdict]
    assert verdict in campaign.tally.problems[0]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    job = Job("waited", wait=True)
    campaign = Campaign(0, tmp_path_factory.mktemp("kills"), (job,))
    campaign.prepare(job)
    return campaign


@pytest.fixture
def campaign(prepared):
    prepared.tally = Tally()
    return prepared
