"""A few seconds of tests/faults/guided.py, and that it finds what is planted."""

from __future__ import annotations

import pytest

from tests.faults.guided import campaign

pytest.importorskip("atheris", reason="atheris is not installed")


def test_parsers_refuse_what_they_cannot_read_and_nothing_else_happens():
    tally = campaign(0, 4, ["commit.json", "header"])
    assert not tally.problems, tally.problems
    assert tally.cases > 500
    assert tally.figures["commit.json: branches of our code covered"] > 80


def test_a_planted_fault_is_found():
    tally = campaign(0, 10, ["a planted fault"])
    assert "ValueError: a planted fault" in tally.problems[0]
