"""A sample of tests/faults/fuzz.py."""

from __future__ import annotations

from tests.faults.fuzz import campaign


def test_damage_of_any_kind_is_an_error_of_ours_or_harmless():
    tally = campaign(0, 1000, 120)
    assert not tally.problems, "\n".join(tally.problems[:3])
    assert tally.cases == 120
    assert sum(n for (_, verdict), n in tally.counts.items() if verdict != "whole") > 60
