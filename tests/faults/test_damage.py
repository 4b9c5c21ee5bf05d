"""A sample of tests/faults/damage.py, and that it would find damage that is not found."""

from __future__ import annotations

from distckpt.format.datafile import Table
from tests.faults.damage import Whole, campaign, problem
from tests.faults.sharded import Sharded


def test_damage_is_found_named_and_stepped_back_from_on_every_rank():
    tally = campaign(0, 100, 30)
    assert not tally.problems, "\n".join(tally.problems[:3])
    assert tally.cases == 30


def _met():
    """How a flipped bit of the first byte of a tensor is met."""
    whole = Whole(Sharded)
    key, (start, _) = whole.files["rank-00000"], whole.classes("rank-00000")["model.rows"]
    data = whole.store._data[key]
    return problem(whole, {key: data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]}, key, "model.rows")


def test_damage_that_is_not_found_is_a_problem(monkeypatch):
    assert _met() is None
    monkeypatch.setattr(Table, "holds", lambda *_: True)
    assert _met().startswith("NOT FOUND by a load")


def test_damage_that_is_told_without_the_tensor_is_a_problem(monkeypatch):
    monkeypatch.setattr("distckpt.loading.open.DataFile.names", lambda *_: ["?"])
    assert "not told" in _met()
