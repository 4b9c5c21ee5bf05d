"""A sample of tests/faults/fuzz.py, and a longer campaign in `make torture`."""

from __future__ import annotations

import pytest

from tests.faults.fuzz import campaign


@pytest.mark.parametrize(
    ("seed", "cases"),
    [(0, 120), *(pytest.param(seed, 4000, marks=[pytest.mark.full, pytest.mark.timeout(1200)]) for seed in (1, 2))],
)
def test_damage_of_any_kind_is_an_error_of_ours_or_harmless(seed, cases):
    tally = campaign(seed, 1000, cases)
    assert not tally.problems, "\n".join(tally.problems[:3])
    assert tally.cases == cases
    assert sum(n for (_, verdict), n in tally.counts.items() if verdict != "whole") > cases / 2
