"""The product of live backends, saved x wanted, on real gloo processes.

After three steps on one backend another one loads: masters, moments, steps and groups are bit-identical, and three more
steps are those of its own uninterrupted run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, TrainState, comm
from distckpt.state import torch_dtype
from tests import deepspeeds
from tests.layouts import _region, quiet

SIZES = {"fsdp2x3": 3, "fsdp1x2": 2, "ddpx2": 2, "zero1x2": 2, "zero2x3": 3, "zero3x2": 2, "zero3x4": 4, "one": 1}
NAMES = list(SIZES)
LEAVING_OUT = 3
"""In CI a backend loads every third of the others, and itself; all of them in `make test-all`."""


def build(backend, seed=0):
    """(model or engine, optimizer, None for an engine). Collective."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model = deepspeeds.net(seed)
    if backend.startswith("zero"):
        optimizer = torch.optim.AdamW(deepspeeds.groups(model))
        return deepspeeds.engine(
            model, optimizer, int(backend[4]), zero={"stage3_param_persistence_threshold": 9}
        ), None
    if backend.startswith("fsdp2"):
        fully_shard(model.up)
        fully_shard(model)
    elif backend.startswith("fsdp1"):
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        two = {"up.weight", "down.weight", "emb.weight"}
        named = [(n.replace("_fsdp_wrapped_module.", ""), p) for n, p in model.named_parameters() if p.requires_grad]
        decayed, rest = ([p for n, p in named if (n in two) == wanted] for wanted in (True, False))
        return model, torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1, "lr": 2e-3}, {"params": rest, "weight_decay": 0.0, "lr": 1e-3}]
        )
    elif backend.startswith("ddp"):
        model = torch.nn.parallel.DistributedDataParallel(model)
    return model, torch.optim.AdamW(deepspeeds.groups(model))


def state_of(model, optimizer):
    return TrainState(model=model, optimizer=optimizer, rng=False)


def hypers(state):
    """Fqn -> its group's learning rate and weight decay, as every rank together knows them."""
    groups = state.capture().objects["optim"].value["groups"]
    return {fqn: (group["lr"], group["weight_decay"]) for group in groups for fqn in group["params"]}


def _save(backend, root):
    model, optimizer = build(backend)
    losses = [deepspeeds.step(model, optimizer, i) for i in range(3)]
    state = state_of(model, optimizer)
    with Checkpointer(f"{root}/{backend}", timeout=20, wait=True) as checkpointer:
        checkpointer.save(3, state, check_replicas=True)
    held = {
        fqn: (t.shape, t.dtype, [(s.region, s.tensor.clone()) for s in t.shards])
        for fqn, t in state.capture().tensors.items()
    }
    losses += [deepspeeds.step(model, optimizer, i) for i in range(3, 6)]
    if comm.current().rank == 0:
        Path(f"{root}/{backend}.json").write_text(json.dumps(losses))
    return held, hypers(state)


def _joined(held):
    """Whole tensors of what the ranks say they hold."""
    whole = {}
    for of_rank, _ in held:
        for fqn, (shape, dtype, shards) in of_rank.items():
            tensor = whole.setdefault(fqn, torch.full(shape, float("nan")).to(torch_dtype(dtype)))
            for region, part in shards:
                _region(tensor, region).copy_(part.view(_region(tensor, region).shape))
    return whole


def _load(backend, root, sources):
    problems = []
    own = json.loads(Path(f"{root}/{backend}.json").read_text())[3:]
    for source in sources:
        wanted, groups = torch.load(f"{root}/{source}.pt")
        model, optimizer = build(backend, seed=5)
        state = state_of(model, optimizer)
        with Checkpointer(f"{root}/{source}", timeout=20, wait=True) as checkpointer, quiet():
            checkpointer.load(state)
        held = state.capture()
        where = f"{source} -> {backend}:"
        if held.tensors.keys() - wanted.keys() or hypers(state).items() - groups.items():
            problems.append(f"{where} names {held.tensors.keys() ^ wanted.keys()} or groups {hypers(state)}")
        for fqn, tensor in held.tensors.items():
            parts = [(s.tensor, _region(wanted[fqn], s.region)) for s in tensor.shards]
            problems += [f"{where} {fqn}" for a, b in parts if not torch.equal(a, b.view(a.shape))]
        losses = [deepspeeds.step(model, optimizer, i) for i in range(3, 6)]
        far = max(abs(a - b) / b for a, b in zip(losses, own, strict=True))
        if far > (0 if source == backend else 1e-6):
            problems.append(f"{where} losses {losses}, not {own}: {far}")
    return problems


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("backends")
    first = {}
    for backend, size in SIZES.items():
        held = deepspeeds.run(size, _save, backend, str(root))
        whole = _joined(held)
        groups = {fqn: hyper for _, of_rank in held for fqn, hyper in of_rank.items()}
        torch.save((whole, groups), root / f"{backend}.pt")
        first = first or whole
        assert whole.keys() == first.keys()
        for fqn, tensor in whole.items():
            assert torch.allclose(tensor, first[fqn], rtol=1e-4, atol=1e-6), f"{backend}: {fqn} is another tensor"
    return root


def _check(saved, backend, sources):
    problems = deepspeeds.run(SIZES[backend], _load, backend, str(saved), sources)
    assert not [p for rank in problems for p in rank]


@pytest.mark.parametrize("backend", NAMES)
def test_a_backend_goes_on_from_what_others_saved(saved, backend):
    others = [b for i, b in enumerate(NAMES) if (i + NAMES.index(backend)) % LEAVING_OUT == 0 or b == backend]
    _check(saved, backend, others)


@pytest.mark.full
@pytest.mark.parametrize("backend", NAMES)
def test_every_backend_goes_on_from_what_every_backend_saved(saved, backend):
    _check(saved, backend, NAMES)
