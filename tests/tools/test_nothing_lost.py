"""Whatever a checkpoint holds besides one model and one optimizer is in every copy, or the copy says that it is not."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import distckpt
from distckpt.errors import Mismatch, NotACheckpoint, Unsupported
from distckpt.run.source import open_source
from distckpt.tools.copy import copy
from distckpt.tools.formats import DeepSpeed
from distckpt.tools.view import Change
from tests import deepspeeds


def state_dict():
    """Two models, plain tensors, an optimizer within a dict, every kind of value; odd dtypes and shapes."""
    wide = torch.arange(7 * 11 * 3.0).reshape(7, 11, 3)
    model = {
        "w": torch.arange(6.0).reshape(2, 3),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "huge": torch.tensor([2**62 + 1]),
        "mask": torch.tensor([True, False]),
        "f8": torch.arange(4.0).to(torch.float8_e4m3fn),
        "wide": wide,
        "view": wide[::2, 1:3],
        "_extra_state": {"version": 1},
    }
    states = {"w": {"step": torch.tensor(2.0), "exp_avg": torch.ones(2, 3), "note": "mine"}}
    return {
        "model": model,
        "ema": {"w": torch.zeros(2, 3)},
        "gan": {"opt": {"state": states, "param_groups": [{"params": ["w"], "betas": (0.9, 0.99), "lr": 0.1}]}},
        "decay": torch.tensor(0.9),
        "complex": torch.ones(2, dtype=torch.complex64),
        "rngs": {"cpu": torch.arange(5, dtype=torch.uint8), "seeds": [1, 2]},
        "values": [None, True, 2**70, 2**3000, 0.5, float("inf"), "text", b"bytes\xff", 1 + 2j, {3, 1}, frozenset({2})],
        "ordered": OrderedDict(b=1, a=2),
        "counted": Counter("aab"),
        "in a tuple": (1, torch.empty(0, dtype=torch.int64)),
        5: {"six": torch.ones(1)},
    }


def leaves(value, path=()):
    if isinstance(value, dict) and not isinstance(value, Counter):
        for key, member in value.items():
            yield from leaves(member, (*path, key))
    elif isinstance(value, (list, tuple)):
        for i, member in enumerate(value):
            yield from leaves(member, (*path, i))
    else:
        yield path, value


def differing(found, wanted):
    """Paths of what is not there, or not the same bit for bit."""
    found, wanted = dict(leaves(found)), dict(leaves(wanted))

    def same(a, b):
        if type(a) is not type(b) or not isinstance(a, torch.Tensor):
            return type(a) is type(b) and a == b
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))

    return [
        p for p in wanted.keys() | found.keys() if p not in found or p not in wanted or not same(found[p], wanted[p])
    ]


def quietly(*args, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy(*args, **more)


@pytest.mark.parametrize(
    "hops", [["torch"], ["distckpt", "torch"], ["dcp", "torch"], ["torch", "dcp", "distckpt", "torch"]]
)
def test_everything_in_a_state_dict_comes_back_through_every_format(hops, tmp_path):
    wanted = state_dict()
    torch.save(wanted, tmp_path / "0.pt")
    at = tmp_path / "0.pt"
    for i, to in enumerate(hops):
        assert copy(at, tmp_path / f"{i}-{to}", to, verify=True).notes == []
        at = tmp_path / f"{i}-{to}"
    if "dcp" in hops:  # its keys are texts
        wanted["5"] = wanted.pop(5)
    found = torch.load(at, weights_only=False)
    assert differing(found, wanted) == []
    assert type(found["ordered"]) is (dict if "dcp" in hops else OrderedDict)


def test_numpy_arrays_become_tensors(tmp_path):
    distckpt.save(
        tmp_path / "run", {"model": {"w": torch.ones(2)}, "kept": {"array": np.arange(3), "both": (np.ones(1),)}}
    )
    copy(tmp_path / "run", tmp_path / "dcp", "dcp")
    for source in ("run", "dcp"):
        copy(tmp_path / source, tmp_path / f"{source}.pt", "torch")
        kept = torch.load(tmp_path / f"{source}.pt")["kept"]
        assert torch.equal(kept["array"], torch.arange(3))
        assert torch.equal(kept["both"][0], torch.ones(1, dtype=torch.float64))


def test_a_buffer_that_differed_between_ranks_is_noted_in_every_format(tmp_path):
    from tests import ranks

    ranks.run(2, _save_norms, str(tmp_path / "run"))
    for to in ("dcp", "torch", "safetensors", DeepSpeed(0, 1)):
        notes = quietly(tmp_path / "run", tmp_path / f"out-{str(to)[:9]}", to).notes
        assert "model.running_mean: differed between the ranks that saved it; rank 0's is written" in notes


def _save_norms(root):
    model = nn.BatchNorm1d(3)
    model.running_mean += torch.distributed.get_rank()
    with distckpt.Checkpointer(root, timeout=20) as c:
        c.save(1, distckpt.TrainState(model=model, rng=False))


# -- tags ------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A module with extra state, a frozen parameter, and buffers whose values float32 has not."""

    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(13, 7), nn.Linear(7, 13)
        self.still = nn.Parameter(torch.full((5,), 2.0), requires_grad=False)
        self.register_buffer("count", torch.tensor(2**60 + 1))
        self.register_buffer("nothing", torch.empty(0, 3))

    def forward(self, x):
        return self.out(torch.tanh(self.emb(x)) * self.still.mean() / 2).float()

    def get_extra_state(self):
        return {"said": 5, "bytes": b"\xff"}

    def set_extra_state(self, state):
        assert state == {"said": 5, "bytes": b"\xff"}
        self.taken = True


def _trained(root):
    """Two steps; a state dict with more than a model and an optimizer; the losses of two more steps."""
    model = deepspeeds.net(0, Odd)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for i in range(2):
        deepspeeds.step(model, optimizer, i)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    packed = optimizer.state_dict()
    optim = {
        "state": {names[i]: state for i, state in packed["state"].items()},
        "param_groups": [{**packed["param_groups"][0], "params": names}],
    }
    more = {
        "ema": {"w": torch.ones(3)},
        "decay": torch.tensor(0.9),
        "rngs": [torch.arange(3)],
        "epoch": 2,
        "raw": b"\xfe",
    }
    torch.save({"model": model.state_dict(), "optim": optim, **more}, root)
    return [deepspeeds.step(model, optimizer, i) for i in range(2, 4)]


def _go_on(folder, stage):
    model = deepspeeds.net(9, Odd)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = deepspeeds.engine(model, optimizer, stage)
        path, client = engine.load_checkpoint(folder)
        count = int(engine.module.count)
        losses = [deepspeeds.step(engine, None, i) for i in range(2, 4)]
        engine.save_checkpoint(folder, tag="theirs", client_state=client)
    return bool(path) and engine.module.taken, count, client, losses


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.full), 3])
def test_deepspeed_takes_extra_state_and_tensors_of_the_client_and_we_take_them_from_it(stage, tmp_path):
    losses = _trained(tmp_path / "x.pt")
    frozen = ("still",) if stage == 3 else ()
    quietly(tmp_path / "x.pt", tmp_path / "tags", DeepSpeed(stage, 2, frozen=frozen), verify=True)
    taken, count, client, again = deepspeeds.run(2, _go_on, str(tmp_path / "tags"), stage)[0]
    assert taken
    assert count == 2**60 + 1
    assert again == pytest.approx(losses, abs=1e-6)
    wanted = {k: v for k, v in torch.load(tmp_path / "x.pt").items() if k not in {"model", "optim"}}
    assert differing({k: client[k] for k in wanted}, wanted) == []
    for tag in ("global_step0", "theirs"):
        quietly(tmp_path / "tags" / tag, tmp_path / f"{tag}.pt", "torch", verify=True)
        found = torch.load(tmp_path / f"{tag}.pt")
        assert differing({k: found[k] for k in wanted}, wanted) == []
        assert found["model"]["_extra_state"] == {"said": 5, "bytes": b"\xff"}


def _saved(tmp_path, dtype):
    weight = torch.ones(4).to(dtype)
    optim = {"state": {"w": {"exp_avg": weight}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    torch.save({"model": {"w": weight}, "optim": optim}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float64, torch.int64])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weights_that_float32_has_not_all_values_of_are_refused_by_name(dtype, stage, tmp_path):
    with pytest.raises(Unsupported, match=rf"model\.w: is {str(dtype)[6:]}: the master weights of a tag are float32"):
        copy(_saved(tmp_path, dtype), tmp_path / "tags", DeepSpeed(stage, 2))


def test_frozen_parameters_are_frozen_under_their_new_names(tmp_path):
    _trained(tmp_path / "x.pt")
    quietly(tmp_path / "x.pt", tmp_path / "first", DeepSpeed(3, 2, frozen=("still",)))
    quietly(tmp_path / "first", tmp_path / "second", DeepSpeed(3, 3), change=Change(rename=(("^still$", "kept"),)))
    file = tmp_path / "second" / "global_step0" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    said = torch.load(file, weights_only=False)
    assert [*said["frozen_param_shapes"]] == ["kept"]
    assert said["buffer_names"] == ["count", "nothing"]
    with pytest.raises(Mismatch, match=r"frozen=\['stil'\]: the model has no parameters of these names"):
        copy(tmp_path / "x.pt", tmp_path / "third", DeepSpeed(3, 2, frozen=("stil",)))


def test_a_tied_parameter_may_be_trained_under_any_of_its_names(tmp_path):
    weight = torch.ones(2, 3)
    optim = {"state": {"head": {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 0.1, "params": ["head"]}]}
    torch.save({"model": {"emb": weight, "head": weight}, "optim": optim}, tmp_path / "x.pt")
    copy(tmp_path / "x.pt", tmp_path / "tags", DeepSpeed(1, 2), verify=True)
    file = tmp_path / "tags" / "global_step0" / "mp_rank_00_model_states.pt"
    said = torch.load(file, weights_only=False)
    assert (said["shared_params"], said["buffer_names"]) == ({"emb": "head"}, [])
    assert open_source(tmp_path / "tags").manifest.aliases.keys() <= {"model.emb", "model.head"}


def _save_installed(folder):
    from distckpt.adapters import deepspeed

    deepspeed.install()
    model = deepspeeds.net(0, Odd)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    engine = deepspeeds.engine(model, optimizer, 1)
    for i in range(2):
        deepspeeds.step(engine, None, i)
    engine.save_checkpoint(folder, client_state={"epoch": 2, "rng": torch.arange(3)})


def test_tags_of_an_unchanged_script_go_back_to_deepspeed(tmp_path):
    deepspeeds.run(2, _save_installed, str(tmp_path / "ours"))
    report = quietly(tmp_path / "ours", tmp_path / "theirs", DeepSpeed(2, 3), verify=True)
    assert report.destination == str(tmp_path / "theirs" / "global_step2")
    file = tmp_path / "theirs" / "global_step2" / "mp_rank_00_model_states.pt"
    said = torch.load(file, weights_only=False)
    assert (said["global_steps"], said["epoch"]) == (2, 2)
    assert torch.equal(said["rng"], torch.arange(3))
    (tmp_path / "ours" / "latest").write_text("gone")
    with pytest.raises(NotACheckpoint, match=r"gone: does not exist, though .*latest names it"):
        copy(tmp_path / "ours", tmp_path / "out")
