"""Two machines that take turns on one root, each with a local directory of its own; some send nothing before they end."""

from __future__ import annotations

import random
import warnings

import pytest

from distckpt import Checkpointer, Keep, Local
from distckpt.errors import RunConflict
from distckpt.run.history import History
from distckpt.store.local import LocalStore
from distckpt.tools.verify import damage
from tests.run.lives import until
from tests.run.test_tiers import Training, resumed, same, steps_at, train

pytestmark = pytest.mark.filterwarnings("ignore::distckpt.errors.StateWarning")


def _turns(folder, draw, turns):
    """Turns of random machines: each resumes, or rewinds, and saves a few steps. What is resumed is what was saved."""
    root, contents, newest, sent = folder / "root", {}, None, False
    for _ in range(turns):
        sends, training = draw.random() < 0.6, Training()
        local = Local(folder / draw.choice("ab"), keep=Keep(last=2), bandwidth=None if sends else 500)
        with Checkpointer(root, local=local, timeout=20 if sends else 1.5) as c:
            steps = c.steps()
            back = draw.choice(steps) if steps and draw.random() < 0.4 else None
            report = c.resume(training.state, step=back)
            step = report.step if report else 0
            if report:
                assert any(same(training.content(), saved) for saved in contents[step])
            if sent and back is None:
                assert step == newest, "what the root had of the last turn was not resumed"
                assert same(training.content(), contents[step][-1])
            for _ in range(draw.randrange(1, 4)):
                step += 1
                for _ in range(draw.randrange(1, 5)):
                    training.step()
                c.save(step, training.state, wait=True)
                contents.setdefault(step, []).append(training.content())
        newest, sent = step, sends
        if sends:
            assert steps_at(root)[-1] == newest
        for checkpoint in History(LocalStore(root)).valid():
            assert not damage(checkpoint)


def test_machines_that_take_turns_resume_what_was_saved_last(tmp_path):
    _turns(tmp_path, random.Random(3), 6)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(20))
def test_the_same_holds_for_many_turns(tmp_path, seed):
    _turns(tmp_path, random.Random(seed), 12)


@pytest.mark.parametrize("again", [False, True])
def test_a_step_that_two_machines_saved_is_read_as_the_root_has_it_and_stays_there(near, far, tmp_path, again):
    train(far, near, [1])
    ours, theirs = Training(), Training()
    with warnings.catch_warnings(), Checkpointer(far, local=near, timeout=30) as c:
        warnings.simplefilter("ignore")
        c.resume(ours.state)
        with Checkpointer(far, local=tmp_path / "elsewhere", timeout=30) as d:
            d.resume(theirs.state)
            ours.step()
            c.save(2, ours.state, wait=True)  # superseded, and never sent
            for _ in range(2):
                theirs.step()
            d.save(2, theirs.state)
    for _ in range(1 + again):
        loaded, report = resumed(far, near)
        assert (report.step, same(loaded, theirs.content())) == (2, True)
    with Checkpointer(far, timeout=30) as c:
        c.load(ours.state)
    assert same(ours.content(), theirs.content())


def test_a_run_that_gets_a_root_is_fenced_off_by_its_launches_as_any(near, far, tmp_path):
    train(near, None, [1])
    train(near, None, [2])
    ours = Training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpointer(far, local=near, timeout=30) as c:
            c.resume(ours.state)
            c.save(3, ours.state)
            until(lambda: 3 in steps_at(far))
            resumed(far, tmp_path / "elsewhere")
            c.save(4, ours.state)
    assert any("a later launch, elsewhere" in str(w.message) for w in caught)
    assert not (far / "step-00000004").exists()


def test_a_directory_that_was_used_without_its_root_meanwhile_is_refused(near, far, tmp_path):
    train(far, near, [1])
    train(near, None, [2])
    train(far, tmp_path / "elsewhere", [2])
    with pytest.raises(RunConflict, match=r"0002\.json is another in .*nvme.* than in .*root.*each was used without"):
        resumed(far, near)
    assert steps_at(far) == [1, 2]
