"""DeepSpeed engines: captured where their state lies, and resumed bit for bit."""

from __future__ import annotations

import pytest
import torch

from distckpt import TrainState
from distckpt.adapters.zero.flats import masters
from tests import deepspeeds
from tests.adapters.engines import assert_equal, held, made, resumed, saved, train

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
