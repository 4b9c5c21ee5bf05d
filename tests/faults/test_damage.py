"""A sample of tests/faults/damage.py, and that it would find damage that is not found."""

from __future__ import annotations

from distckpt.format.datafile import Table
from tests.faults.damage import campaign


def test_damage_is_found_named_and_stepped_back_from_on_every_rank():
    tally = campaign(0, 100, 30)
    assert not tally.problems, "\n".join(tally.problems[:3])
    assert tally.cases == 30


def test_damage_that_is_not_found_is_a_problem(monkeypatch):
    monkeypatch.setattr(Table, "holds", lambda *_: True)
    assert any("NOT FOUND" in text for text in campaign(0, 100, 20).problems)


def test_damage_that_is_told_of_no_file_is_a_problem(monkeypatch):
    monkeypatch.setattr("distckpt.loading.open.DataFile.names", lambda *_: ["?"])
    assert any("not told" in text for text in campaign(0, 100, 20).problems)
