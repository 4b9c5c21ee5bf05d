"""P2 of the design: after a power cut at any moment, in every state that the file system may be left in, the newest
checkpoint that was acknowledged loads, bit for bit.
"""

from __future__ import annotations

import random
import warnings

import pytest

from distckpt import Keep
from distckpt.errors import DistckptError
from tests.faults import power
from tests.faults.cuts import Change, Synced, lay_out, states, tree_of


def test_every_state_that_a_power_cut_may_leave_loads_what_was_acknowledged():
    tally = power.campaign(seed=0, seconds=600, most=90)
    assert tally.cases == 90
    assert not tally.problems, str(tally)


@pytest.mark.parametrize("kind", power.KINDS)
def test_the_recording_is_what_happened(tmp_path, kind):
    root = tmp_path / "root"
    events = power.recorded(kind, root, [1, 2, 3], keep=Keep(last=2))
    lay_out(tree_of([e for e in events if isinstance(e, Change)]), root, tmp_path / "again")
    assert _content(tmp_path / "again") == _content(root)


def _content(root):
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else p.is_dir() for p in root.rglob("*")}


@pytest.mark.parametrize("kind", [int, str], ids=["file", "directory"])
@pytest.mark.parametrize("job", ["waited", "async"])
def test_a_store_that_left_out_a_sync_would_be_found_out(tmp_path, job, kind):
    root = tmp_path / "root"
    events = power.recorded(job, root, [1, 2])
    events = [e for e in events if not (isinstance(e, Synced) and isinstance(e.what, kind))]
    found = [(tree, acknowledged) for tree, acknowledged in states(events, random.Random(0), 0) if acknowledged]
    with warnings.catch_warnings(), pytest.raises((AssertionError, DistckptError)):
        warnings.simplefilter("ignore")
        for tree, acknowledged in found:
            power.check(job, tree, root, tmp_path / "cut", acknowledged)
