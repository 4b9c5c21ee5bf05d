"""A load reads what it needs and no more."""

from __future__ import annotations

import torch
from torch import nn

from distckpt import Checkpointer, TrainState
from tests import layouts, ranks

MIB = 1 << 20


def _save_and_load_model(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def build():
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8)))  # 64 MiB a rank of 2
        model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        return model.to_empty(device="cpu")

    model = build()
    optimizer = torch.optim.Adam(model.parameters())
    for i, p in enumerate(model.parameters()):
        p._local_tensor.fill_(i)
    layouts.make_moments(model, optimizer)
    with Checkpointer(root, timeout=60, wait=True) as c:
        c.save(1, TrainState(model=model, optimizer=optimizer))
        again = build()
        report = c.load(TrainState(model=again), only=("model",))
    wrong = [i for i, p in enumerate(again.parameters()) if not (p._local_tensor == i).all()]
    return report.bytes_read, sum(p._local_tensor.nbytes for p in again.parameters()), wrong


def test_loading_the_model_alone_reads_no_more_than_its_bytes_and_five_percent(tmp_path):
    for read, needed, wrong in ranks.run(2, _save_and_load_model, str(tmp_path)):
        assert needed == 64 * MIB
        assert read <= 1.05 * needed
        assert not wrong
