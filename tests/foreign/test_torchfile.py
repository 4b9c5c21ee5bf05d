"""torch.save's files as sources: located, not loaded."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import warnings
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

import distckpt
from distckpt import TrainState
from distckpt.errors import Corrupt, DistckptError, FormatError, Mismatch, Unsupported
from distckpt.foreign.open import open_foreign
from tests.foreign.test_dcp import Runs, fresh, load, named_tensors, trained


def saved(value, folder, name="file.pt", **more):
    torch.save(value, folder / name, **more)
    return folder / name


def test_a_bare_state_dict_is_a_model(tmp_path):
    model, _ = trained()
    path = saved(model.state_dict(), tmp_path)
    again, _ = fresh()
    report = load(TrainState(model=again), path, verify=True)
    assert torch.equal(again[0].weight, model[0].weight)
    assert not report.unverified
    assert report.bytes_read < 3 * path.stat().st_size


@pytest.mark.parametrize("wrapper", [lambda m: nn.parallel.DataParallel(m), lambda m: torch.compile(m)])
def test_what_wrappers_add_to_names_is_taken_off(wrapper, tmp_path):
    model, _ = trained()
    path = saved({"model": wrapper(model).state_dict()}, tmp_path)
    assert sorted(open_foreign(path).manifest.tensors) == ["model.0.bias", "model.0.weight", "model.1.weight"]


def test_training_goes_on_from_a_nested_checkpoint_with_parameters_by_number(tmp_path):
    model, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    scheduler.last_epoch = 17
    tree = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=1),
        "best": np.float64(0.5),
    }
    path = saved(tree, tmp_path)
    again, its_optimizer = fresh()
    its_scheduler = torch.optim.lr_scheduler.StepLR(its_optimizer, 3)
    state = TrainState(model=again, optimizer=its_optimizer, lr_scheduler=its_scheduler)
    report = load(state, path)
    assert its_scheduler.last_epoch == 17
    assert report.unexpected == ["best", "epoch"]
    assert "argparse.Namespace" in open_foreign(path).unreadable["args"]
    assert open_foreign(path).object("best") == 0.5
    for m, o in ((model, optimizer), (again, its_optimizer)):
        for _ in range(3):
            o.zero_grad()
            m(torch.ones(2, 6)).square().sum().backward()
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_views_shared_storages_and_odd_tensors_are_found_where_they_lie(tmp_path):
    base = torch.arange(60.0)
    cases = {
        "view": base[10:30].view(4, 5),
        "strided": base[::7],
        "transposed": base[:12].view(3, 4).t(),
        "scalar": base[5],
        "empty": torch.zeros(2, 0),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "complex": torch.tensor([1 + 2j]),
        "eight": torch.tensor([0.5, 2.0]).to(torch.float8_e5m2),
        "wide": torch.tensor([2**63], dtype=torch.uint64),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    path = saved(cases, tmp_path)
    model = named_tensors(**{n: torch.zeros_like(t).contiguous().detach() for n, t in cases.items()})
    load(TrainState(model=model), path, verify=True)
    for name, tensor in cases.items():
        assert torch.equal(getattr(model, name), tensor), name


def test_tied_parameters_are_one_tensor_with_two_names(tmp_path):
    weight = torch.randn(5, 3)
    found = open_foreign(saved({"emb.weight": weight, "head.weight": weight, "part": weight[1:]}, tmp_path))
    assert found.manifest.aliases == {"model.head.weight": "model.emb.weight"}
    apart = nn.ModuleDict({"emb": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    apart.register_buffer("part", torch.zeros(4, 3))
    load(TrainState(model=apart), tmp_path / "file.pt")
    assert torch.equal(apart["head"].weight, weight)
    assert torch.equal(apart["emb"].weight, weight)


def test_plain_values_keep_their_types_or_say_what_they_are(tmp_path):
    values = {
        "set": {1, 2},
        "frozen": frozenset("a"),
        "complex": 1 + 2j,
        "bytes": b"\0\xff",
        "ordered": collections.OrderedDict(b=1, a=2),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"x": [1]}),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "nested": {3: (1, [None, True]), "t": (torch.ones(2),)},
        "integer": np.int64(-7),
        "truth": np.bool_(True),
        "big": 1 << 80,
    }
    found = open_foreign(saved(values | {"array": np.ones(2)}, tmp_path))
    expected = values | {"default": {"x": [1]}, "dtype": "torch.bfloat16", "device": "cuda:1", "size": (2, 3)}
    for name in values.keys() - {"nested"}:
        assert found.object(name) == expected[name], name
        assert type(found.object(name)) in {type(expected[name]), int, bool}, name
    assert found.object("nested")["t"][0].fqn == "nested.t.0"
    assert found.object("nested")[3] == (1, [None, True])
    assert "numpy" in found.unreadable["array"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "holds a int"),
        (torch.ones(2), "holds a Tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(value, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        open_foreign(saved(value, tmp_path))


def _old(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    value = {
        "w": base,
        "t": base.t(),
        "row": base[1],
        "h": torch.ones(3).bfloat16(),
        "e": torch.zeros(0),
        "n": (1, "x"),
    }
    value["i8"] = torch.tensor([1, -2], dtype=torch.int8)
    return value, saved(value, tmp_path, _use_new_zipfile_serialization=False)


def test_the_old_form_of_torch_save_is_read(tmp_path):
    value, path = _old(tmp_path)
    live = {"model": {k: torch.full_like(v, 9) for k, v in value.items() if isinstance(v, torch.Tensor)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distckpt.load(path, live)
    assert all(torch.equal(t, value[k]) for k, t in live["model"].items())
    with pytest.raises(Unsupported, match=r"nor does torch\.save's old form"):
        open_foreign(path).verify([])


def test_of_the_old_form_no_damage_goes_unnoticed_and_every_error_is_ours(tmp_path):
    _, path = _old(tmp_path)
    whole = path.read_bytes()
    for length in range(40, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises((Corrupt, FormatError)):
            open_foreign(path)
    random = Random(3)
    for _ in range(150):
        data = bytearray(whole)
        data[random.randrange(20, len(whole) - 60)] = random.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(DistckptError):
            open_foreign(path)


def test_what_is_no_torch_file_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"hello world")
    with pytest.raises(FormatError, match=r"neither a zip as torch\.save writes it, nor safetensors"):
        open_foreign(path)
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    with pytest.raises(FormatError, match="a TorchScript archive"):
        open_foreign(path)


def test_a_big_endian_file_is_refused(tmp_path):
    from torch.utils.serialization import config

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.byteorder", "big")
        path = saved({"w": torch.ones(2)}, tmp_path)
    assert config is not None
    with pytest.raises(Unsupported, match="byte order b'big'"):
        open_foreign(path)


def test_no_pickle_runs_anything(tmp_path):
    marker = tmp_path / "it-ran"
    path = saved({"model": {"w": torch.ones(2)}, "evil": Runs(marker)}, tmp_path)
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.unlink()
    load(TrainState(model=named_tensors(w=torch.zeros(2))), path)
    assert not marker.exists()
    path = saved({"w": Runs(marker)}, tmp_path)
    with pytest.raises(Mismatch, match=r"missing"):
        load(TrainState(model=named_tensors(w=torch.zeros(2))), path)
    assert not marker.exists()


def test_a_flipped_bit_and_a_cut_are_found(tmp_path):
    path = saved({"w": torch.arange(1000.0)}, tmp_path)
    whole = path.read_bytes()
    at = whole.index(torch.arange(1000.0).numpy().tobytes())
    path.write_bytes(whole[: at + 40] + bytes([whole[at + 40] ^ 1]) + whole[at + 41 :])
    model = named_tensors(w=torch.zeros(1000))
    with pytest.raises(Corrupt, match=r"file\.pt: model\.w: bytes"):
        load(TrainState(model=model), path, verify=True)
    for size in (len(whole) - 1, len(whole) // 2, 70):
        path.write_bytes(whole[:size])
        with pytest.raises(Corrupt, match=r"file\.pt: not the zip that torch.save writes"):
            open_foreign(path)


def test_a_large_file_is_not_read_to_be_opened(tmp_path):
    path = saved({f"w{i}": torch.zeros(1 << 18) for i in range(20)}, tmp_path)
    assert os.path.getsize(path) > 20 << 20
    assert open_foreign(path).bytes_read < 100_000
