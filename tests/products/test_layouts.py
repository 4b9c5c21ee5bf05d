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
    """A run of each layout, made by whichever of pytest's processes comes first."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "layouts"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for layout, size in layouts.ALL.items() if not (root / "all").exists() else ():
            ranks.run(size, _save, layout, str(root))
        (root / "all").touch()
    return root


def _loads(saved, layout, sources):
    problems = ranks.run(layouts.ALL[layout], _load_all, layout, str(saved), sources)
    assert not [p for rank in problems for p in rank]


@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_layout_loads_what_others_saved(saved, layout):
    """A third of the product: of every layout another third, so that each is loaded by a third of all."""
    names = list(layouts.ALL)
    at = names.index(layout)
    _loads(saved, layout, names[(at + at // 3) % 3 :: 3])


@pytest.mark.full
@pytest.mark.parametrize("layout", layouts.ALL)
def test_every_layout_loads_what_every_layout_saved(saved, layout):
    _loads(saved, layout, list(layouts.ALL))
