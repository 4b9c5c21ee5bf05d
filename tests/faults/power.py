"""A power cut at any moment of a job: in every state that the file system may be left in, the newest checkpoint that was
acknowledged loads, bit for bit. Saves are waited for, or made by the writer process, or copied to a far directory too.
"""

from __future__ import annotations

import pickle
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import torch

from distckpt import Checkpointer, Keep, Local, TrainState
from distckpt.errors import DistckptError
from distckpt.run.history import History
from distckpt.run.pending import PendingSave
from distckpt.store.local import LocalStore
from tests.faults import syscalls
from tests.faults.cuts import Recording, events_of, lay_out, record, states
from tests.faults.failpoints import memory
from tests.faults.tally import Tally

KINDS = ("waited", "async", "tiers")


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


def _opened(kind, root, **options):
    local = Local(root / "near", keep=Keep(last=2)) if kind == "tiers" else None
    return Checkpointer(root / "run", wait=kind == "waited", local=local, **options)


def recorded(kind, root, steps, **options):
    """Everything that saves of these steps do, in two launches."""
    root.mkdir()
    recording = Recording(root)
    with tempfile.TemporaryDirectory() as folder:
        with recording.recording(), syscalls.in_writer(record, str(root), folder):
            for some in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
                model, state = _state()
                with _opened(kind, root, **options) as c:
                    c.resume(state)
                    before = None
                    for step in some:
                        _fill(model, step)
                        made = c.save(step, state, {"loss": 1 / step})
                        _wait(before, recording)  # while this one is written
                        before = (made, step)
                    _wait(before, recording)
        return events_of(recording.done, *(pickle.loads(path.read_bytes()) for path in Path(folder).iterdir()))


def _wait(saved, recording):
    if saved:
        made, step = saved
        if isinstance(made, PendingSave):
            made.wait()
        recording.acknowledged(step)


def check(kind, tree, root, place, acknowledged):
    """Lay a state out, and load what it has: as it is, and when what all ranks have acked is committed."""
    lay_out(tree, root, place)
    try:
        for rolls in (False, True):
            if rolls:
                History(LocalStore(place / ("near" if kind == "tiers" else "run"))).roll_forward()
            with _opened(kind, place, timeout=10) as c:
                _load(c, max(acknowledged, default=0))
        if kind == "tiers":
            with Checkpointer(place / "run", wait=True) as c:
                _load(c, 0)
    finally:
        shutil.rmtree(place)


def _load(checkpointer, least):
    model, state = _state()
    if not checkpointer.steps():
        assert not least
        return
    loaded = checkpointer.load(state).step
    assert loaded >= least, (loaded, least)
    assert _holds(model, loaded), loaded


def campaign(seed, seconds, most=None, kinds=KINDS):
    """Cut the power of jobs of each kind at random moments, and see what is left, until the time is up."""
    draw, tally = random.Random(seed), Tally()
    with tempfile.TemporaryDirectory(dir=memory()) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, kind in enumerate(kinds, 1):
            deadline = time.monotonic() + seconds / len(kinds)
            root = Path(folder, kind)
            steps = list(range(1, draw.randrange(5, 9)))
            events = recorded(kind, root, steps, keep=Keep(last=2, best=("loss", "max", 1)))
            tally.figures[f"operations of {kind}"] = len(events)
            for case, (tree, acknowledged) in enumerate(states(events, draw, 12)):
                if time.monotonic() > deadline or tally.cases == (most or 1 << 60) * number // len(kinds):
                    break
                try:
                    check(kind, tree, root, Path(folder, "cut"), acknowledged)
                except (AssertionError, DistckptError) as e:
                    tally.add(kind, "LOST", f"seed {seed}, {kind}, state {case}: {type(e).__name__}: {e}")
                else:
                    tally.add(kind, "PASS")
    return tally
