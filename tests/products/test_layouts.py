"""The product of layouts, saved x wanted, on real gloo processes: model and moments bit-identical."""

from __future__ import annotations

import fcntl

import pytest

from distckpt import Checkpointer
from tests import layouts, ranks

TRAINED = 9
"""Parameters with moments."""


def _save(layout, root):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    state = layouts.train_state(model, optimizer)
    layouts.fill(state.capture())
    optimizer.param_groups[0]["lr"] = 0.123
    with Checkpointer(f"{root}/{layout}", timeout=20, wait=True) as checkpointer:
        return checkpointer.save(5, state, check_replicas=True).nbytes


def _load_all(layout, root, saved):
    model, optimizer = layouts.build(layout)
    problems = []
    for source in saved:
        layouts.zero(model, optimizer)
        state = layouts.train_state(model, optimizer)
        with Checkpointer(f"{root}/{source}", timeout=20, wait=True) as checkpointer:
            checkpointer.load(state)
        captured = state.capture()
        problems += [f"{source} -> {layout}: {fqn}" for fqn in layouts.wrong(captured)]
        if sum(fqn.endswith(".exp_avg") for fqn in captured.tensors) != TRAINED:
            problems.append(f"{source} -> {layout}: moments are missing")
        if optimizer.param_groups[0]["lr"] != 0.123 or optimizer.param_groups[1]["lr"] != 5e-4:
            problems.append(f"{source} -> {layout}: hyper-parameters")
    return problems


@pytest.fixture(scope="module")
def saved(tmp_path_factory, worker_id):
    """Where runs of the layouts are, each made by whichever of pytest's processes needs it first."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "layouts"
    root.mkdir(exist_ok=True)
    return root


def _loads(root, layout, sources):
    for source in sources:
        with (root / f"{source}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{source}.made").exists():
                ranks.run(layouts.ALL[source], _save, source, str(root))
                (root / f"{source}.made").touch()
    problems = ranks.run(layouts.ALL[layout], _load_all, layout, str(root), sources)
    assert not [p for rank in problems for p in rank]


SAMPLE = list(layouts.ALL)[::2]


@pytest.mark.parametrize("layout", SAMPLE)
def test_a_layout_loads_what_others_saved(saved, layout):
    """A sample of the product: each of every other layout loads three, and is loaded by three."""
    at = SAMPLE.index(layout)
    _loads(saved, layout, SAMPLE[(at + at // 3) % 3 :: 3])


@pytest.mark.full
@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_layout_loads_what_every_layout_saved(saved, layout):
    _loads(saved, layout, list(layouts.ALL))
