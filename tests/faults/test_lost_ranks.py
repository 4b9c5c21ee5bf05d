"""A sample of ranks that are not as the others are; and that the campaign finds a rank that nobody was told of."""

from __future__ import annotations

import pytest

from distckpt.saving import save
from tests.faults import lost_ranks
from tests.faults.lost_ranks import HOLDS, Crowd, Stopped

KINDS = [*HOLDS, "another step", "a fault", "missing", "slow", "late"]


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_rank_does_all_are_told_and_the_checkpoint_before_stays(kind):
    case = Crowd(kind, 5)
    case.kind = kind
    assert not case.go()


@pytest.mark.parametrize("kind", ["another dtype", pytest.param("missing", marks=pytest.mark.full)])
def test_the_same_holds_for_64_ranks(kind):
    case = Crowd(f"64 {kind}", 64)
    case.kind = kind
    assert not case.go()


def test_a_rank_that_is_stopped_in_a_save_harms_nothing_when_it_goes_on_after_another_job(tmp_path):
    case = Stopped(0, {(wait, size): [[""] * 99] * 3 for wait in (True, False) for size in (2, 3)})
    case.wait, case.size, case.victim, case.successors, case.beyond = True, 2, 0, 1, True
    case.point = "create step-00000002/commit.json"
    assert case.go(tmp_path) == "goes on when all is over"
    assert not case.problems, case.problems


@pytest.mark.full
@pytest.mark.timeout(400)
def test_the_campaign_runs():
    tally = lost_ranks.campaign(7, 60)
    assert tally.cases > 20
    assert not tally.problems, tally


def test_a_failure_that_the_others_are_not_told_of_is_found(monkeypatch):
    monkeypatch.setattr(save, "together", lambda comm, what, fn: [fn() or bytes(8)] * comm.world_size)
    case = Crowd("untold", 3)
    case.kind, case.at, case.forever = "a fault", 4, True
    assert any("some were told, others not" in problem for problem in case.go())
