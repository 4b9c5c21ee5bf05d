"""An unchanged script's save_checkpoint and load_checkpoint, once install() was called; a kill in them, and natively."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from distckpt import Checkpointer, TrainState
from distckpt.errors import DistckptError, Mismatch, NotACheckpoint, Unsupported
from distckpt.store.base import write_all
from distckpt.store.object import ObjectStore
from tests import deepspeeds, ranks
from tests.adapters.engines import made
from tests.adapters.scripts import equal, rates, script, train, weights
from tests.layouts import quiet
from tests.run.test_async import until
from tests.store import servers

# -- save and load ---------------------------------------------------------------------------------------------------


def _save(root, stage, installed=True):
    engine = script(stage, installed=installed)
    train(engine, 0, 2)
    assert engine.save_checkpoint(root, client_state={"epoch": 1, "order": torch.arange(3), "pair": (1, 2)}) is True
    train(engine, 2, 3)
    first = weights(engine), rates(engine)
    assert engine.save_checkpoint(root, tag="best", client_state={"epoch": 2}, save_latest=False) is True
    return first, train(engine, 3, 5)


def _load_all(root, stage):
    """Every way to load, each into a fresh engine; what a load leaves alone stays as it was."""
    engine = script(stage, seed=4)
    path, client = engine.load_checkpoint(root)
    assert (path, engine.global_steps, engine.global_samples) == (str(Path(root, "global_step2")), 2, 24)
    assert (client["epoch"], client["order"].tolist(), client["pair"]) == (1, [0, 1, 2], (1, 2))
    fresh = weights(script(stage, seed=4)), rates(script(stage, seed=4))
    found = {}
    for name, options in {
        "all": {},
        "module": {"load_module_only": True},
        "no optimizer": {"load_optimizer_states": False},
        "no schedule": {"load_lr_scheduler_states": False},
    }.items():
        engine = script(stage, seed=4)
        path, client = engine.load_checkpoint(root, tag="best", **options)
        assert (path, client) == (str(Path(root, "best")), {"epoch": 2})
        states = len(engine.optimizer.optimizer.state)
        found[name] = weights(engine), rates(engine), engine.global_steps, engine.lr_scheduler.last_epoch, states
        if name == "all":
            losses = train(engine, 3, 5)
    assert found["module"][1:] == (fresh[1], 0, 0, 0)
    assert found["no optimizer"][1:] == (fresh[1], 3, 3, 0)
    assert found["no schedule"][2:4] == (3, 0)
    assert found["all"][2:4] == (3, 3)
    return [w for w, *_ in found.values()], found["all"][1], losses


@pytest.mark.parametrize(
    ("stage", "size", "to", "on"),
    [
        pytest.param(2, 2, 2, 2, marks=pytest.mark.full),
        pytest.param(3, 2, 3, 2, marks=pytest.mark.full),
        (1, 2, 3, 3),
    ],
)
def test_tags_hold_what_deepspeeds_hold_and_load_at_any_size_and_stage(tmp_path, stage, size, to, on):
    (wanted, rate), losses = deepspeeds.run(size, _save, str(tmp_path), stage)[0]
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert not [*tmp_path.rglob("*.pt")]
    found, loaded_rate, loaded_losses = deepspeeds.run(on, _load_all, str(tmp_path), to)[0]
    assert all(equal(w, wanted) for w in found)
    assert loaded_rate == rate
    assert loaded_losses == (losses if (stage, size) == (to, on) else pytest.approx(losses, rel=1e-6))


def _save_at(environment, uri, installed):
    os.environ.update(environment)
    engine = script(3, installed=installed, zero={"offload_optimizer": {"device": "cpu"}})
    train(engine, 0, 2)
    engine.save_checkpoint(uri, client_state={"epoch": 1})
    train(engine, 2, 3)
    first = weights(engine), rates(engine)
    engine.save_checkpoint(uri, client_state={"epoch": 2})
    losses = train(engine, 3, 5)
    from distckpt.adapters import deepspeed

    deepspeed.install()()  # undone: what is saved in the background is finished
    return first, losses


def _load_at(environment, uri):
    os.environ.update(environment)
    engine = script(2, seed=4)
    with quiet():
        path, client = engine.load_checkpoint(uri)
    return path, client, weights(engine), train(engine, engine.global_steps, 5)


@pytest.mark.parametrize("installed", [True, "async"])
def test_tags_at_a_uri_load_at_any_size_and_stage_and_a_damaged_one_gives_way(installed):
    bucket = servers.start("moto").bucket()
    (wanted, _), losses = deepspeeds.run(2, _save_at, bucket.environment, bucket.uri, installed)[0]
    path, client, found, went_on = deepspeeds.run(3, _load_at, bucket.environment, bucket.uri)[0]
    assert (path, client) == (f"{bucket.uri}/global_step3", {"epoch": 2})
    assert equal(found, wanted)
    assert went_on == pytest.approx(losses, rel=1e-6)
    store = ObjectStore(bucket.uri, bucket.options)
    assert {entry.name for entry in store.list("")} == {"latest", "global_step2", "global_step3"}
    write_all(store, "global_step3/step-00000000/commit.json", b"damaged")
    path, client, _, _ = deepspeeds.run(2, _load_at, bucket.environment, bucket.uri)[0]
    assert (path, client) == (f"{bucket.uri}/global_step2", {"epoch": 1})


def _alike(root, installed):
    """The same script thrice: as it is, with install(), and saving in the background."""
    engine = script(3, installed=installed)
    train(engine, 0, 2)
    engine.save_checkpoint(root, tag="x", client_state={"a": 1})
    again = script(3, seed=3, installed=installed)
    _, client = again.load_checkpoint(root, tag="x")
    return client["a"], train(again, 2, 4), again.global_steps, rates(again)


def test_a_script_does_the_same_with_and_without(tmp_path):
    by_us, behind, by_them = (deepspeeds.run(2, _alike, str(tmp_path / str(i)), i) for i in (True, "async", False))
    assert by_us == behind == by_them


def _in_the_background(root):
    """Two tags, saved while training goes on; then one that cannot be."""
    engine = script(2, installed="async")
    train(engine, 0, 1)
    engine.save_checkpoint(root)
    train(engine, 1, 2)  # what the first save has staged is not what is trained on
    saved = weights(engine)
    engine.save_checkpoint(root, client_state={"a": 1})
    train(engine, 2, 3)
    again = script(2, seed=5, installed="async")
    path, client = again.load_checkpoint(root)
    assert (Path(path).name, client, equal(weights(again), saved)) == ("global_step2", {"a": 1}, True)
    if torch.distributed.get_rank() == 0:
        Path(root, "bad", "step-00000000").parent.mkdir()
        Path(root, "bad", "step-00000000").write_text("in the way")
    torch.distributed.barrier()
    engine.save_checkpoint(root, tag="bad")
    with pytest.raises(DistckptError, match="step-00000000"):
        for _ in range(50):  # told at the first call after it has failed
            engine.save_checkpoint(root, tag="next")
            time.sleep(0.1)
    engine.save_checkpoint(root, tag="next")
    assert again.load_checkpoint(root)[0] == str(Path(root, "next"))


def test_tags_are_saved_while_training_goes_on(tmp_path):
    deepspeeds.run(2, _in_the_background, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "next"


def _undone(root):
    from deepspeed.runtime.engine import DeepSpeedEngine

    from distckpt.adapters import deepspeed

    native = DeepSpeedEngine.save_checkpoint
    undo = deepspeed.install(timeout=20)
    assert deepspeed.install() is undo
    assert DeepSpeedEngine.save_checkpoint is not native
    undo()
    assert DeepSpeedEngine.save_checkpoint is native
    script(1, installed=False).save_checkpoint(root, tag="t")
    assert [*Path(root).rglob("*.pt")]


def test_install_is_done_once_and_can_be_undone(tmp_path):
    deepspeeds.run(2, _undone, str(tmp_path))


def _lacking(root):
    """No schedule anywhere; then no optimizer either, as of an engine that only computes."""
    from distckpt.adapters import deepspeed

    deepspeed.install(timeout=20)
    engine = made(2, "bf16")
    train(engine, 0, 2)
    engine.save_checkpoint(root, tag="t", client_state={"a": 1})
    wanted = weights(engine)
    for options in ({"load_optimizer_states": False}, {"load_lr_scheduler_states": False}, {"load_module_only": True}):
        other = made(2, "bf16", seed=4)
        assert other.load_checkpoint(root, tag="t", **options)[1] == {"a": 1}, options
        assert equal(weights(other), wanted)
        assert (not other.optimizer.optimizer.state) == ("load_lr_scheduler_states" not in options)
    for stage in (0, 3):
        alone = deepspeeds.engine(deepspeeds.net(4), None, stage, "bf16")
        for options in ({}, {"load_optimizer_states": False}):
            assert alone.load_checkpoint(root, tag="t", **options)[1] == {"a": 1}
            assert equal(weights(alone), wanted)
        alone.save_checkpoint(root, tag=f"alone{stage}")
        text = ranks.expect_error(lambda stage=stage: other.load_checkpoint(root, tag=f"alone{stage}"), Mismatch)
        assert "optim: missing" in text
        other.load_checkpoint(root, tag=f"alone{stage}", load_optimizer_states=False)
        assert equal(weights(other), wanted)


def test_what_an_engine_or_a_tag_does_not_have_is_not_asked_for(tmp_path):
    deepspeeds.run(2, _lacking, str(tmp_path))


def _frozen(root):
    engine = script(2)
    engine.save_checkpoint(root, tag="slim", exclude_frozen_parameters=True)
    other = script(2, seed=6)
    text = ranks.expect_error(lambda: other.load_checkpoint(root, tag="slim"), Mismatch)
    assert "model.still.weight: missing" in text
    assert "load_module_strict=False" in text
    before = weights(other)
    other.load_checkpoint(root, tag="slim", load_module_strict=False)
    after, wanted = weights(other), weights(engine)
    frozen = {"still.weight", "still.bias"}
    assert all(torch.equal(after[n], (before if n in frozen else wanted)[n]) for n in after)


def test_frozen_parameters_are_left_out_when_asked(tmp_path):
    deepspeeds.run(2, _frozen, str(tmp_path))


def _refusals(root):
    engine = script(1)
    told = [
        ranks.expect_error(lambda: engine.save_checkpoint(root, client_state={"args": inspect.Parameter}), Unsupported),
        ranks.expect_error(lambda: engine.save_checkpoint(""), ValueError),
        ranks.expect_error(lambda: engine.save_checkpoint(root, tag=f"of-{torch.distributed.get_rank()}"), Mismatch),
    ]
    engine.save_checkpoint(root, tag="t")
    told.append(ranks.expect_error(lambda: engine.load_checkpoint(root, tag="t", custom_load_fn=print), Unsupported))
    shutil.rmtree(Path(root, "t", "step-00000000")) if torch.distributed.get_rank() == 0 else None
    torch.distributed.barrier()
    Path(root, "t", "step-00000000").mkdir(exist_ok=True)
    told.append(ranks.expect_error(lambda: engine.load_checkpoint(root, tag="t"), NotACheckpoint))
    return told


def test_what_cannot_be_is_refused_on_every_rank(tmp_path):
    (client, empty, tags, custom, nothing), *_ = deepspeeds.run(2, _refusals, str(tmp_path))
    assert "client_state.args" in client
    assert "save_dir" in empty
    assert "ranks [1] save another tag" in tags
    assert "custom_load_fn" in custom
    assert "a save that did not finish" in nothing


# -- death ------------------------------------------------------------------------------------------------------


def _die_in_second_save(root, installed):
    """Rank 1 is killed inside the write of its part of the second checkpoint."""
    from distckpt.store.local import LocalStore

    engine = script(2, installed=installed)
    train(engine, 0, 1)
    engine.save_checkpoint(root)
    train(engine, 1, 2)

    def dying(pieces):
        yield next(pieces)
        os.kill(os.getpid(), signal.SIGKILL)

    def die_in_torch_save(value, path, *args, **kwargs):
        Path(path).write_bytes(b"PK half a shard")
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == 1:
        write = LocalStore.write
        LocalStore.write = lambda self, key, pieces, *, size: write(self, key, dying(iter(pieces)), size=size)
        torch.save = die_in_torch_save
    try:
        engine.save_checkpoint(root)
    except (DistckptError, RuntimeError) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def _resume(root, installed):
    engine = script(2, seed=8, installed=installed)
    try:
        engine.load_checkpoint(root)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return engine.global_steps


def test_a_rank_killed_in_its_write_leaves_the_previous_checkpoint_where_deepspeed_loses_both(tmp_path):
    for installed in (True, False):
        root = str(tmp_path / str(installed))
        survivor, _ = deepspeeds.run(2, _die_in_second_save, root, installed, may_die=(0, 1))
        latest = Path(root, "latest").read_text()
        resumed = deepspeeds.run(2, _resume, root, installed)
        if installed:
            assert "rank 1 did not answer" in survivor
            assert (latest, resumed) == ("global_step1", [1, 1])
        else:
            assert latest == "global_step2", "natively it names what was never whole"
            assert resumed[0] == 2, "rank 0 goes on from it"
            assert "Error" in resumed[1], "and rank 1 does not"


# -- scripts -----------------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, deepspeed
assert __name__ == "__main__" and sys.argv[1:] == ["--root", "here"], sys.argv
import beside
model = torch.nn.Linear(3, 2)
config = {"train_batch_size": 2, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
path, client = engine.load_checkpoint("here")
start = client["step"] if client else 0
for step in range(start, start + 2):
    loss = engine(torch.ones(1, 3)).square().mean()
    engine.backward(loss)
    engine.step()
engine.save_checkpoint("here", tag=f"step{step + 1}", client_state={"step": step + 1})
"""


def _launch(folder, switch, *what):
    """`python -m distckpt.adapters.deepspeed WHAT --root here`, on ranks that have imported DeepSpeed."""
    import runpy

    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", DISTCKPT_DEEPSPEED=switch)
    os.chdir(folder)
    sys.argv = ["-m", *what, "--root", "here"]
    runpy.run_module("distckpt.adapters.deepspeed", run_name="__main__", alter_sys=True)


def _text(path):
    return path.read_text() if path.exists() else ""


def _load_alone(folder):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(f"{folder}/here/step4", wait=True) as checkpointer, quiet():
        checkpointer.load(TrainState(model=model, optimizer=optimizer, rng=False), only=("model", "optim"))
    return optimizer.state[model.weight]["step"].item()


@pytest.mark.parametrize("switch", ["1", "async"])
def test_a_script_runs_unchanged_under_the_launcher(tmp_path, switch):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "train.py").write_text(SCRIPT)
    for expected, what in (("step2", ["train.py"]), ("step4", ["-m", "train"])):
        deepspeeds.run(2, _launch, str(tmp_path), switch, *what)
        until(lambda expected=expected: _text(tmp_path / "here" / "latest") == expected)
    pointer = tmp_path / "here/step4/last.json"
    until(pointer.exists)  # the writer's last, after `latest`
    assert json.loads(pointer.read_text())["checkpoint"] == "step-00000000"
    assert not [*(tmp_path / "here").rglob("*.pt")]
    assert ranks.run(1, _load_alone, str(tmp_path)) == [4]


def test_the_launcher_leaves_deepspeed_alone_where_it_is_told_to(tmp_path):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "train.py").write_text(SCRIPT)
    deepspeeds.run(2, _launch, str(tmp_path), "0", "train.py")
    assert [*(tmp_path / "here").rglob("*.pt")]
