"""Pipelines of DeepSpeed: captured stage by stage, resumed bit for bit, and over other stages and ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState, comm
from distckpt.errors import Unsupported
from tests import deepspeeds, ranks
from tests.adapters.engines import OPTIMIZERS, assert_equal, captured, held, joined, resumed, saved
from tests.layouts import quiet


class Normed(nn.Module):
    """A matrix, vectors, a frozen weight and a buffer."""

    def __init__(self, wide):
        super().__init__()
        self.up = nn.Linear(8, wide)
        self.norm = nn.LayerNorm(wide)
        self.down = nn.Linear(wide, 8)
        self.still = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return x + self.down(nn.functional.gelu(self.norm(self.up(x)))) * self.still


def _as_head(tied, x):
    return nn.functional.linear(x, tied.weight).float()


def _loss(out, wanted):
    return nn.functional.cross_entropy(out.flatten(0, 1), wanted.flatten())


def pipeline(stages, *, data=1, strided=False, tied=True, seed=0):
    """Module of this many stages. strided: neighbouring ranks are of neighbouring stages. Collective."""
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology

    topology = PipeDataParallelTopology(stages, data)
    if strided:
        topology = ProcessTopology(["data", "pipe"], [data, stages])
    first = TiedLayerSpec("words", nn.Embedding, 13, 8) if tied else LayerSpec(nn.Embedding, 13, 8)
    last = TiedLayerSpec("words", nn.Embedding, 13, 8, forward_fn=_as_head) if tied else LayerSpec(nn.Linear, 8, 13)
    layers = [first, LayerSpec(Normed, 23), torch.tanh, LayerSpec(Normed, 11), last]
    return PipelineModule(
        layers, topology=topology, loss_fn=_loss, seed_layers=True, base_seed=seed + 1, partition_method="uniform"
    )


def made(stages, zero, dtype, optimizer="adamw", *, strided=False, tied=True, seed=0, **options):
    data = deepspeeds.joined() // stages
    module = pipeline(stages, data=data, strided=strided, tied=tied, seed=seed)
    more = {"train_micro_batch_size_per_gpu": 6 // data, "gradient_accumulation_steps": 2}
    made_optimizer = OPTIMIZERS[optimizer](deepspeeds.groups(module))
    return deepspeeds.engine(module, made_optimizer, zero, dtype, **more, **options)


def train(engine, start, stop):
    """Losses of steps over 12 sequences each, those of a data-parallel rank in two micro-batches."""
    losses = []
    place, count = engine.grid.get_data_parallel_rank(), engine.grid.get_data_parallel_world_size()
    for i in range(start, stop):
        x = torch.randint(0, 13, (12, 5), generator=torch.Generator().manual_seed(100 + i))
        parts = x.chunk(2 * count)[place::count]
        losses.append(engine.train_batch(iter([(part, (part + 1) % 13) for part in parts])).item())
    return losses


# -- the same topology --------------------------------------------------------------------------------------------------


def _resumes_bit_for_bit(root, cases):
    for i, (zero, dtype, optimizer, strided) in enumerate(cases):
        engine = made(2, zero, dtype, optimizer, strided=strided)
        train(engine, 0, 2)
        saved(f"{root}/{i}", engine)
        wanted = held(TrainState(model=engine))
        losses = train(engine, 2, 4)
        fresh = made(2, zero, dtype, optimizer, strided=strided, seed=9)
        resumed(f"{root}/{i}", fresh)
        assert_equal(wanted, held(TrainState(model=fresh)))
        assert (fresh.global_steps, fresh.global_samples) == (2, 24)
        assert train(fresh, 2, 4) == losses, (zero, dtype)
        resumed(f"{root}/{i}", engine)  # and where training has gone on, into the state that it has
        assert train(engine, 2, 4) == losses, (zero, dtype)


CASES = {
    "no ZeRO": [(0, "fp32", "adamw", True), (0, "bf16", "lion", False)],  # bf16: BF16_Optimizer, which shares out, too
    "ZeRO-1": [(1, "fp32", "adamw", False), (1, "bf16", "sgd", True)],
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_resumed_with_the_same_setup_is_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    deepspeeds.run(4, _resumes_bit_for_bit, str(tmp_path), CASES[name])


# -- other topologies -----------------------------------------------------------------------------------------------------


def _save(root, stages):
    engine = made(stages, 1, "fp32", strided=stages > 1)
    train(engine, 0, 2)
    saved(root, engine)
    found = captured(engine)
    x = torch.arange(30).view(6, 5) % 13
    parts = x.chunk(2)
    loss = engine.eval_batch(iter([(part, (part + 1) % 13) for part in parts]))
    return found, train(engine, 2, 4), loss.item()


def _load(root, stages, zero):
    engine = made(stages, zero, "fp32", seed=7)
    report = resumed(root, engine)
    return captured(engine), train(engine, 2, 4), report.notes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def told(root):
    return deepspeeds.run(4, _save, str(root), 2)


def _same_state_goes_on(told, others):
    assert joined(c for c, _, _ in told).keys() == (wanted := joined(c for c, _, _ in others)).keys()
    assert all(torch.equal(t, wanted[f]) for f, t in joined(c for c, _, _ in told).items())
    assert others[0][1] == pytest.approx(told[0][1], rel=1e-5)


@pytest.mark.parametrize(("size", "stages", "zero"), [(2, 2, 1), (2, 1, 1), (2, 1, 0), (4, 2, 0)])
def test_it_goes_on_at_another_data_parallel_size_and_another_number_of_stages(root, told, size, stages, zero):
    _same_state_goes_on(told, deepspeeds.run(size, _load, str(root), stages, zero))


def test_one_stage_goes_on_as_two(tmp_path):
    one = deepspeeds.run(2, _save, str(tmp_path), 1)
    _same_state_goes_on(one, deepspeeds.run(4, _load, str(tmp_path), 2, 1))


def test_its_weights_are_those_of_a_sequence_of_the_layers_and_tied_ones_are_saved_once(root, told):
    first = nn.Embedding(13, 8)
    model = nn.Sequential(first, Normed(23), nn.Tanh(), Normed(11))
    state = TrainState(model=model, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        checkpointer.load(state, only=("model",), rename=lambda fqn: fqn.replace("tied_modules.words", "0"))
    x = torch.arange(30).view(6, 5) % 13
    with torch.no_grad():
        loss = _loss(_as_head(first, model.eval()(x)), (x + 1) % 13)
    assert loss.item() == pytest.approx(told[0][2], rel=1e-5)


# -- stages that differ -----------------------------------------------------------------------------------------------------


def _uneven(root, stages):
    from deepspeed.pipe import LayerSpec, PipelineModule

    deepspeeds.joined()
    layers = [LayerSpec(nn.Embedding, 13, 8), LayerSpec(nn.Linear, 8, 13)]
    module = PipelineModule(
        layers, num_stages=stages, loss_fn=_loss, seed_layers=True, partition_method="uniform", base_seed=3 * stages
    )
    optimizer = torch.optim.AdamW(deepspeeds.groups(module))
    data = comm.current().world_size // stages
    engine = deepspeeds.engine(
        module, optimizer, 0, train_micro_batch_size_per_gpu=6 // data, gradient_accumulation_steps=2
    )
    if stages == 1:
        resumed(root, engine)
        return [group["weight_decay"] for group in engine.optimizer.param_groups], train(engine, 2, 4)
    counts = len(engine.optimizer.param_groups)
    train(engine, 0, 2)
    saved(root, engine)
    return counts, train(engine, 2, 4)


def test_a_stage_without_parameters_of_a_group_leaves_it_out(tmp_path):
    told = deepspeeds.run(2, _uneven, str(tmp_path), 2)
    assert [counts for counts, _ in told] == [1, 2]
    for decay, losses in deepspeeds.run(2, _uneven, str(tmp_path), 1):
        assert decay == [0.1, 0.0]
        assert losses == pytest.approx(told[0][1], rel=1e-5)


def _unchanged_script(root):
    from distckpt.adapters import deepspeed

    deepspeed.install(timeout=20)
    engine = made(2, 1, "bf16")
    train(engine, 0, 2)
    assert engine.save_checkpoint(root, client_state={"epoch": 1}) is True
    losses = train(engine, 2, 4)
    fresh = made(2, 1, "bf16", seed=9)
    path, client = fresh.load_checkpoint(root)
    assert (path is not None, client["epoch"]) == (True, 1)
    assert train(fresh, 2, 4) == losses


def test_an_unchanged_script_saves_and_loads_a_pipeline(tmp_path):
    deepspeeds.run(4, _unchanged_script, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert not list(tmp_path.rglob("*.pt"))


def _refused():
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

    found = []
    tied = [
        TiedLayerSpec("square", nn.Linear, 8, 8),
        LayerSpec(nn.Linear, 8, 8),
        TiedLayerSpec("square", nn.Linear, 8, 8),
    ]
    plain = [LayerSpec(nn.Linear, 8, 8), LayerSpec(nn.Linear, 8, 8)]
    deepspeeds.joined()
    for layers, loss in ((tied, _loss), (plain, nn.Linear(8, 8))):
        module = PipelineModule(layers, num_stages=2, loss_fn=loss)
        engine = deepspeeds.engine(module, torch.optim.AdamW(module.parameters()), 1, train_micro_batch_size_per_gpu=12)
        found.append(ranks.expect_error(lambda e=engine: TrainState(model=e).capture(), Unsupported))
    return found


def test_what_stages_would_have_differently_under_one_name_is_refused():
    for bias, loss in deepspeeds.run(2, _refused):
        assert "tied_modules.square.bias: each pipeline stage has its own" in bias
        assert "a pipeline whose loss has parameters" in loss
