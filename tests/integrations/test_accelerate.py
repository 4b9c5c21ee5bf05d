"""Accelerate through distckpt: a run that was killed goes on as one that went through."""

from __future__ import annotations

import importlib.util

import pytest

from distckpt.errors import Mismatch, StateWarning
from tests import ranks

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("accelerate is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it


@pytest.fixture(scope="module")
def hf():
    from tests.integrations import accelerators

    return accelerators


@pytest.mark.parametrize(
    ("die", "workers", "accumulate"), [pytest.param(4, 0, 1, marks=pytest.mark.full), (11, 0, 1), (13, 2, 2)]
)
def test_a_resume_goes_on_with_the_same_samples_and_losses(hf, tmp_path, die, workers, accumulate):
    options = {"workers": workers, "accumulate": accumulate}
    whole = hf.train(tmp_path / "whole", 16, **options)
    hf.train(tmp_path / "run", 16, die=die, **options)
    assert hf.train(tmp_path / "run", 16, **options) == whole[die:]
    assert sorted(x for _, samples, *_ in whole[:11] for x in samples) == list(range(22))


def test_a_loader_that_does_not_tell_where_it_is_is_warned_of(hf, tmp_path):
    with pytest.warns(StateWarning, match="use_stateful_dataloader=True"):
        hf.train(tmp_path / "a", 1, loaders={})
    with pytest.warns(StateWarning, match="use_seedable_sampler=True"):
        hf.train(tmp_path / "b", 1, loaders={"use_stateful_dataloader": True})


@pytest.mark.parametrize(
    "layout", ["fsdp2", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("ddp", "zero2"))]
)
def test_a_resume_on_two_ranks_goes_on_with_the_same_samples_and_losses(hf, tmp_path, layout):
    preload = ("tests.integrations.accelerators", *(["tests.deepspeed_loaded"] if layout == "zero2" else []))
    lives = ranks.run(2, hf.lives, tmp_path, layout, preload=preload)
    for whole, resumed in lives:
        assert resumed == whole
    assert lives[0][0][0][1] != lives[1][0][0][1]  # each its own samples
    with pytest.raises(Mismatch, match=r"2 ranks.*per_rank={'dataloader': 'first'}"):
        hf.train(tmp_path / "run", 9)
