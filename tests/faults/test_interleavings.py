"""A sample of the interleavings of jobs on one run; and that the campaign finds what it is there to find."""

from __future__ import annotations

from unittest.mock import ANY

import pytest

from distckpt.run import history, retention
from tests.faults import interleavings


def test_jobs_readers_and_caretakers_interleaved_at_random_leave_what_must_be_resumable():
    tally = interleavings.campaign(0, 60, most=14)
    assert not tally.problems, tally
    assert tally.cases == 14
    for what in ("resumes", "rewinds", "saves", "loads", "kills", "jobs that stood still"):
        assert tally.figures[what] > 0, tally


@pytest.mark.parametrize(
    ("where", "name", "lost", "most"),
    [
        (history, "counts", lambda *_: True, 9),
        pytest.param(retention, "launch_numbers", lambda store: ANY, 200, marks=pytest.mark.full),
    ],
)
def test_what_an_unfenced_job_does_is_found(monkeypatch, where, name, lost, most):
    monkeypatch.setattr(where, name, lost)
    assert interleavings.campaign(1, 60, most=most).problems
