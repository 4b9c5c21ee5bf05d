"""Ranks agree on what they hold: by digests alone when all are alike, and rightly when they are not."""

from __future__ import annotations

import glob
import json
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

from benchmarks.simulated import MODELS, fsdp, index_of
from distckpt import Checkpointer, TrainState
from distckpt.comm_threads import ThreadComm
from distckpt.errors import Mismatch
from distckpt.format import manifest
from distckpt.format.box import Box
from distckpt.format.partition import Copies, Grid, Split
from distckpt.saving.agree import agree
from distckpt.saving.divide import divide
from distckpt.saving.merge import Agreed
from distckpt.state import Everywhere, GlobalTensor, Layout, Shard, State
from distckpt.store.memory import MemoryStore
from tests import layouts, ranks


class CountingComm:
    """A comm that notes the bytes of every collective."""

    def __init__(self, inner):
        self.inner, self.rank, self.world_size, self.timeout = inner, inner.rank, inner.world_size, inner.timeout
        self.sent = []

    def all_gather(self, what, payload):
        self.sent.append(len(payload))
        return self.inner.all_gather(what, payload)

    def close(self):
        self.inner.close()


def on_threads(comms, fn):
    """Run fn(comm) on a thread for each comm; return results by rank; raise the first error."""
    results, errors = [None] * len(comms), []

    def work(i, comm):
        try:
            results[i] = fn(comm)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i, c), daemon=True) for i, c in enumerate(comms)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
        assert not t.is_alive()
    if errors:
        raise errors[0]
    return results


def test_no_collective_of_a_save_moves_more_than_128_bytes_a_rank_when_all_agree():
    store = MemoryStore()
    comms = [CountingComm(c) for c in ThreadComm.group(5)]

    def save(comm):
        model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10))
        with torch.no_grad():
            model[0].weight.fill_(1)
            model[0].bias.fill_(2)
        # generators are the process's own, and these ranks are threads of one process
        Checkpointer(store, comm=comm, wait=True).save(1, TrainState(model=model, rng=False))

    on_threads(comms, save)
    assert all(0 < size <= 128 for comm in comms for size in comm.sent)
    assert all(len(comm.sent) <= 4 for comm in comms)


def _counted_fsdp(root):
    import distckpt.run.checkpointer as module

    made = []
    original = module.comms.default

    def counting(timeout):
        made.append(CountingComm(original(timeout)))
        return made[-1]

    module.comms.default = counting
    model, optimizer = layouts.build("tp2fsdp2")
    layouts.make_moments(model, optimizer)
    with Checkpointer(root, timeout=20, wait=True) as c:
        c.save(1, layouts.train_state(model, optimizer))
    return made[0].sent


def test_a_sharded_save_moves_no_more_than_128_bytes_a_rank_in_a_collective(tmp_path):
    for sent in ranks.run(4, _counted_fsdp, str(tmp_path)):
        assert max(sent) <= 128
        assert len(sent) <= 4


def test_the_index_grows_with_the_number_of_tensors_and_not_with_tensors_times_ranks():
    model = MODELS["Llama-3 8B"]()
    assert len(model) == 873
    small, large = (
        index_of(model, {fqn: layout.held for fqn, layout in fsdp(model, n).layouts.items()}, n) for n in (8, 16384)
    )
    without_files = [{k: v for k, v in manifest.to_json(m).items() if k != "files"} for m in (small, large)]
    eight, many = (json.dumps(j) for j in without_files)
    assert many.replace("16384", "8") == eight
    data = manifest.encode(large)
    assert len(data) <= 1_000_000 + 100 * 16384
    assert manifest.decode(data, None) == large


def _stage(root, load):
    """Pipeline stages: each rank has its own layer and its optimizer state; both have the norm."""
    import torch.distributed as dist

    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.ModuleDict({f"layer{rank}": nn.Linear(200, 200), "norm": nn.LayerNorm(3)})
    optimizer = torch.optim.Adam(model[f"layer{rank}"].parameters(), lr=0.1 * (1 + rank))
    state = TrainState(model=model, optimizer=optimizer)
    with Checkpointer(root, timeout=20, wait=True) as c:
        if load:
            for p in model.parameters():
                p.detach().zero_()
            c.load(state)
        else:
            model[f"layer{rank}"](torch.ones(1, 200)).sum().backward()
            optimizer.step()
            c.save(1, state)
    return [(p.tolist(), optimizer.state[p]["exp_avg"].tolist()) for p in model[f"layer{rank}"].parameters()]


def test_pipeline_stages_that_hold_different_layers_are_one_checkpoint(tmp_path):
    saved = ranks.run(2, _stage, str(tmp_path), False)
    assert ranks.run(2, _stage, str(tmp_path), True) == saved
    both = nn.ModuleDict({"layer0": nn.Linear(200, 200), "layer1": nn.Linear(200, 200), "norm": nn.LayerNorm(3)})
    with Checkpointer(tmp_path, wait=True) as c, layouts.quiet():
        c.load(TrainState(model=both), only=("model",))
    assert [[p.tolist() for p in both[f"layer{r}"].parameters()] for r in range(2)] == [
        [p for p, _ in s] for s in saved
    ]


def _stage_without_a_place(root):
    import torch.distributed as dist

    from distckpt.errors import Mismatch as Refusal

    model = nn.ModuleDict({"norm": nn.LayerNorm(3)} | ({"layer0": nn.Linear(200, 200)} if dist.get_rank() else {}))
    with Checkpointer(root, timeout=20, wait=True) as c:
        return ranks.expect_error(lambda: c.load(TrainState(model=model), only=("model",)), Refusal)


def test_a_saved_tensor_that_no_rank_takes_is_refused_on_every_rank(tmp_path):
    ranks.run(2, _stage, str(tmp_path), False)
    for text in ranks.run(2, _stage_without_a_place, str(tmp_path)):
        assert "model.layer1.weight: in the checkpoint, but not in the state" in text
        assert "layer0" not in text


class _Layers(nn.Module):
    """Four layers with values by number, or those of one pipeline stage."""

    def __init__(self, numbers=range(4)):
        super().__init__()
        for i in numbers:
            torch.manual_seed(i)
            self.add_module(f"layer{i}", nn.Linear(64, 65 + i))


def _pipeline_over(root, kind, load):
    """Pipeline stages, each sharded over its dimension of one root mesh, with the pipeline's outside or inside."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    names = ("inner", "stage") if kind == "inside" else ("stage", "inner")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    stage = mesh["stage"].get_local_rank()
    model = _Layers(range(2 * stage, 2 * stage + 2))
    for layer in model.children():
        if kind == "tp":
            parallelize_module(layer, mesh["inner"], ColwiseParallel())
        else:
            fully_shard(layer, mesh=mesh["inner"])
    optimizer = torch.optim.AdamW(model.parameters())
    layouts.make_moments(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as c:
        if not load:
            c.save(1, state, check_replicas=True)
            return []
        expected = [p.full_tensor().tolist() for p in model.parameters()]
        layouts.zero(model, optimizer)
        c.load(state)
        return expected == [p.full_tensor().tolist() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["fsdp", "inside", "tp"])
def test_pipeline_stages_that_are_sharded_themselves_are_one_checkpoint(tmp_path, kind):
    ranks.run(4, _pipeline_over, str(tmp_path), kind, False)
    assert ranks.run(4, _pipeline_over, str(tmp_path), kind, True) == [True] * 4
    whole, expected = _Layers(), _Layers()
    layouts.zero(whole, torch.optim.SGD(whole.parameters()))
    with Checkpointer(tmp_path, wait=True) as c, layouts.quiet():
        c.load(TrainState(model=whole), only=("model",))
    assert [p.tolist() for p in whole.parameters()] == [p.tolist() for p in expected.parameters()]


def test_ranks_that_contradict_each_other_are_refused_with_the_fqn():
    store = MemoryStore()

    def save(comm):
        model = nn.Linear(3, 4 + comm.rank)
        Checkpointer(store, comm=comm, wait=True).save(1, TrainState(model=model, rng=False))

    with pytest.raises(Mismatch, match=r"model.weight: ranks describe it differently"):
        on_threads(ThreadComm.group(2), save)
    assert [e.name for e in store.list("")] == ["launches"]


def test_what_ranks_hold_apart_may_change_from_save_to_save():
    """What was put together for one save is not taken for the next, unless every rank still holds the same."""
    seen = {}

    def work(comm):
        for sizes in ((2, 3), (2, 4), (5, 4), (2, 3)):
            weight = torch.zeros(sizes[comm.rank])
            held = GlobalTensor(
                tuple(weight.shape), "float32", Everywhere(), (Shard(Box((0,), (len(weight),)), weight),)
            )
            state = State(tensors={f"stage{comm.rank}.w": held})
            _, agreed = agree(comm, lambda state=state: state, step=1, generation=lambda: 1)
            seen[comm.rank, sizes] = {fqn: tensor.shape for fqn, tensor in agreed.tensors.items()}

    on_threads(ThreadComm.group(2), work)
    assert all(shapes == {f"stage{i}.w": (n,) for i, n in enumerate(sizes)} for (_, sizes), shapes in seen.items())


def test_ranks_that_save_different_steps_are_told_so_at_once():
    store = MemoryStore()

    def save(comm):
        Checkpointer(store, comm=comm, wait=True).save(10 + comm.rank, TrainState(rng=False))

    with pytest.raises(Mismatch, match=r"ranks save different steps \(rank 0: 10, rank 1: 11\)"):
        on_threads(ThreadComm.group(2), save)
    assert [e.name for e in store.list("")] == ["launches"]


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.layer(x))


def _batch_norm(root, kind, load):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Norm()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    else:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    notes = []
    with Checkpointer(root, timeout=20, wait=True) as c, layouts.quiet():
        if load:
            notes = c.load(TrainState(model=model)).notes
        else:
            model(torch.randn(8, 4, generator=torch.Generator().manual_seed(dist.get_rank())))
            notes = c.save(1, TrainState(model=model)).notes
    bare = model.module if kind == "ddp" else model
    return bare.norm.running_mean.tolist(), bare.norm.num_batches_tracked.item(), notes


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_batch_norm_statistics_that_differ_come_back_as_they_were_on_each_rank(tmp_path, kind):
    saved = ranks.run(2, _batch_norm, str(tmp_path), kind, False)
    assert saved[0][0] != saved[1][0]
    assert "model.norm.running_mean differs between ranks: each keeps its own" in saved[0][2]
    loaded = ranks.run(2, _batch_norm, str(tmp_path), kind, True)
    assert [r[:2] for r in loaded] == [r[:2] for r in saved]
    elsewhere = ranks.run(3, _batch_norm, str(tmp_path), kind, True)
    assert all(r[0] == saved[0][0] for r in elsewhere)
    expected = "model.norm.running_mean: differed between the 2 ranks that saved it; every rank takes rank 0's"
    assert all(expected in r[2] for r in elsewhere)


class _Experts(nn.Module):
    """A gate that is the same on every rank, and an expert of this rank's own under the name that all give theirs."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(3, 2)
        torch.manual_seed(1 + rank)
        self.expert = nn.Linear(3, 3)
        self.register_buffer("phase", torch.randn(2, dtype=torch.complex64).conj())


def _experts(root):
    import torch.distributed as dist

    model = _Experts(dist.get_rank())
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = p.detach().clone()
    optimizer.step()
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    expected = [t.clone() for p in model.parameters() for t in (p.detach(), optimizer.state[p]["exp_avg"])]
    with Checkpointer(root, timeout=20, wait=True) as c:
        notes = c.save(1, state).notes
        layouts.zero(model, optimizer)
        c.load(state)
    found = [t for p in model.parameters() for t in (p.detach(), optimizer.state[p]["exp_avg"])]
    return notes, all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_parameters_that_nothing_keeps_equal_and_that_differ_come_back_as_they_were_on_each_rank(tmp_path):
    for notes, same in ranks.run(3, _experts, str(tmp_path)):
        assert same
        assert "model.expert.weight differs between ranks: each keeps its own" in notes
        assert not any("gate" in note for note in notes)


def _experts_elsewhere(root):
    import torch.distributed as dist

    from distckpt.errors import Mismatch

    model = _Experts(dist.get_rank())
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), rng=False)
    with Checkpointer(root, timeout=20, wait=True) as c, layouts.quiet():
        text = ranks.expect_error(lambda: c.load(state), Mismatch)
        c.load(state, per_rank={"model": "first", "optim": "first"})
    return text, model.expert.weight.tolist()


def test_values_of_their_own_are_refused_at_another_world_size_unless_one_ranks_are_chosen(tmp_path):
    ranks.run(3, _experts, str(tmp_path))
    (text, first), (_, second) = ranks.run(2, _experts_elsewhere, str(tmp_path))
    assert "model.expert.weight, model.expert.bias: each of the 3 ranks had values of its own" in text
    assert "optim.expert.weight.exp_avg" in text
    assert "per_rank={'optim': 'first'}" in text
    assert "gate" not in text
    assert first == second


def test_replicas_that_should_be_equal_and_are_not_are_found_when_asked(monkeypatch):
    monkeypatch.setattr("distckpt.adapters.slots.keeps_replicas_equal", lambda model: True)  # as if DDP did
    store = MemoryStore()

    def save(comm):
        model = nn.Linear(3, 3)
        with torch.no_grad():
            model.weight.fill_(1)
            model.bias.fill_(comm.rank == 2)
        Checkpointer(store, comm=comm, wait=True).save(1, TrainState(model=model, rng=False), check_replicas=True)

    with pytest.raises(Mismatch, match=r"model.bias .*: rank 2 differs from rank 0"):
        on_threads(ThreadComm.group(3), save)


def test_replicas_write_equal_bytes():
    count = 7
    tensors = {
        f"model.w{i}": Agreed(s, "float32", Layout(Grid(s, ((),) * len(s), 0), (Split(count, 1),)))
        for i, s in enumerate([(3, 5), (4096, 17), (7,), (1000, 1000), *[(64, 32)] * 50])
    }
    written = [0] * count
    for partition in divide(tensors).values():
        for rank in range(count):
            written[rank] += sum(4 * r.numel for r in partition.of_file(rank))
    assert sum(written) == sum(4 * torch.Size(t.shape).numel() for t in tensors.values())
    assert max(written) - min(written) <= 16 << 10


def test_copies_of_a_value_stand_in_each_rank_that_has_one(tmp_path):
    ranks.run(2, _batch_norm, str(tmp_path), "ddp", False)
    found = []
    for path in sorted(glob.glob(f"{tmp_path}/step-00000001/rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(file.get_tensor("model.norm.running_mean").tolist())
    assert found[0] != found[1]
    assert Copies((4,), 0, 2).copy_of(1) == 1


# -- objects of which each rank knows a part ------------------------------------------------------------------------


def _stages(root, mine):
    model = nn.ModuleDict({str(i): nn.Linear(3, 3) for i in mine})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    layouts.make_moments(model, optimizer)
    state = TrainState(model=model, optimizer=optimizer, rng=False)
    layouts.fill(state.capture())
    return state, optimizer


def _save_stages(root):
    state, _ = _stages(root, [torch.distributed.get_rank()])
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        return checkpointer.save(1, state).notes


def _load_stages(root, mine):
    state, optimizer = _stages(root, mine)
    layouts.fill(state.capture(), salt="other")
    optimizer.param_groups[0]["lr"] = 0.0
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, layouts.quiet():
        checkpointer.resume(state)
    return layouts.wrong(state.capture()), optimizer.param_groups[0]["lr"]


def test_pipeline_stages_resume_on_fewer_ranks(tmp_path):
    """The groups of the stages' optimizers are joined by fqn; so is what the environment says of their models."""
    assert ranks.run(2, _save_stages, str(tmp_path)) == [[], []]
    assert ranks.run(1, _load_stages, str(tmp_path), [0, 1]) == [([], 0.25)]


def _contradicting_stages(root):
    state, optimizer = _stages(root, [torch.distributed.get_rank()])
    optimizer.param_groups[0]["lr"] = float(torch.distributed.get_rank())
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        return checkpointer.save(1, state).notes


def _load_contradicting(root):
    state, _ = _stages(root, [0, 1])
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, layouts.quiet():
        return ranks.expect_error(lambda: checkpointer.load(state), Mismatch)


def test_groups_that_contradict_each_other_are_not_joined(tmp_path):
    assert ranks.run(2, _contradicting_stages, str(tmp_path))[0] == [
        "object optim differs between ranks: each keeps its own"
    ]
    assert "optim: each of the 2 ranks saved its own" in ranks.run(1, _load_contradicting, str(tmp_path))[0]


@pytest.mark.parametrize(
    ("rows", "columns", "shards", "replicas", "cell"),
    [
        (256, 32768, 16, 64, (1, 8192)),  # 16 rows a shard: a row each, and a quarter of it
        (256, 8192, 16, 16, (1, 8192)),
        (4096, 1024, 4, 4, (256, 1024)),
        (48, 16384, 16, 6, (1, 8192)),
        (26, 4096, 2, 5, (13, 820)),  # 13 rows and 5 replicas: nothing divides; columns
        (64, 16384, 4, 50, (8, 656)),  # 16 rows and 50 replicas: halves, and of each 25 slices, nearly even
    ],
)
def test_replicas_slice_what_they_share_into_few_stretches(rows, columns, shards, replicas, cell):
    held = Grid((rows, columns), ((Split(shards, 1),), ()), 0)
    tensor = Agreed((rows, columns), "float32", Layout(held, (Split(replicas, shards),)))
    found = divide({"w": tensor})["w"]
    assert found.cell([[0] * len(splits) for splits in found.splits]).sizes == cell
    seen = torch.zeros(rows, columns, dtype=torch.int)
    writers = set()
    for rank in range(shards * replicas):
        for region in found.of_file(rank):
            seen[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))] += 1
            writers.add(rank)
            rows_of = range(rows * (rank % shards) // shards, rows * (rank % shards + 1) // shards)
            assert region.offsets[0] in rows_of  # what the rank holds
    assert (seen == 1).all()
    assert len(writers) == shards * replicas
