"""Blocks that several ranks need: read once, sent to the others, and found damaged on every rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from distckpt.errors import Corrupt
from tests import ranks

MIB = 1 << 20
ROWS = {"rows": 0, "columns": 1}


class Net(nn.Module):
    def __init__(self, placements, dtype=torch.float32):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        super().__init__()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for i, shape in enumerate([(1100, 700), (513, 3, 301), (2000,), (1, 77), (900, 1000)]):
            dims = [p if p < len(shape) else 0 for p in placements]
            cut = [_placement(d) for d in dims]
            whole = distribute_tensor(values(i, shape).to(dtype), mesh, cut, src_data_rank=None)
            self.register_parameter(f"w{i}", nn.Parameter(whole))


def values(i, shape):
    return (torch.arange(torch.Size(shape).numel()) % 65_521 + i).float().view(shape)


def _placement(dim):
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if dim < 0 else Shard(dim)


def _save(root, dim):
    with Checkpointer(root, timeout=60) as c:
        c.save(1, TrainState(model=Net([dim]), rng=False), wait=True)


def _load(root, dim, dtype=torch.float32):
    """(bytes read, names of wrong tensors)."""
    model, truth = Net([dim], dtype), Net([dim], dtype)
    with torch.no_grad():
        for p in model.parameters():
            p._local_tensor.fill_(-1)
    with Checkpointer(root, timeout=60) as c:
        report = c.load(TrainState(model=model, rng=False), step=1)
    pairs = zip(model.named_parameters(), truth.parameters(), strict=True)
    return report.bytes_read, [n for (n, a), b in pairs if not torch.equal(a._local_tensor, b._local_tensor)]


def _bytes(root):
    return sum(f.stat().st_size for f in Path(root).glob("step-*/*.safetensors"))


@pytest.mark.parametrize(("before", "after"), [((2, 0), (2, 1)), ((3, 0), (2, 0)), ((2, 1), (3, 0)), ((2, 0), (3, 1))])
def test_bytes_that_several_ranks_need_are_read_once(tmp_path, before, after):
    ranks.run(before[0], _save, str(tmp_path), before[1])
    found = ranks.run(after[0], _load, str(tmp_path), after[1])
    assert [wrong for _, wrong in found] == [[]] * after[0]
    files = before[0]
    once = sum(read for read, _ in found) - _bytes(tmp_path)
    assert once <= after[0] * files * 16_384  # headers and tables, which each rank reads


def test_strided_pieces_are_cast_when_their_last_byte_has_come(tmp_path):
    ranks.run(2, _save, str(tmp_path), 0)
    found = ranks.run(2, _load, str(tmp_path), 1, torch.float64)
    assert [wrong for _, wrong in found] == [[], []]


def test_many_replicas_read_once_and_few_each_for_itself(tmp_path):
    ranks.run(2, _save, str(tmp_path), 0)
    size = _bytes(tmp_path)
    few = ranks.run(2, _load, str(tmp_path), -1)
    assert [wrong for _, wrong in few] == [[], []]
    assert sum(read for read, _ in few) > 1.9 * size
    many = ranks.run(2, _load_shared, str(tmp_path), -1)
    assert [wrong for _, wrong in many] == [[], []]
    assert sum(read for read, _ in many) < 1.05 * size


def _load_shared(root, dim):
    from distckpt.loading import deal

    deal.REPLICAS = 2
    return _load(root, dim)


def _load_damaged(root):
    before = Net([1])
    with Checkpointer(root, timeout=60) as c:
        return ranks.expect_error(lambda: c.load(TrainState(model=before, rng=False), step=1), Corrupt)


def test_damage_that_one_rank_reads_is_an_error_on_all_that_names_file_and_fqn(tmp_path):
    ranks.run(2, _save, str(tmp_path), 0)
    path = next(tmp_path.glob("step-*/rank-00001*.safetensors"))
    with path.open("r+b") as f:
        f.seek(2 * MIB + 5)
        byte = f.read(1)
        f.seek(2 * MIB + 5)
        f.write(bytes([byte[0] ^ 1]))
    for text in ranks.run(2, _load_damaged, str(tmp_path)):
        assert path.name in text
        assert "model.w" in text
