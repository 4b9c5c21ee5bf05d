"""P2 of the design: after a power cut at any moment, in every state that the file system may be left in, the newest
checkpoint that was acknowledged loads, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import warnings

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.errors import DistckptError
from distckpt.run.history import History
from distckpt.store.local import LocalStore
from tests.faults.power import Change, Recording, Synced, lay_out, states, tree_of


def _state():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    model[0].requires_grad_(False)  # so that later checkpoints name files of earlier ones
    return model, TrainState(model=model, rng=False)


def _fill(model, step):
    with torch.no_grad():
        model[0].weight.fill_(step // 3)
        model[1].weight.fill_(step)


def _holds(model, step):
    return bool((model[0].weight == step // 3).all() and (model[1].weight == step).all())


def _recorded(root, steps, **options):
    """Everything that saves of these steps do, in two launches."""
    root.mkdir()
    recording = Recording(root)
    with recording.recording():
        for some in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
            model, state = _state()
            with Checkpointer(root, wait=True, **options) as c:
                c.resume(state)
                for step in some:
                    _fill(model, step)
                    c.save(step, state, {"loss": 1 / step})
                    recording.acknowledged(step)
    return recording


def _check(tree, root, place, acknowledged):
    """Lay a state out, and load what it has. Returns the step."""
    lay_out(tree, root, place)
    try:
        for attempt in (None, "rolled forward"):
            model, state = _state()
            if attempt:
                History(LocalStore(place)).roll_forward()
            if not acknowledged and not History(LocalStore(place)).directories():
                return None
            with Checkpointer(place, timeout=10) as c:
                steps = c.steps()
                if not steps:
                    assert not acknowledged
                    continue
                loaded = c.load(state).step
            assert loaded >= max(acknowledged, default=0), (loaded, acknowledged)
            assert _holds(model, loaded), loaded
    finally:
        shutil.rmtree(place)
    return steps


@pytest.mark.parametrize(
    ("steps", "each", "most"),
    [(range(1, 5), 1, 150), pytest.param(range(1, 9), 12, 30_000, marks=[pytest.mark.full, pytest.mark.timeout(1500)])],
)
def test_every_state_that_a_power_cut_may_leave_loads_what_was_acknowledged(tmp_path, steps, each, most):
    recording = _recorded(tmp_path / "run", list(steps), keep=Keep(last=2, best=("loss", "max", 1)))
    draw = random.Random(0)
    found = list(states(recording.events, draw, each))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tree, acknowledged in draw.sample(found, min(most, len(found))):
            _check(tree, tmp_path / "run", tmp_path / "cut", acknowledged)
    print(f"{len(recording.events)} operations, {len(found)} states")
    assert len(found) > 1000


def test_the_recording_is_what_happened(tmp_path):
    root = tmp_path / "run"
    recording = _recorded(root, [1, 2, 3], keep=Keep(last=2))
    lay_out(tree_of([e for e in recording.events if isinstance(e, Change)]), root, tmp_path / "again")
    assert _content(tmp_path / "again") == _content(root)


def _content(root):
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else p.is_dir() for p in root.rglob("*")}


@pytest.mark.parametrize("kind", [int, str], ids=["file", "directory"])
def test_a_store_that_left_out_a_sync_would_be_found_out(tmp_path, kind):
    recording = _recorded(tmp_path / "run", [1, 2])
    events = [e for e in recording.events if not (isinstance(e, Synced) and isinstance(e.what, kind))]
    found = [(tree, acknowledged) for tree, acknowledged in states(events, random.Random(0), 0) if acknowledged]
    with warnings.catch_warnings(), pytest.raises((AssertionError, DistckptError)):
        warnings.simplefilter("ignore")
        for tree, acknowledged in reversed(found):
            _check(tree, tmp_path / "run", tmp_path / "cut", acknowledged)
