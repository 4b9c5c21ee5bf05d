"""Every dtype and shape, non-contiguous and tied tensors, plain and as DTensors: bit-identical and readable."""

from __future__ import annotations

import glob

import pytest
import torch
from safetensors import safe_open
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.errors import Mismatch, Unsupported
from distckpt.format.layout import fqn_of
from tests import ranks

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int64", "int32",
    "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64", "complex128",
]  # fmt: skip
SHAPES = [(), (1,), (0,), (7,), (3, 0, 2), (13, 5), (2, 3, 4, 5), (97, 31)]


def bits(t):
    """A tensor's bytes, comparable whatever the dtype (NaNs included)."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def value(shape, dtype):
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    width = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (count * width,), generator=generator, dtype=torch.uint8)
    return raw.view(getattr(torch, dtype)).reshape(shape)


class Values(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, t in tensors.items():
            if t.is_floating_point() or t.is_complex():
                self.register_parameter(name, nn.Parameter(t, requires_grad=False))
            else:
                self.register_buffer(name, t)


def every_value():
    return {f"{dtype}_{i}": value(shape, dtype) for dtype in DTYPES for i, shape in enumerate(SHAPES)}


def save_and_load(tmp_path, tensors, into):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=Values(tensors)))
        c.load(TrainState(model=into))
    return into


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    tensors = every_value()
    loaded = save_and_load(tmp_path, tensors, Values({n: torch.zeros_like(t) for n, t in tensors.items()}))
    found = {**dict(loaded.named_parameters()), **dict(loaded.named_buffers())}
    assert not [n for n, t in tensors.items() if not torch.equal(bits(found[n]), bits(t))]


def test_data_files_open_with_safetensors_and_hold_the_right_values(tmp_path):
    tensors = every_value()
    save_and_load(tmp_path, tensors, Values(tensors))
    (path,) = glob.glob(f"{tmp_path}/step-00000001/*.safetensors")
    seen = set()
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is not a mapping
            fqn = fqn_of(name).removeprefix("model.")
            if fqn in tensors:
                seen.add(fqn)
                assert torch.equal(bits(file.get_tensor(name)), bits(tensors[fqn])), name
    assert seen == {n for n, t in tensors.items() if t.numel()}


def test_non_contiguous_tensors_are_saved_and_filled_in_place(tmp_path):
    base = torch.arange(600 * 500, dtype=torch.float32)
    tensors = {
        "transposed": base.reshape(600, 500).t(),
        "strided": base.reshape(300, 1000)[:, ::2],
        "expanded": base[:7].reshape(7, 1).expand(7, 5),
        "conjugate": torch.randn(300, 200, dtype=torch.complex64).conj(),
        "permuted": base[: 30 * 40 * 50].reshape(30, 40, 50).permute(2, 0, 1),
    }
    targets = {n: torch.zeros_like(t) if n != "expanded" else torch.zeros(7, 5) for n, t in tensors.items()}
    targets["transposed"] = torch.zeros(600, 500).t()
    before = {n: t.data_ptr() for n, t in targets.items()}
    model = save_and_load(tmp_path, tensors, Values(targets))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
        assert parameter.data_ptr() == before[name]


class Tied(nn.Module):
    def __init__(self, *, tied):
        super().__init__()
        self.first = nn.Linear(5, 7, bias=False)
        self.second = nn.Linear(5, 7, bias=False)
        if tied:
            self.second.weight = self.first.weight


@pytest.mark.parametrize("tied_target", [True, False])
def test_tied_weights_are_stored_once_and_load_into_tied_and_untied_models(tmp_path, tied_target):
    saved = Tied(tied=True)
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=saved))
        target = Tied(tied=tied_target)
        c.load(TrainState(model=target))
    assert torch.equal(target.first.weight, saved.first.weight)
    assert torch.equal(target.second.weight, saved.first.weight)
    (path,) = glob.glob(f"{tmp_path}/step-00000001/*.safetensors")
    with safe_open(path, "pt") as file:
        assert [n for n in file.keys() if n.startswith("model.")] == ["model.first.weight"]  # noqa: SIM118


def test_a_load_into_an_expanded_buffer_is_refused_before_anything_moves(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("ids", torch.arange(3).expand(1, 3))  # nothing is shared
    model.register_buffer("mask", torch.ones(1).expand(3))
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=model))
        with torch.no_grad():
            model.weight.zero_()
        state = TrainState(model=model)
        with pytest.raises(Mismatch, match=r"model.mask: expanded"):
            c.load(state)
        assert not model.weight.any()
        model.mask = model.mask.clone()
        c.load(state)
        assert model.weight.any()


def test_two_tensors_of_one_name_are_refused(tmp_path):
    model = nn.Module()
    model.add_module("net_b", nn.Linear(2, 2))
    model.add_module("net__orig_mod", nn.Module())  # read as net_ and the mark of torch.compile
    model.net__orig_mod.add_module("b", nn.Linear(2, 2))
    with pytest.raises(Unsupported, match=r"two tensors of the model have this name"):
        Checkpointer(tmp_path, wait=True).save(1, TrainState(model=model))


def test_untied_weights_do_not_load_into_a_tied_model_unsaid(tmp_path):
    with Checkpointer(tmp_path, wait=True) as c:
        c.save(1, TrainState(model=Tied(tied=False)))
        text = ranks.expect_error(lambda: c.load(TrainState(model=Tied(tied=True))), ValueError)
    assert "model.second.weight: saved with values of its own, but tied to model.first.weight here" in text


def _sharded_round_trip(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (3,))
    tensors = {n: t for n, t in every_value().items() if "bool" not in n and not n.startswith(("float8", "uint"))}

    class Sharded(nn.Module):
        def __init__(self, source):
            super().__init__()
            for i, (name, t) in enumerate(source.items()):
                placement = Replicate() if not t.dim() else Shard(i % t.dim())
                held = distribute_tensor(t.clone(), mesh, [placement], src_data_rank=None)
                self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    with Checkpointer(root, timeout=20, wait=True) as c:
        saved = Sharded(tensors)
        c.save(1, TrainState(model=saved))
        target = Sharded({n: torch.zeros_like(t) for n, t in tensors.items()})
        c.load(TrainState(model=target))
        whole = Values({n: torch.zeros_like(t) for n, t in tensors.items()})
        c.load(TrainState(model=whole))
    found = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    wrong = [n for n, t in tensors.items() if not torch.equal(bits(found[n]), bits(t))]
    for (n, a), (_, b) in zip(saved.named_parameters(), target.named_parameters(), strict=True):
        wrong += [n] * (not torch.equal(bits(a._local_tensor), bits(b._local_tensor)))
    return wrong


def test_sharded_tensors_of_every_dtype_and_shape_come_back(tmp_path):
    assert ranks.run(3, _sharded_round_trip, str(tmp_path)) == [[], [], []]


def _odd_layouts(root):
    """Uneven FSDP2 x TP (size 13 over dp 3, tp 2), bare _StridedShard, a permuted mesh, a flattened mesh."""

    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
    flat = mesh["dp", "tp"]._flatten("all")
    permuted = DeviceMesh("cpu", torch.tensor([[0, 3], [5, 1], [4, 2]]))
    whole = {f"w{i}": torch.randn(13, 11) for i in range(9)}
    import torch.distributed as dist

    for t in whole.values():
        dist.broadcast(t, 0)

    class Sharded(nn.Module):
        def __init__(self, fill):
            super().__init__()
            placed = [
                (mesh, [Shard(0), Shard(0)]),
                (mesh, [Shard(1), Shard(1)]),
                (mesh, [Replicate(), Shard(0)]),
                (mesh, [Shard(0), Replicate()]),
                (flat, [Shard(0)]),
                (permuted, [Shard(0), Shard(1)]),
                (permuted, [Replicate(), Shard(0)]),
                (mesh["dp"], [Shard(0)]),
                (mesh["tp"], [Replicate()]),
            ]
            for (name, t), (on, placements) in zip(whole.items(), placed, strict=True):
                held = distribute_tensor(t * fill, on, placements, src_data_rank=None)
                self.register_parameter(name, nn.Parameter(held, requires_grad=False))

    def tp_model():
        net = nn.Sequential(nn.Linear(5, 13), nn.LayerNorm(13))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel()})
        return fully_shard(net, mesh=mesh["dp"])

    torch.manual_seed(3)
    saved, net = Sharded(1.0), tp_model()
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(1, TrainState(model={"a": saved, "b": net}), check_replicas=True)
        again, net2 = Sharded(0.0), tp_model()
        c.load(TrainState(model={"a": again, "b": net2}))
        plain = Values({n: torch.zeros_like(t) for n, t in whole.items()})
        c.load(TrainState(model={"a": plain}), only=("model.a",))
    wrong = [n for n, p in plain.named_parameters() if not torch.equal(p, whole[n])]
    for (n, a), (_, b) in zip(saved.named_parameters(), again.named_parameters(), strict=True):
        wrong += [n] * (not torch.equal(a._local_tensor, b._local_tensor))
    for (n, a), (_, b) in zip(net.named_parameters(), net2.named_parameters(), strict=True):
        wrong += [n] * (not torch.equal(a._local_tensor, b._local_tensor))
    return wrong


def test_uneven_and_irregular_meshes_come_back(tmp_path):
    assert ranks.run(6, _odd_layouts, str(tmp_path)) == [[]] * 6


def _partial(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (2,))
    model = nn.Module()
    model.register_parameter(
        "w", nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]), requires_grad=False)
    )
    with Checkpointer(root, timeout=20, wait=True) as c:
        return ranks.expect_error(lambda: c.save(1, TrainState(model=model)), Unsupported)


def test_partial_placements_are_refused_with_the_fqn(tmp_path):
    for text in ranks.run(2, _partial, str(tmp_path)):
        assert "model.w" in text
        assert "Partial" in text
