"""DCP directories that torch wrote, loaded into live state through the loader there is."""

from __future__ import annotations

import warnings

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from distckpt import Checkpointer
from distckpt.errors import StateWarning
from tests import layouts, ranks


def _state_dict(model, optimizer):
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def _save(layout, folder):
    """Save the layout's expected values through dcp.save."""
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    layouts.fill(layouts.train_state(model, optimizer).capture())
    optimizer.param_groups[0]["lr"] = 0.123
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(_state_dict(model, optimizer) | {"epoch": 3}, checkpoint_id=folder, no_dist=layouts.SIZES[layout] == 1)


def _resume(layout, folder):
    """(fqns that are wrong, report) of a resume from the directory itself."""
    model, optimizer = layouts.build(layout)
    layouts.zero(model, optimizer)
    state = layouts.train_state(model, optimizer)
    with Checkpointer(folder, timeout=20) as c, pytest.warns(StateWarning, match="which another tool saved"):
        report = c.resume(state)
    captured = state.capture()
    wrong = layouts.wrong(captured)
    moments = sum(fqn.endswith((".exp_avg", ".exp_avg_sq", ".step")) for fqn in captured.tensors)
    trained = sum(len(g["params"]) for g in optimizer.param_groups)
    if moments != 3 * trained or optimizer.param_groups[0]["lr"] != 0.123 or optimizer.param_groups[1]["lr"] != 5e-4:
        wrong.append(f"{moments} moments of {trained} parameters, groups {optimizer.param_groups}")
    return wrong, report.missing, report.unexpected, 0 < len(report.unverified) <= len(report.loaded)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("dcp")
    for layout in ("one", "fsdp2", "fsdp3"):
        ranks.run(layouts.SIZES[layout], _save, layout, str(root / layout))
    return root


@pytest.mark.parametrize(
    ("layout", "source"), [("one", "fsdp3"), ("fsdp2", "fsdp3"), ("fsdp2", "one"), ("one", "one"), ("tp2", "fsdp2")]
)
def test_a_run_resumes_from_what_dcp_saved_in_any_layout(saved, layout, source, tmp_path):
    import shutil

    folder = shutil.copytree(saved / source, tmp_path / source)
    for wrong, missing, unexpected, unverified in ranks.run(layouts.SIZES[layout], _resume, layout, str(folder)):
        assert not wrong
        assert missing == ["trainer_state"]
        assert unexpected == ["epoch"]
        assert unverified
