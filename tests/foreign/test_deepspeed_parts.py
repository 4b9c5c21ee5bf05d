"""Tags of pipelines and of experts: what they are read as is what their live engines' checkpoints hold, bit for bit."""

from __future__ import annotations

import pytest

from distckpt.run.source import open_source
from tests import deepspeeds
from tests.foreign import parted
from tests.foreign.parted import CASES

_made = {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name) -> (directory of `tags` and `ours`, losses of the steps after them): saved when asked for."""

    def get(name):
        if name not in _made:
            root = tmp_path_factory.mktemp(name.replace(" ", "-"))
            _made[name] = root, deepspeeds.run(CASES[name].size, parted.save, CASES[name], str(root))[0]
        return _made[name]

    yield get
    _made.clear()


@pytest.mark.parametrize("name", CASES)
def test_a_tag_is_read_as_what_its_engine_holds(name, made):
    root, _ = made(name)
    live = parted.ours(root)
    found = open_source(root / "tags", order=parted.order_in(live))
    held, read = parted.content(live), parted.content(found)
    assert read.keys() == held.keys()
    assert not [fqn for fqn in held if read[fqn] != held[fqn]]
    for what in ("groups", "values"):
        assert found.object("optim")[what] == live.object("optim")[what]
    assert found.object("lr_scheduler") == live.object("lr_scheduler")
    counted, wanted = (o.object("deepspeed")["engines"]["model"] for o in (found, live))
    assert {n: counted[n] for n in wanted if n != "loss_scale"} == {n: wanted[n] for n in wanted if n != "loss_scale"}
    assert wanted.get("loss_scale", {}).items() <= counted.get("loss_scale", {}).items()
    assert (found.object("epoch"), found.manifest.step, found.notes) == (3, 2, [])
