"""DeepSpeed engines: captured where their state lies, resumed bit for bit, and right where names or buffers mislead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState, full_state_dict
from distckpt.adapters.zero.flats import masters
from distckpt.errors import Mismatch, Unsupported
from tests import deepspeeds, ranks
from tests.layouts import quiet


class Lion(torch.optim.Optimizer):
    """One moment, no step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(torch.sign(moment * slow + p.grad * (1 - slow)), alpha=-group["lr"])
                    moment.mul_(fast).add_(p.grad, alpha=1 - fast)


OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adagrad": lambda groups: torch.optim.Adagrad([p for g in groups for p in g["params"]], lr=1e-2),
    "lion": Lion,
}


def made(stage, dtype="fp32", optimizer="adamw", *, seed=0, kind=deepspeeds.Net, decay=None, **options):
    model = deepspeeds.net(seed, kind)
    made_optimizer = OPTIMIZERS[optimizer](deepspeeds.groups(model))
    schedule = None
    if decay:
        schedule = torch.optim.lr_scheduler.LambdaLR(made_optimizer, lambda i: decay**i)
    return deepspeeds.engine(model, made_optimizer, stage, dtype, lr_scheduler=schedule, **options)


def train(engine, start, stop):
    return [deepspeeds.step(engine, None, i) for i in range(start, stop)]


def held(state):
    return {f: [s.tensor.clone() for s in t.shards] for f, t in state.capture().tensors.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for fqn, tensors in ours.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs[fqn], strict=True)), fqn


def resumed(root, engine, **options):
    with Checkpointer(root, timeout=20) as checkpointer, quiet():
        return checkpointer.resume(TrainState(model=engine, rng=False), **options)


def saved(root, engine, step=2):
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(step, TrainState(model=engine, rng=False), check_replicas=True)


# -- training goes on as if nothing had happened ----------------------------------------------------------------------


def scale_of(engine):
    """What moves of an engine's loss scaler."""
    owner = engine.optimizer
    scaler = getattr(owner, "loss_scaler", None) or getattr(owner, "loss_scale_config", None)
    if not getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)):
        return []
    return [getattr(scaler, name, None) for name in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")]


def _resumes_bit_for_bit(root, cases):
    for i, (stage, dtype, optimizer, options) in enumerate(cases):
        engine = made(stage, dtype, optimizer, decay=0.5, **options)
        first = scale_of(engine)
        train(engine, 0, 3)
        saved(f"{root}/{i}", engine)
        wanted, scale = held(TrainState(model=engine)), scale_of(engine)
        assert dtype != "fp16" or scale[:2] != first[:2], "nothing moved that could be lost"
        losses = train(engine, 3, 6)
        fresh = made(stage, dtype, optimizer, seed=9, decay=0.5, **options)
        resumed(f"{root}/{i}", fresh)
        assert_equal(wanted, held(TrainState(model=fresh)))
        assert (fresh.global_steps, fresh.global_samples, scale_of(fresh)) == (3, 36, scale), i
        assert train(fresh, 3, 6) == losses, (stage, dtype, optimizer, options)
        assert [g["lr"] for g in fresh.optimizer.param_groups] == [g["lr"] for g in engine.optimizer.param_groups]
        resumed(f"{root}/{i}", engine)  # and where training has gone on, into the state that it has
        assert train(engine, 3, 6) == losses, (stage, dtype, optimizer, options)


OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
ODD = {"zero": {"round_robin_gradients": True, "parameter_alignment": True}}
SMALL = {"zero": {"sub_group_size": 60, "stage3_param_persistence_threshold": 9}}
CASES = {
    "no ZeRO": (2, [(0, "fp32", "adamw", {}), (0, "bf16", "adamw", {}), (0, "fp16", "sgd", {})]),
    "BF16_Optimizer": (3, [(1, "bf16", "adamw", {"data_types": {"grad_accum_dtype": "fp32"}})]),
    "ZeRO-1": (2, [(1, "bf16", "lion", ODD), (1, "fp16", "adamw", {}), (1, "fp32", "adagrad", {})]),
    "ZeRO-2": (3, [(2, "bf16", "adamw", ODD), (2, "fp16", "sgd", {}), (2, "fp32", "adamw", OFFLOAD)]),
    "ZeRO-3": (2, [(3, "bf16", "adamw", SMALL), (3, "fp16", "lion", {}), (3, "bf16", "adamw", OFFLOAD)]),
    "ZeRO-3, more": (
        3,
        [
            (3, "fp32", "adagrad", {"zero": {"sub_group_size": 60}}),
            (3, "fp32", "sgd", SMALL),
            (3, "bf16", "adamw", {"zero": {"offload_param": {"device": "cpu"}}}),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_training_resumed_with_the_same_setup_is_the_uninterrupted_run_bit_for_bit(tmp_path, name):
    size, cases = CASES[name]
    deepspeeds.run(size, _resumes_bit_for_bit, str(tmp_path), cases)


def _fused(root):
    """FP16_Optimizer, which DeepSpeed puts around its own fused Adam alone: here around torch's, which needs no compiler."""
    import deepspeed.runtime.engine

    deepspeed.runtime.engine.FusedAdam = torch.optim.AdamW
    _resumes_bit_for_bit(root, [(0, "fp16", "adamw", {}), (0, "bf16", "adamw", {})])
    assert type(made(0, "bf16").optimizer).__name__ == "FP16_Optimizer"


def test_so_is_training_with_flat_buffers_and_no_zero(tmp_path):
    deepspeeds.run(2, _fused, str(tmp_path))


HPZ = {"zero": {"zero_hpz_partition_size": 2}}


def _save_hpz(root):
    engine = made(3, "bf16", **HPZ)
    train(engine, 0, 3)
    saved(root, engine)
    engine.save_checkpoint(f"{root}/native")
    return train(engine, 3, 6)


def _load_hpz(root):
    engine, native = made(3, "bf16", seed=4, **HPZ), made(3, "bf16", seed=4, **HPZ)
    resumed(root, engine)
    native.load_checkpoint(f"{root}/native")
    return train(engine, 3, 6), train(native, 3, 6)


def test_so_is_hpz_whose_copies_of_frozen_weights_deepspeed_itself_does_not_renew(tmp_path):
    wanted = deepspeeds.run(4, _save_hpz, str(tmp_path))[0]
    ours, native = deepspeeds.run(4, _load_hpz, str(tmp_path))[0]
    assert ours == wanted
    assert native != wanted


def _partitioned_from_the_start(root):
    import deepspeed

    def build(seed, **more):
        with deepspeed.zero.Init(config_dict_or_path=deepspeeds.config(3, "bf16", 2, {})):
            model = deepspeeds.net(seed)
        return deepspeeds.engine(model, torch.optim.AdamW(deepspeeds.groups(model)), 3, "bf16", **more)

    deepspeeds.joined()
    engine = build(0)
    train(engine, 0, 3)
    saved(root, engine)
    fresh = build(4)
    resumed(root, fresh)
    alone = deepspeeds.engine(deepspeeds.net(3), None, 3, "bf16")
    report = resumed(root, alone, only=("model",), cast=True)
    assert report.cast["model.up.weight"] == "float32 -> bfloat16"
    engine.eval()
    alone.eval()
    with torch.no_grad():
        assert torch.equal(engine(deepspeeds.batch(7)), alone(deepspeeds.batch(7)))
    engine.train()
    assert train(engine, 3, 6) == train(fresh, 3, 6)


def test_so_is_a_model_made_in_pieces_and_one_without_optimizer_computes_the_same(tmp_path):
    deepspeeds.run(2, _partitioned_from_the_start, str(tmp_path))


# -- capture ------------------------------------------------------------------------------------------------------------


def _captures_in_silence():
    import torch.distributed as dist

    for stage, options in ((1, {}), (2, {"dtype": "bf16"}), (3, {}), (1, {"dtype": "bf16"} | FP32_GRADIENTS)):
        engine = made(stage, **options)
        train(engine, 0, 1)
        state = TrainState(model=engine, rng=False)
        group = dist.group.WORLD
        before = group._get_sequence_number_for_group()
        captured = state.capture()
        assert group._get_sequence_number_for_group() == before, "capture made a collective"
        dist.barrier()
        assert group._get_sequence_number_for_group() == before + 1, "collectives are not counted"
        flats = [p for group in masters(engine) for p in group]
        memory = {p.data_ptr() for p in flats} | {
            v.untyped_storage().data_ptr() for s in engine.optimizer.optimizer.state.values() for v in s.values()
        }
        trained = {f"model.{n}" for n, p in engine.module.named_parameters() if p.requires_grad}
        assert len(trained) == 8
        for fqn, tensor in captured.tensors.items():
            if fqn in trained or fqn.startswith("optim."):
                storages = [s.tensor.untyped_storage().data_ptr() for s in tensor.shards]
                in_flats = [f.untyped_storage().data_ptr() for f in flats]
                assert all(s in memory or s in in_flats for s in storages), f"{fqn} was copied"
        for fqn in trained:
            assert captured.tensors[fqn].dtype == "float32"


FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}


def test_capture_makes_no_collective_and_no_copy_and_gives_fp32_masters():
    deepspeeds.run(2, _captures_in_silence)


# -- names: what DeepSpeed's own mappings and converters get wrong ------------------------------------------------------


class Tower(nn.Module):
    """BatchNorm, layers of one shape (which are easily exchanged), frozen and tied parameters."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.norm = nn.BatchNorm1d(6)
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        h = self.emb(x)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(self.norm(h.transpose(1, 2)).transpose(1, 2)).float()


def _tower(root, stage, options, start, stop, do):
    engine = made(stage, kind=Tower, seed=start, **options)
    if do == "save":
        train(engine, start, stop)
        saved(root, engine)
        if stage == 3:
            import deepspeed

            with deepspeed.zero.GatheredParameters([*engine.module.parameters()]):
                return {n: p.detach().clone() for n, p in engine.module.state_dict().items()}
        return {n: p.detach().clone() for n, p in engine.module.state_dict().items()}
    resumed(root, engine, per_rank={"model": "first"})
    return train(engine, start, stop), held(TrainState(model=engine))


def _tower_alone(root):
    torch.manual_seed(5)
    model = Tower()
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    with Checkpointer(root, timeout=20) as checkpointer, quiet():
        checkpointer.load(TrainState(model=model, optimizer=optimizer, rng=False), per_rank={"model": "first"})
    return model.state_dict(), optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[1]["lr"]


@pytest.mark.parametrize(("stage", "size"), [(1, 2), (2, 3), (3, 2)])
def test_every_weight_has_its_own_name_whatever_order_the_buffers_have(tmp_path, stage, size):
    """Round-robin and aligned buffers; the model's own state dict says what the weights are."""
    options = {"zero": {"round_robin_gradients": True, "parameter_alignment": True, "sub_group_size": 30}}
    wanted = deepspeeds.run(size, _tower, str(tmp_path), stage, options, 0, 3, "save")
    (found, decay, rate), *_ = deepspeeds.run(1, _tower_alone, str(tmp_path))
    assert {"norm.running_mean", "layers.1.weight", "head.weight"} <= found.keys()
    for name, value in found.items():
        assert torch.equal(value, wanted[0][name]), name
    assert not torch.equal(found["norm.running_mean"], torch.zeros(6))
    assert (decay, rate) == (0.1, 1e-3)
    other = 2 if stage != 2 else 3
    (_, first), *_ = deepspeeds.run(2, _tower, str(tmp_path), other, {}, 3, 5, "load")
    assert first.keys() >= {"model.norm.running_mean", "model.layers.1.weight", "optim.layers.0.weight.exp_avg"}


# -- odd setups -----------------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Fewer elements than ranks share out: some hold padding alone."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.m = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        one = nn.functional.one_hot(x, 13).float()
        return one * self.w + self.m


def _padding_alone(root, stage):
    engine = made(stage, kind=Tiny)
    train(engine, 0, 2)
    saved(root, engine)
    losses = train(engine, 2, 4)
    fresh = made(stage, kind=Tiny, seed=3)
    resumed(root, fresh)
    states = [engine.optimizer.optimizer.state[p].keys() for group in masters(engine) for p in group]
    assert states == [fresh.optimizer.optimizer.state[p].keys() for group in masters(fresh) for p in group]
    assert train(fresh, 2, 4) == losses
    return losses


def _padding_elsewhere(root, stage):
    engine = made(stage, kind=Tiny, seed=3)
    resumed(root, engine)
    return train(engine, 2, 4)


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_that_hold_padding_alone_keep_in_step(tmp_path, stage):
    wanted = deepspeeds.run(4, _padding_alone, str(tmp_path), stage)[0]
    assert deepspeeds.run(2, _padding_elsewhere, str(tmp_path), 3)[0] == pytest.approx(wanted, rel=1e-6)


def _save_plain_bf16(root):
    model = deepspeeds.net(7).to(torch.bfloat16)
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(1, TrainState(model=model, rng=False))
    return model.state_dict()


def _widen(root):
    reports, weights = [], []
    for stage in (2, 3):
        engine = made(stage, "bf16")
        with Checkpointer(root, timeout=20) as checkpointer, quiet():
            report = checkpointer.load(TrainState(model=engine, rng=False), only=("model",))
        reports.append(report.cast)
        with Checkpointer(f"{root}/again{stage}", timeout=20) as checkpointer:
            checkpointer.save(stage, TrainState(model=engine, rng=False))
        model = deepspeeds.net(1)
        with Checkpointer(f"{root}/again{stage}", timeout=20) as checkpointer, quiet():
            checkpointer.load(TrainState(model=model, rng=False), step=stage, only=("model",), cast=True)
        weights.append(model.state_dict())
        import deepspeed

        with deepspeed.zero.GatheredParameters([*engine.module.parameters()]):
            worked_with = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
        assert all(torch.equal(worked_with[n].float(), weights[-1][n].float()) for n in worked_with)
    return reports, weights


def test_a_checkpoint_of_low_precision_alone_fills_the_masters_and_says_so(tmp_path):
    (wanted,) = deepspeeds.run(1, _save_plain_bf16, str(tmp_path))
    reports, weights = deepspeeds.run(2, _widen, str(tmp_path))[0]
    for report, found in zip(reports, weights, strict=True):
        assert report["model.up.weight"] == "bfloat16 -> float32 (lossless)"
        assert "model.still.weight" not in report, "a frozen weight has no master"
        assert all(torch.equal(found[name].float(), value.float()) for name, value in wanted.items())


def _save_different_steps(root):
    model = deepspeeds.net()
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    for i in range(2):
        deepspeeds.step(model, optimizer, i)
    optimizer.state[model.down.weight]["step"] += 5
    optimizer.state.pop(model.down.bias)
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(2, TrainState(model=model, optimizer=optimizer, rng=False))


def _load_different_steps(root):
    engine = made(1)
    state = TrainState(model=engine, rng=False)
    with Checkpointer(root, timeout=20) as checkpointer, quiet():
        text = ranks.expect_error(lambda: checkpointer.load(state), Mismatch)
    assert state.unusable
    return text


def _load_without_some_states(root):
    engine = made(1)
    train(engine, 4, 6)
    with Checkpointer(root, timeout=20) as checkpointer, quiet():
        report = checkpointer.load(TrainState(model=engine, rng=False))
    state = TrainState(model=engine, rng=False).capture()
    moments = [s.tensor for s in state.tensors["optim.down.bias.exp_avg"].shards]
    assert all(not t.any() for t in moments)
    return report.notes, len(moments)


def _save_without_some_states(root):
    model = deepspeeds.net()
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    deepspeeds.step(model, optimizer, 0)
    optimizer.state.pop(model.down.bias)
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(2, TrainState(model=model, optimizer=optimizer, rng=False))


def test_different_steps_in_one_flat_buffer_are_refused_with_their_names(tmp_path):
    deepspeeds.run(1, _save_different_steps, str(tmp_path))
    for text in deepspeeds.run(2, _load_different_steps, str(tmp_path)):
        assert "optim.down.weight.step is 7" in text, text
        assert "resume where they are apart" in text


def test_a_parameter_saved_without_state_starts_from_zeros_and_the_report_says_so(tmp_path):
    deepspeeds.run(1, _save_without_some_states, str(tmp_path))
    told = deepspeeds.run(2, _load_without_some_states, str(tmp_path))
    assert any("optim.down.bias: saved without state" in note for note in told[0][0])
    assert sum(n for _, n in told) > 0


def _fails_and_goes_on(root):
    engine = made(3, zero={"stage3_param_persistence_threshold": 50})
    twin = made(3, zero={"stage3_param_persistence_threshold": 50})
    train(engine, 0, 2)
    train(twin, 0, 2)
    other = torch.nn.Linear(3, 3)
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(1, TrainState(model=other, rng=False))
        state = TrainState(model=engine, rng=False)
        ranks.expect_error(lambda: checkpointer.load(state), Mismatch)
    assert not state.unusable
    assert train(engine, 2, 4) == train(twin, 2, 4)


def test_a_load_that_is_refused_disturbs_nothing(tmp_path):
    deepspeeds.run(2, _fails_and_goes_on, str(tmp_path))


def _together(root):
    actor, critic = made(2), made(3, seed=1)
    state = TrainState(model={"actor": actor, "critic": critic}, rng=False)
    train(actor, 0, 1)
    train(critic, 0, 2)
    with Checkpointer(root, timeout=20) as checkpointer:
        checkpointer.save(1, state)
    wanted = held(state)
    losses = train(actor, 1, 3), train(critic, 2, 3)
    with Checkpointer(root, timeout=20) as checkpointer, quiet():
        checkpointer.resume(state)
    assert_equal(held(state), wanted)
    assert (actor.global_steps, critic.global_steps) == (1, 2)
    assert (train(actor, 1, 3), train(critic, 2, 3)) == losses
    assert {"optim.actor", "optim.critic"} <= state.capture().objects.keys()


def test_several_engines_are_a_dict(tmp_path):
    deepspeeds.run(2, _together, str(tmp_path))


def _gathered():
    found = []
    for stage in (2, 3):
        engine = made(stage, "bf16")
        train(engine, 0, 1)
        found.append(full_state_dict(engine).get("model"))  # None but on rank 0
    return found


def test_a_full_state_dict_of_an_engine_has_the_masters():
    two, three = deepspeeds.run(2, _gathered)[0]
    assert two.keys() == three.keys() >= {"emb.weight", "head.weight", "still.weight", "seen"}
    assert two["up.weight"].dtype == torch.float32
    assert torch.allclose(two["up.weight"], three["up.weight"], atol=1e-2)


# -- what cannot be ----------------------------------------------------------------------------------------------------------


def _refusals():
    engine = made(1)
    model = engine.module
    told = [
        ranks.expect_error(
            lambda: TrainState(model=engine, optimizer=torch.optim.SGD(model.parameters())), Unsupported
        ),
        ranks.expect_error(lambda: TrainState(model=engine, gradients=True).capture(), Unsupported),
    ]
    TrainState(model=engine, optimizer=engine.optimizer, lr_scheduler=None).capture()
    engine.optimizer.swap_optimizer = True
    told.append(ranks.expect_error(lambda: TrainState(model=engine).capture(), Unsupported))
    engine.optimizer.swap_optimizer = False
    del engine.optimizer.round_robin_bit16_groups
    told.append(ranks.expect_error(lambda: TrainState(model=engine).capture(), Unsupported))
    return told


def test_what_cannot_be_saved_is_refused_by_name():
    theirs, gradients, nvme, changed = deepspeeds.run(2, _refusals)[0]
    assert "leave it out" in theirs
    assert "after its step()" in gradients
    assert "NVMe" in nvme
    assert "DeepSpeedZeroOptimizer has no round_robin_bit16_groups; this adapter knows deepspeed 0.19" in changed
