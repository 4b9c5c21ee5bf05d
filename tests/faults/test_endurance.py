"""A few lives of a run that endures; and that the campaign finds what grows, and what is not as it was."""

from __future__ import annotations

import os

import pytest
import torch

from tests.faults.endurance import Endured

LEAKED = []


def leak_memory(program):
    LEAKED.append(torch.ones(1 << 16))


def leak_a_descriptor(program):
    LEAKED.append(os.open(os.devnull, os.O_RDONLY))


def flip_a_bit(program):
    next(program.model.parameters()).detach().view(torch.int32)[0] ^= 1


def draw_a_number(program):
    torch.rand(1)


def leave_a_file(program):
    with open(f"{os.environ['TMPDIR']}/left", "w"):
        pass


def test_a_run_that_is_killed_and_goes_on_under_another_layout_is_exact_and_leaves_nothing(tmp_path):
    run = Endured(tmp_path, 0, 60, frozen=True)
    run.life("fsdp2", 2, 10, "all")
    run.life("plain", 1, 8, "none")
    run.samples()
    assert not run.tally.problems, run.tally
    assert run.saves >= 15


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (flip_a_bit, "step 2: model.a.weight"),
        pytest.param(leak_memory, "KiB", marks=pytest.mark.full),
        pytest.param(leak_a_descriptor, "descriptors", marks=pytest.mark.full),
        pytest.param(draw_a_number, "rng", marks=pytest.mark.full),
        pytest.param(leave_a_file, "left in the temporary directory", marks=pytest.mark.full),
    ],
)
def test_what_grows_and_what_is_not_as_it_was_is_found(tmp_path, plant, found):
    run = Endured(tmp_path, 0, 120, frozen=False, plant=plant)
    for saves in (2, 60 if "leak" in plant.__name__ else 1):
        run.life("plain", 1, saves, "none")
    run.growth(2)
    assert any(found in problem for problem in run.tally.problems), run.tally
