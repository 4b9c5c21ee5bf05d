"""State dicts through every door: Checkpointer, distckpt.save/load and DCP write what all three read, at any world size."""

from __future__ import annotations

import warnings

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_state_dict,
)

import distckpt
from distckpt import Checkpointer
from distckpt.adapters.dcp import StorageReader, StorageWriter
from tests import layouts, ranks

LAYOUTS = ("one", "fsdp3", "fsdp1x2")
DOORS = ("checkpointer", "direct", "dcp")


def build(layout):
    model, optimizer = layouts.build(layout)
    layouts.make_moments(model, optimizer)
    return model, optimizer, layouts.train_state(model, optimizer, rng=False)


def state_dict(model, optimizer):
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def quiet():
    """DCP warns that it does without torch.distributed, FSDP1 of its own state dicts."""
    warnings.simplefilter("ignore")


def _save(layout, root):
    model, optimizer, state = build(layout)
    layouts.fill(state.capture())
    optimizer.param_groups[0]["lr"] = 0.123
    quiet()
    with Checkpointer(f"{root}/{layout}-checkpointer", timeout=20, wait=True) as checkpointer:
        checkpointer.save(5, state)
    distckpt.save(f"{root}/{layout}-direct", state_dict(model, optimizer))
    dcp.save(state_dict(model, optimizer), storage_writer=StorageWriter(f"{root}/{layout}-dcp"))


def _load_all(layout, root):
    model, optimizer, state = build(layout)
    quiet()
    problems = []
    for source in (f"{saved}-{door}" for saved in LAYOUTS for door in DOORS):
        for door in DOORS:
            if door == "checkpointer" and source.endswith(door):
                continue  # test_layouts has that
            layouts.zero(model, optimizer)
            layouts.make_moments(model, optimizer)
            optimizer.param_groups[0]["lr"] = 0.0
            path = f"{root}/{source}"
            if door == "checkpointer":
                with Checkpointer(path, timeout=20, wait=True) as checkpointer:
                    checkpointer.load(state, only=("model", "optim"))
            else:
                into = state_dict(model, optimizer)
                if door == "direct":
                    distckpt.load(path, into, only=("model", "optim"))
                else:
                    dcp.load(into, storage_reader=StorageReader(path))
                set_state_dict(model, optimizer, model_state_dict=into["model"], optim_state_dict=into["optim"])
            captured = state.capture()
            problems += [f"{source} -> {layout} by {door}: {fqn}" for fqn in layouts.wrong(captured)]
            if optimizer.param_groups[0]["lr"] != 0.123 or optimizer.param_groups[1]["lr"] != 5e-4:
                problems.append(f"{source} -> {layout} by {door}: hyper-parameters")
    return problems


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("doors")
    for layout in LAYOUTS:
        ranks.run(layouts.ALL[layout], _save, layout, str(root))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_any_door_wrote_every_door_reads(saved, layout):
    problems = ranks.run(layouts.ALL[layout], _load_all, layout, str(saved))
    assert not [p for rank in problems for p in rank]
