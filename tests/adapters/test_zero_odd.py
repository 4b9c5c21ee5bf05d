"""DeepSpeed engines where names or buffers mislead, in odd setups, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, TrainState, full_state_dict
from distckpt.adapters.zero.flats import masters
from distckpt.errors import Mismatch, Unsupported
from tests import deepspeeds, ranks
from tests.adapters.engines import assert_equal, captured, held, joined, made, resumed, saved, train
from tests.layouts import quiet

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
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
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
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, TrainState(model=model, rng=False))
    return model.state_dict()


def _widen(root):
    reports, weights = [], []
    for stage in (2, 3):
        engine = made(stage, "bf16")
        with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
            report = checkpointer.load(TrainState(model=engine, rng=False), only=("model",))
        reports.append(report.cast)
        with Checkpointer(f"{root}/again{stage}", timeout=20, wait=True) as checkpointer:
            checkpointer.save(stage, TrainState(model=engine, rng=False))
        model = deepspeeds.net(1)
        with Checkpointer(f"{root}/again{stage}", timeout=20, wait=True) as checkpointer, quiet():
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


def _save_low_precision_states(root):
    engine = made(
        2, "bf16", bf16={"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    )
    train(engine, 0, 2)
    saved(root, engine)
    return captured(engine)


def _load_low_precision_states(root):
    dtypes = []
    for stage in (1, 3):
        engine = made(stage, "bf16", seed=3)
        resumed(root, engine)
        dtypes += [v.dtype for s in engine.optimizer.optimizer.state.values() for v in s.values() if v.dim()]
        found = captured(engine)
        train(engine, 2, 4)
    return dtypes, found


def test_states_in_the_precision_of_their_masters_follow_them(tmp_path):
    wanted = joined(deepspeeds.run(2, _save_low_precision_states, str(tmp_path)))
    loaded = deepspeeds.run(3, _load_low_precision_states, str(tmp_path))
    assert {dtype for dtypes, _ in loaded for dtype in dtypes} == {torch.float32}
    found = joined([of_rank for _, of_rank in loaded])
    assert wanted["optim.up.weight.exp_avg"].any()
    assert all(torch.equal(found[name], value) for name, value in wanted.items() if name != "model.seen")


def _save_different_steps(root):
    model = deepspeeds.net()
    optimizer = torch.optim.AdamW(deepspeeds.groups(model))
    for i in range(2):
        deepspeeds.step(model, optimizer, i)
    optimizer.state[model.down.weight]["step"] += 5
    optimizer.state.pop(model.down.bias)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(2, TrainState(model=model, optimizer=optimizer, rng=False))


def _load_different_steps(root):
    engine = made(1)
    state = TrainState(model=engine, rng=False)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
        text = ranks.expect_error(lambda: checkpointer.load(state), Mismatch)
    assert state.unusable
    return text


def _load_without_some_states(root):
    engine = made(1)
    train(engine, 4, 6)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
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
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
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


FP16_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}


def _scaled_by_autocast(root):
    def scaler(engine):
        return engine.torch_autocast_z0_gradscaler or engine.optimizer.torch_autocast_gradscaler

    for stage in (0, 1, 3):
        engine, fresh = made(stage, **FP16_AUTOCAST), made(stage, seed=2, **FP16_AUTOCAST)
        train(engine, 0, 1)
        scaler(engine).update(128.0)
        train(engine, 1, 2)
        saved(f"{root}/{stage}", engine)
        resumed(f"{root}/{stage}", fresh)
        assert scaler(fresh).state_dict() == scaler(engine).state_dict(), stage
        assert train(fresh, 2, 4) == train(engine, 2, 4)
        assert scaler(fresh).get_scale() == 128.0


def test_the_scale_of_torch_autocast_is_kept_wherever_an_engine_has_it(tmp_path):
    deepspeeds.run(2, _scaled_by_autocast, str(tmp_path))


def _fails_and_goes_on(root):
    engine = made(3, zero={"stage3_param_persistence_threshold": 50})
    twin = made(3, zero={"stage3_param_persistence_threshold": 50})
    train(engine, 0, 2)
    train(twin, 0, 2)
    other = torch.nn.Linear(3, 3)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
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
    with Checkpointer(root, timeout=20, wait=True) as checkpointer:
        checkpointer.save(1, state)
    wanted = held(state)
    losses = train(actor, 1, 3), train(critic, 2, 3)
    with Checkpointer(root, timeout=20, wait=True) as checkpointer, quiet():
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
