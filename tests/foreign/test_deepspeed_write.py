"""Tags that we write, loaded by DeepSpeed itself: every bit, and the losses that follow."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace

import pytest
import torch

from distckpt import Checkpointer
from distckpt.errors import Mismatch, RunConflict, Unsupported
from distckpt.foreign.open import open_foreign
from distckpt.reshard import main
from distckpt.run.source import open_source
from distckpt.tools.copy import copy
from distckpt.tools.formats import DeepSpeed
from distckpt.tools.view import Change
from tests import deepspeeds, ranks
from tests.foreign import tags
from tests.foreign.tags import CASES, Case
from tests.foreign.test_deepspeed import differing, load, made  # noqa: F401  a fixture


def _go_on(case, folder, start=3):
    """Load a tag with DeepSpeed itself, and make two more steps."""
    engine = case.engine(seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, client = engine.load_checkpoint(folder)
        said = {
            "path": path,
            "client": {k: client[k] for k in ("epoch", "history", "trainer_state") if k in client},
            "held": tags.held(engine),
            "rest": tags.rest(engine),
            "lr": engine.get_lr(),
            "scale": getattr(getattr(engine.optimizer, "loss_scaler", None), "cur_scale", None),
            "counts": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        }
        return said | {"losses": [deepspeeds.step(engine, None, i) for i in range(start, start + 2)]}


def convert(source, destination, case, *, tag=None, **more):
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[case.dtype]
    sub = case.zero.get("sub_group_size", 10**9)
    robin = case.zero.get("round_robin_gradients", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy(
            source,
            destination,
            DeepSpeed(case.stage, case.size, dtype, tag, sub_group_size=sub, round_robin=robin),
            **more,
        )


CROSSINGS = [
    ("zero1", replace(CASES["zero3"], size=3)),
    ("zero3", replace(CASES["zero2-bf16"], dtype="fp32", size=2)),
    ("zero3-sub-groups", CASES["zero1-padding"]),
    ("zero2-round-robin", replace(CASES["zero1"], size=2)),
    ("zero2-bf16", CASES["zero3-bf16"]),
    ("zero1-fp16", CASES["zero3-fp16"]),
    ("zero3", CASES["zero0"]),
    ("zero1-bf16-optimizer", replace(CASES["zero2-bf16"], size=2)),
]
MORE = [
    ("zero2-norm", replace(CASES["zero2-norm"], stage=3)),
    ("zero1-padding", replace(CASES["zero3-sub-groups"], size=2)),
    ("zero1", CASES["zero2-round-robin"]),
    ("zero2-round-robin", replace(CASES["zero2-round-robin"], size=2)),
    ("zero3-bf16", CASES["zero1-bf16-optimizer"]),
    ("zero3-fp16", CASES["zero1-fp16"]),
    ("zero2-bf16", CASES["zero0-bf16"]),
    ("zero1-fp16", CASES["zero0-fp16"]),
    ("zero2-sgd", replace(CASES["zero2-sgd"], stage=3, size=3)),
    ("zero3-adagrad", replace(CASES["zero3-adagrad"], stage=1)),
    ("zero1-aligned", CASES["zero1-bf16-optimizer"]),
]


def test_there_are_pairs_of_every_stage():
    assert {(CASES[a].stage, b.stage) for a, b in CROSSINGS + MORE} >= {
        (1, 3),
        (3, 2),
        (3, 1),
        (2, 3),
        (1, 2),
        (2, 1),
        (3, 0),
    }


def full(values):
    """Cases of the long product."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.full) for v in values]


@pytest.mark.parametrize(("name", "case"), CROSSINGS + full(MORE))
def test_deepspeed_goes_on_from_a_tag_of_another_stage_and_world_size(name, case, made, tmp_path):  # noqa: F811
    folder, masters, said = made(name)
    report = convert(folder, tmp_path / "out", case, verify=True)
    assert report.destination == str(tmp_path / "out" / "global_step3")
    of_ranks = deepspeeds.run(case.size, _go_on, case, str(tmp_path / "out"))
    again = tags.joined([rank["held"] for rank in of_ranks])
    assert again.keys() == masters.keys()
    assert [key for key, value in masters.items() if not torch.equal(again[key], value)] == []
    found = of_ranks[0]
    assert [n for n, t in said["rest"].items() if not torch.equal(found["rest"][n], t)] == []
    assert found["client"] == {"epoch": 3, "history": [0.5, None]}
    assert found["lr"] == said["lr"]
    assert found["counts"] == said["counts"]
    assert found["scale"] == said["scale"] or case.dtype != "fp16" or not case.stage
    tolerance = 1e-6 if case.dtype == "fp32" and CASES[name].dtype == "fp32" else 2e-2
    assert found["losses"] == pytest.approx(said["losses"], abs=tolerance)


# -- from our own checkpoints ------------------------------------------------------------------------------------------


def reversed_groups(model):
    """Groups whose order is not that of the model."""
    return [{**group, "params": group["params"][::-1]} for group in deepspeeds.groups(model)[::-1]]


def _train_sharded(case, root):
    """Three steps under FSDP2, a checkpoint, and the losses of two more."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = case.model()
    fully_shard(model.up, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    optimizer = case.optimizer(case.groups(model))
    for i in range(3):
        deepspeeds.step(model, optimizer, i)
    state = tags.state_of(model, optimizer)
    with Checkpointer(root, timeout=30, wait=True) as c:
        c.save(3, state)
    return [deepspeeds.step(model, optimizer, i) for i in range(3, 5)]


@pytest.mark.parametrize("target", [Case(2, 2, groups=reversed_groups), Case(3, 3), *full([Case(2, 1)])])
def test_a_run_of_fsdp2_goes_on_in_deepspeed(target, tmp_path):
    losses = ranks.run(2, _train_sharded, replace(target, size=2), str(tmp_path / "run"))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        still = ("still.weight", "still.bias")
        copy(
            tmp_path / "run",
            tmp_path / "tags",
            DeepSpeed(target.stage, target.size, frozen=still, tag="from-fsdp"),
        )
    found = deepspeeds.run(target.size, _go_on_without_schedule, target, str(tmp_path / "tags"))[0]
    assert found["losses"] == pytest.approx(losses, abs=1e-6)
    assert found["counts"][0] == 3
    assert (tmp_path / "tags" / "latest").read_text() == "from-fsdp"


def _go_on_without_schedule(case, folder):
    model = case.model(seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = deepspeeds.engine(
            model, case.optimizer(case.groups(model)), case.stage, case.dtype, zero={**case.zero}
        )
        assert engine.load_checkpoint(folder)[0]
        before = engine.global_steps
        return {"losses": [deepspeeds.step(engine, None, i) for i in range(3, 5)], "counts": (before,)}


def _save_run(case, root):
    engine = case.engine()
    for i in range(3):
        deepspeeds.step(engine, None, i)
    with Checkpointer(root, timeout=30, wait=True) as c:
        c.save(3, tags.state_of(engine, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [deepspeeds.step(engine, None, i) for i in range(3, 5)]


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2, zero={"round_robin_gradients": True}, groups=reversed_groups),
        Case(2, 3, groups=reversed_groups),
        *full([Case(2, 1, "bf16", options=tags.FP32_GRADIENTS, groups=reversed_groups)]),
    ],
)
def test_a_run_of_a_live_engine_keeps_the_order_of_its_groups(case, tmp_path):
    """ZeRO finds parameters by their place alone: another order would load other weights, and not say so."""
    losses = deepspeeds.run(case.size, _save_run, case, str(tmp_path / "run"))[0]
    model = case.model()
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in case.groups(model)]
    assert [group["params"] for group in open_source(tmp_path / "run").object("optim")["groups"]] == order
    target = replace(case, stage=1, size=3, zero={}, options={}, dtype="fp32")
    convert(tmp_path / "run", tmp_path / "tags", target)
    found = deepspeeds.run(3, _go_on, target, str(tmp_path / "tags"))[0]
    assert found["losses"] == pytest.approx(losses, abs=1e-6 if case.dtype == "fp32" else 2e-2)


# -- there and back ------------------------------------------------------------------------------------------------

TEN = [name for name, case in CASES.items() if case.net is deepspeeds.Net and not name.startswith("zero0")]
IN_CI = {"zero3-sub-groups", "zero2-round-robin"}


@pytest.mark.parametrize("name", [*sorted(IN_CI), *full(sorted({*TEN} - IN_CI))])
def test_a_tag_goes_to_a_run_to_another_stage_and_back_without_a_bit_lost(name, made, tmp_path):  # noqa: F811
    case, (folder, masters, said) = CASES[name], made(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy(folder, tmp_path / "run")
    other = replace(case, stage=case.stage % 3 + 1, size=case.size + 1, zero={}, options={})
    convert(tmp_path / "run", tmp_path / "other", other)
    plain = {k: v for k, v in case.zero.items() if k != "parameter_alignment"}
    convert(tmp_path / "other", tmp_path / "back", replace(case, zero=plain))
    model, optimizer, schedule = case.trained(seed=9)
    load(tags.state_of(model, optimizer, schedule), tmp_path / "back")
    assert not differing(model, optimizer, masters, said["rest"])
    assert [g["lr"] for g in optimizer.param_groups] == said["lr"]
    if plain == case.zero:
        found = deepspeeds.run(case.size, _go_on, case, str(tmp_path / "back"))
        again = tags.joined([rank["held"] for rank in found])
        assert all(torch.equal(again[key], value) for key, value in masters.items())
        assert found[0]["losses"] == said["losses"]  # the same engine, the same state: the same numbers


def test_there_are_ten_of_them():
    assert len(TEN) >= 10


# -- whole, or not there -------------------------------------------------------------------------------------------


def test_latest_is_switched_last_and_only_to_a_whole_tag(made, tmp_path, monkeypatch):  # noqa: F811
    folder, case = made("zero1")[0], replace(CASES["zero3"], size=2)
    out = tmp_path / "out"
    convert(folder, out, case, tag="one")
    real, count = os.fsync, [0]

    def failing(descriptor):
        count[0] += 1
        if count[0] == limit:
            raise OSError(28, "full")
        real(descriptor)

    failed = 0
    for limit in range(1, 30):  # noqa: B007  what fails is `failing`
        count[0] = 0
        monkeypatch.setattr(os, "fsync", failing)
        try:
            convert(folder, out, case, tag="two")
            break
        except OSError:
            failed += 1
            assert (out / "latest").read_text() == "one" or open_foreign(out / "two").manifest.tensors
            assert not (out / "two").exists() or open_foreign(out / "two").manifest.tensors
        finally:
            monkeypatch.setattr(os, "fsync", real)
        if (out / "two").exists():
            break
    assert failed > 4
    with pytest.raises(RunConflict, match="two: exists already; give another tag"):
        convert(folder, out, case, tag="two")


def _converting(folder, out, case, at):
    real, count = os.pwritev, [0]

    def dying(*args):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    os.pwritev = dying
    convert(folder, out, case, tag="two")


@pytest.mark.parametrize("at", [40, *full([1, 150])])
def test_a_kill_leaves_the_tag_before_as_the_one_that_loads(at, made, tmp_path):  # noqa: F811
    folder, masters, _ = made("zero1")
    case = replace(CASES["zero3"], size=2)
    convert(folder, tmp_path / "out", case, tag="one")
    process = multiprocessing.get_context("fork").Process(target=_converting, args=(folder, tmp_path / "out", case, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "two").exists()
    of_ranks = deepspeeds.run(2, _go_on, case, str(tmp_path / "out"))
    again = tags.joined([rank["held"] for rank in of_ranks])
    assert all(torch.equal(again[key], value) for key, value in masters.items())
    convert(folder, tmp_path / "out", case, tag="two")  # goes on where it stopped
    assert (tmp_path / "out" / "latest").read_text() == "two"


# -- what ZeRO has no place for ------------------------------------------------------------------------------------


def _saved(root, optimizer_of, change=lambda model, optimizer: None):
    model = deepspeeds.net()
    optimizer = optimizer_of(deepspeeds.groups(model))
    for i in range(2):
        deepspeeds.step(model, optimizer, i)
    change(model, optimizer)
    with Checkpointer(root, timeout=30, wait=True) as c:
        c.save(2, tags.state_of(model, optimizer))
    return root


def test_steps_that_differ_within_a_group_are_refused_with_their_names(tmp_path):
    def ahead(model, optimizer):
        optimizer.state[model.up.weight]["step"] += 1

    root = _saved(tmp_path / "run", tags.adamw, ahead)
    with pytest.raises(Mismatch, match=r"optim\.up\.weight\.step is 3\.0, optim\.emb\.weight\.step 2\.0.*one step"):
        convert(root, tmp_path / "out", Case(2, 2))
    assert not (tmp_path / "out").exists()


def test_states_that_cannot_be_cut_are_refused(tmp_path):
    root = _saved(tmp_path / "run", torch.optim.Adafactor)
    with pytest.raises(Unsupported, match="is not laid out like its parameter"):
        convert(root, tmp_path / "out", Case(2, 2))


def test_a_tag_of_no_stage_or_without_an_optimizer_is_refused(tmp_path):
    root = _saved(tmp_path / "run", tags.adamw)
    with pytest.raises(ValueError, match=r"stage \(0 to 3\) and ranks"):
        copy(root, tmp_path / "out", to="deepspeed")
    with pytest.raises(Unsupported, match="has no optimizer"):
        convert(root, tmp_path / "out", Case(2, 2), change=Change(only=("model",)))
    convert(root, tmp_path / "out", Case(1, 0), change=Change(only=("model",)))
    assert "optim" not in open_foreign(tmp_path / "out").manifest.objects


def test_the_command_reads_a_zero0_tag_with_an_order_and_writes_a_tag(made, tmp_path, capsys):  # noqa: F811
    folder, masters, _ = made("zero0-bf16")
    model = CASES["zero0-bf16"].model()
    names = {id(p): n for n, p in model.named_parameters()}
    order = [[names[id(p)] for p in group["params"]] for group in deepspeeds.groups(model)]
    (tmp_path / "order.json").write_text(json.dumps(order))
    wanted = ["--to", "deepspeed", "--zero-stage", "3", "--world-size", "2", "--dtype", "bf16"]
    assert main([str(folder), str(tmp_path / "out"), *wanted]) == 1
    assert "parameters by position" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "out"), *wanted, "--param-order", str(tmp_path / "order.json")]) == 0
    case = replace(CASES["zero3-bf16"], size=2)
    of_ranks = deepspeeds.run(2, _go_on, case, str(tmp_path / "out"))
    again = tags.joined([rank["held"] for rank in of_ranks])
    assert all(torch.equal(again[key], value) for key, value in masters.items())
