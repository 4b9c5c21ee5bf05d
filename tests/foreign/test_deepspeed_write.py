"""Tags that we write, loaded by DeepSpeed itself: every bit, and the losses that follow."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from distckpt.tools.copy import copy
from tests import deepspeeds
from tests.foreign import tags
from tests.foreign.tags import CASES
from tests.foreign.test_deepspeed import load, made  # noqa: F401  a fixture


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


def convert(source, destination, case, **more):
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[case.dtype]
    sub = case.zero.get("sub_group_size", 10**9)
    robin = case.zero.get("round_robin_gradients", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy(
            source,
            destination,
            to="deepspeed",
            zero_stage=case.stage,
            world_size=case.size,
            dtype=dtype,
            sub_group_size=sub,
            round_robin=robin,
            **more,
        )


CROSSINGS = [
    ("zero1", replace(CASES["zero3"], size=3)),
    ("zero3", replace(CASES["zero2-bf16"], dtype="fp32", size=2)),
    ("zero2-norm", replace(CASES["zero2-norm"], stage=3)),
    ("zero1-padding", replace(CASES["zero3-sub-groups"], size=2)),
    ("zero3-sub-groups", CASES["zero1-padding"]),
    ("zero2-round-robin", replace(CASES["zero1"], size=2)),
    ("zero1", CASES["zero2-round-robin"]),
    ("zero2-round-robin", replace(CASES["zero2-round-robin"], size=2)),
    ("zero2-bf16", CASES["zero3-bf16"]),
    ("zero3-bf16", CASES["zero1-bf16-optimizer"]),
    ("zero1-bf16-optimizer", replace(CASES["zero2-bf16"], size=2)),
    ("zero1-fp16", CASES["zero3-fp16"]),
    ("zero3-fp16", CASES["zero1-fp16"]),
    ("zero3", CASES["zero0"]),
    ("zero2-bf16", CASES["zero0-bf16"]),
    ("zero1-fp16", CASES["zero0-fp16"]),
    ("zero2-sgd", replace(CASES["zero2-sgd"], stage=3, size=3)),
    ("zero3-adagrad", replace(CASES["zero3-adagrad"], stage=1)),
    ("zero1-aligned", CASES["zero1-bf16-optimizer"]),
]


def test_there_are_pairs_of_every_stage():
    assert {(CASES[a].stage, b.stage) for a, b in CROSSINGS} >= {(1, 3), (3, 2), (3, 1), (2, 3), (1, 2), (2, 1), (3, 0)}


@pytest.mark.parametrize(("name", "case"), CROSSINGS)
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
