"""Bad input: a clear error, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, Progress, TrainState
from distckpt.errors import (
    Corrupt,
    DistckptError,
    FormatError,
    Mismatch,
    NewerFormat,
    NotACheckpoint,
    RunConflict,
    StateUnusable,
    StateWarning,
    StoreError,
    Unsupported,
)
from distckpt.format.checksum import digest
from distckpt.format.sealed import seal
from distckpt.store.local import LocalStore
from tests import layouts, ranks
from tests.faults.sharded import Sharded, on_threads


class Value:
    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return self.value

    def load_state_dict(self, value):
        self.value = value


def _net(seed=0, **parameters):
    """A model with parameters of these shapes, or with these tensors."""
    torch.manual_seed(seed)
    model = nn.Module()
    for name, made in (parameters or {"a": (4, 3), "b": (5,)}).items():
        tensor = made if isinstance(made, torch.Tensor) else torch.randn(made)
        model.register_parameter(name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    return model


def _state(model=None, **more):
    """State of a model that has been trained for a step."""
    model = model or _net()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return TrainState(model=model, optimizer=optimizer, progress=Progress(1, 2, 3), **more)


def _model(state):
    return state._parts["model"].module


def _content(state):
    """All that a state holds, bit for bit."""
    captured = state.capture()
    tensors = {
        fqn: [(s.tensor.dtype, s.tensor.contiguous().view(-1).view(torch.uint8).tolist()) for s in t.shards]
        for fqn, t in captured.tensors.items()
    }
    return tensors, captured.objects


def _refused(kind, fn, state):
    """Text of the error that fn must raise, and by which nothing in the state may have changed."""
    before = _content(state)
    with pytest.raises(kind) as caught:
        fn()
    assert _content(state) == before
    return str(caught.value)


@pytest.fixture
def saved(tmp_path):
    """A run with step 1 of `_state()`."""
    Checkpointer(tmp_path, wait=True).save(1, _state())
    return tmp_path


# -- where there is no checkpoint ------------------------------------------------------------------------------------


def test_no_such_directory_is_no_checkpoint(tmp_path):
    state = _state()
    text = _refused(NotACheckpoint, lambda: Checkpointer(tmp_path / "absent", wait=True).load(state), state)
    assert "absent" in text
    assert not (tmp_path / "absent").exists()


def test_an_empty_directory_is_no_checkpoint(tmp_path):
    state = _state()
    assert str(tmp_path) in _refused(NotACheckpoint, lambda: Checkpointer(tmp_path, wait=True).load(state), state)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_no_checkpoint(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "step-100").mkdir()
    state = _state()
    text = _refused(NotACheckpoint, lambda: Checkpointer(tmp_path, wait=True).load(state), state)
    assert "no step directory" in text


def test_the_directory_of_a_step_is_not_the_directory_of_its_run(saved):
    state = _state()
    text = _refused(NotACheckpoint, lambda: Checkpointer(saved / "step-00000001", wait=True).load(state), state)
    assert "give its parent" in text


def test_a_file_is_no_run(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    state = _state()
    _refused(NotACheckpoint, lambda: Checkpointer(tmp_path / "file", wait=True).load(state), state)
    assert "not a directory" in _refused(
        StoreError, lambda: Checkpointer(tmp_path / "file", wait=True).save(1, state), state
    )
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_saves_that_were_never_committed_are_no_checkpoint(saved):
    (saved / "step-00000001" / "commit.json").unlink()
    state = _state()
    text = _refused(NotACheckpoint, lambda: Checkpointer(saved, wait=True).load(state), state)
    assert "step-00000001" in text
    assert "not finish" in text


def test_a_fresh_run_resumes_nothing(tmp_path):
    assert Checkpointer(tmp_path / "new", wait=True).resume(_state()) is None


def test_a_step_that_is_not_there_is_named_with_those_that_are(saved):
    state = _state()
    for step in (2, -1, 10**30):
        text = _refused(NotACheckpoint, lambda: Checkpointer(saved, wait=True).load(state, step=step), state)
        assert f"step {step}; it has [1]" in text


def test_a_newer_format_is_named_and_not_passed_over(saved):
    path = saved / "step-00000001" / "commit.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    path.write_bytes(seal(body | {"format": 2}))
    before = sorted(p.name for p in saved.rglob("*"))
    state = _state()
    for call in (Checkpointer(saved, wait=True).load, Checkpointer(saved, wait=True).resume):
        text = _refused(NewerFormat, lambda call=call: call(state), state)
        assert "step-00000001/commit.json" in text
        assert "version 2" in text
        assert "Install a newer distckpt" in text
    assert sorted(p.name for p in saved.rglob("*")) == before


# -- a checkpoint that does not fit ------------------------------------------------------------------------------------


def test_every_problem_is_listed_at_once_and_nothing_has_moved(tmp_path):
    saved = _net(a=(4, 3), b=(5,), gone=(2,), wide=(3,), c=(2, 2))
    Checkpointer(tmp_path, wait=True).save(1, TrainState(model=saved, gone=Value(1), rng=False))
    live = TrainState(
        model=_net(1, a=(3, 4), b=(5, 1), new=(2,), wide=torch.zeros(3, dtype=torch.float16), c=(2, 2)),
        new=Value(2),
        rng=False,
    )
    text = _refused(Mismatch, lambda: Checkpointer(tmp_path, wait=True).load(live), live)
    for told in (
        "model.a: saved with shape [4, 3], the state has [3, 4]",
        "model.b: saved with shape [5], the state has [5, 1]",
        "model.wide: saved as float32, the state has float16",
        "model.new: missing",
        "model.gone: in the checkpoint",
        "new: missing",
        "gone: in the checkpoint",
    ):
        assert told in text
    assert "model.c" not in text


def test_a_wrong_optimizer_is_told_with_the_parameters_that_do_not_match(saved):
    model = _net()
    optimizer = torch.optim.AdamW([model.a])
    state = TrainState(model=model, optimizer=optimizer, progress=Progress())
    text = _refused(Mismatch, lambda: Checkpointer(saved, wait=True).load(state), state)
    assert "optim.b.exp_avg: in the checkpoint, but not in the state" in text


@pytest.mark.parametrize(
    ("was", "now"), [("float32", "float64"), ("bfloat16", "float32"), ("float16", "float32"), ("int32", "int64")]
)
def test_a_dtype_is_widened_and_reported(tmp_path, was, now):
    values = torch.arange(-4, 5).to(getattr(torch, was))
    Checkpointer(tmp_path, wait=True).save(1, TrainState(model=_net(w=values)))
    model = _net(w=torch.zeros(9, dtype=getattr(torch, now)))
    with pytest.warns(StateWarning, match="precision"):
        report = Checkpointer(tmp_path, wait=True).load(TrainState(model=model))
    assert torch.equal(model.w, values.to(getattr(torch, now)))
    assert report.cast == {"model.w": f"{was} -> {now} (lossless)"}


@pytest.mark.parametrize(
    ("was", "now"), [("float64", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16"), ("int64", "int32")]
)
def test_a_dtype_is_narrowed_only_when_asked(tmp_path, was, now):
    values = (torch.arange(-4, 5) * 3).to(getattr(torch, was))
    Checkpointer(tmp_path, wait=True).save(1, TrainState(model=_net(w=values)))
    model = _net(w=torch.zeros(9, dtype=getattr(torch, now)))
    state = TrainState(model=model)
    text = _refused(Mismatch, lambda: Checkpointer(tmp_path, wait=True).load(state), state)
    assert f"model.w: saved as {was}, the state has {now}" in text
    assert "cast=True" in text
    with pytest.warns(StateWarning, match="precision"):
        report = Checkpointer(tmp_path, wait=True).load(state, cast=True)
    assert report.cast == {"model.w": f"{was} -> {now}"}
    assert torch.equal(model.w, values.to(getattr(torch, now)))


def test_what_a_load_that_is_not_strict_leaves_out_is_reported(saved):
    model = _net(1, a=(4, 3), new=(2,))
    before = model.new.detach().clone()
    report = Checkpointer(saved, wait=True).load(TrainState(model=model, more=Value(5)), strict=False)
    assert report.loaded == ["model.a"]
    assert set(report.missing) == {"model.new", "more"}
    assert {"model.b", "optim.a.exp_avg", "optim", "trainer_state"} <= set(report.unexpected)
    assert torch.equal(model.new, before)
    assert torch.equal(model.a, _model(_state()).a)


def test_a_load_of_the_model_alone_touches_nothing_else(saved):
    state = _state(_net(3))
    before = _content(state)
    report = Checkpointer(saved, wait=True).load(state, only=("model",))
    tensors, objects = _content(state)
    assert report.loaded == ["model.a", "model.b"]
    assert (report.missing, report.unexpected) == ([], [])
    assert objects == before[1]
    wanted, _ = _content(_state())
    for fqn, value in tensors.items():
        assert value == (wanted if fqn.startswith("model.") else before[0])[fqn], fqn


def test_a_part_that_is_not_there_is_no_reason_to_load_nothing(saved):
    state = _state(_net(1))
    text = _refused(Mismatch, lambda: Checkpointer(saved, wait=True).load(state, only=("modle",)), state)
    assert "only='modle': neither the checkpoint nor the state has such a part" in text
    for only in ("model", (), (b"model",)):
        assert "a tuple of the names" in _refused(
            ValueError, lambda o=only: Checkpointer(saved, wait=True).load(state, only=o), state
        )


def test_what_is_no_train_state_is_refused(saved):
    for call in (
        Checkpointer(saved, wait=True).resume,
        Checkpointer(saved, wait=True).load,
        lambda s: Checkpointer(saved, wait=True).save(2, s),
    ):
        with pytest.raises(Unsupported, match="state is a Linear; a TrainState is expected"):
            call(nn.Linear(2, 2))


def _bad_metrics_on_one_rank(root):
    import torch.distributed as dist

    with Checkpointer(root, timeout=20, wait=True) as c:
        metrics = {"loss": torch.ones(3)} if dist.get_rank() == 0 else None
        return ranks.expect_error(lambda: c.save(1, TrainState(), metrics), Unsupported)


def test_metrics_that_cannot_be_recorded_are_told_on_every_rank(tmp_path):
    for text in ranks.run(2, _bad_metrics_on_one_rank, str(tmp_path)):
        assert "rank 0: metric 'loss'" in text


def _made_too_early(root):
    import torch.distributed as dist

    group, world = dist.group.WORLD, dist.distributed_c10d._world
    world.default_pg = None  # as before init_process_group()
    early = Checkpointer(root, wait=True)
    world.default_pg = group
    return ranks.expect_error(lambda: early.resume(TrainState()), RunConflict)


def test_a_checkpointer_that_was_made_before_the_ranks_met_is_refused(tmp_path):
    assert all(
        "for 1 rank(s), torch.distributed has 2 now" in text for text in ranks.run(2, _made_too_early, str(tmp_path))
    )
    assert list(tmp_path.iterdir()) == []


def test_saved_names_are_renamed_for_model_and_optimizer(saved):
    model = _net(1, x_a=(4, 3), x_b=(5,))
    state = _state(model)
    report = Checkpointer(saved, wait=True).load(state, rename=lambda fqn: "x_" + fqn)
    wanted = _state()
    assert set(report.loaded) >= {"model.x_a", "optim.x_b.exp_avg"}
    assert torch.equal(model.x_a, _model(wanted).a)
    assert _content(state)[0]["optim.x_b.exp_avg"] == _content(wanted)[0]["optim.b.exp_avg"]


def test_renaming_leaves_the_tensors_of_other_values_alone(tmp_path):
    Checkpointer(tmp_path, wait=True).save(1, _state(v=Value({"history": torch.arange(3)})))
    renamed, v = _net(1, trunk_a=(4, 3), trunk_b=(5,)), Value(None)
    Checkpointer(tmp_path, wait=True).load(_state(renamed, v=v), rename=lambda fqn: fqn.replace("", "trunk_", 1))
    assert v.value["history"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["optim", "trainer_state", "v"])
@pytest.mark.parametrize("value", [5, "x", [], {"$tensor": ["nope", "torch"]}, {"groups": None}])
def test_an_object_of_another_form_is_refused_before_anything_moves(tmp_path, name, value):
    Checkpointer(tmp_path, wait=True).save(1, _state(v=Value({})))
    commit = tmp_path / "step-00000001" / "commit.json"
    content = json.loads(commit.read_text())
    del content["digest"]
    data = json.dumps(value).encode()
    (commit.parent / content["objects"][name][0]).write_bytes(data)
    content["objects"][name][1:] = [len(data), digest(data)]
    commit.write_bytes(seal(content))
    state = _state(_net(1), v=Value({}))
    if name == "v" and value != {"$tensor": ["nope", "torch"]}:
        Checkpointer(tmp_path, wait=True).load(state)  # any form is a user's own
    else:
        _refused((FormatError, Mismatch), lambda: Checkpointer(tmp_path, wait=True).load(state, step=1), state)


def test_a_renaming_that_joins_two_names_is_refused(saved):
    state = _state()
    text = _refused(Mismatch, lambda: Checkpointer(saved, wait=True).load(state, rename=lambda _: "a"), state)
    assert "the same name" in text


# -- what cannot be saved ------------------------------------------------------------------------------------------------


def _not_saved(saved, state, kind=Unsupported, step=2):
    """Text of the error that a save must raise, and that must leave the run as it was."""
    checkpointer = Checkpointer(saved, wait=True)
    checkpointer.resume(_state())
    before = sorted(p.relative_to(saved) for p in saved.rglob("*"))
    with pytest.raises(kind) as caught:
        checkpointer.save(step, state)
    assert sorted(p.relative_to(saved) for p in saved.rglob("*")) == before
    assert Checkpointer(saved, wait=True).load(_state()).step == 1
    return str(caught.value)


def test_a_value_of_an_unknown_type_is_refused_with_its_path(saved):
    text = _not_saved(saved, _state(extra=Value({"list": [1, {"deep": object()}]})))
    assert text.startswith("extra.list[1].deep: a builtins.object cannot be saved")


def test_a_tensor_on_the_meta_device_is_refused_by_name(saved):
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert "model.weight: is on the meta device" in _not_saved(saved, TrainState(model=model))


def test_a_load_into_the_meta_device_is_refused_by_name(saved):
    model = _net()
    model.a = nn.Parameter(torch.empty(4, 3, device="meta"))
    with pytest.raises(Unsupported, match=r"model\.a: is on the meta device"):
        Checkpointer(saved, wait=True).load(TrainState(model=model))


def test_a_sparse_tensor_is_refused_by_name(saved):
    model = nn.Module()
    model.register_buffer("s", torch.eye(3).to_sparse())
    assert "model.s" in _not_saved(saved, TrainState(model=model))


def test_an_optimizer_over_a_parameter_of_no_model_is_refused(saved):
    stray = nn.Parameter(torch.zeros(3, 2))
    state = TrainState(model=_net(), optimizer=torch.optim.SGD([stray]))
    assert "parameter 0 of group 0, shape (3, 2), belongs to no model" in _not_saved(saved, state)


def _save_partial(root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    model = nn.Module()
    mesh = init_device_mesh("cpu", (2,))
    model.register_parameter("w", nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()])))
    with Checkpointer(root, timeout=10, wait=True) as checkpointer:
        return ranks.expect_error(lambda: checkpointer.save(1, TrainState(model=model)), Unsupported)


def test_a_pending_sum_is_refused_by_name_on_every_rank(tmp_path):
    for text in ranks.run(2, _save_partial, str(tmp_path)):
        assert "model.w: placements (Partial(sum),) hold a pending sum" in text


@pytest.mark.parametrize("step", [-1, "1", 1.0, True, None, 2**63])
def test_a_step_that_is_no_count_is_refused(saved, step):
    assert f"step={step!r}" in _not_saved(saved, _state(), ValueError, step)


@pytest.mark.parametrize("every", [0, -5, 2.5, "10", True])
def test_an_interval_that_is_no_count_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match="every="):
        Checkpointer(tmp_path, every=every, wait=True)


# -- a load that failed half-way -----------------------------------------------------------------------------------------


def _large(seed):
    """State whose data file has several blocks."""
    return _state(_net(seed, a=(500_000,), b=(5,)), rng=False)


@pytest.fixture
def half_loaded(tmp_path):
    """A run whose step 2 is damaged, and a state into which its load failed half-way."""
    checkpointer = Checkpointer(tmp_path, wait=True)
    for step in (1, 2):
        checkpointer.save(step, _large(step))
    path = next((tmp_path / "step-00000002").glob("rank-*"))
    data = bytearray(path.read_bytes())
    data[1_500_000] ^= 1
    path.write_bytes(data)
    state = _large(3)
    with pytest.raises(Corrupt, match="rank-00000"):
        checkpointer.load(state, step=2)
    return checkpointer, state


def test_a_state_whose_load_failed_half_way_is_not_saved_until_a_load_succeeds(half_loaded):
    checkpointer, state = half_loaded
    with pytest.raises(StateUnusable, match="load a whole checkpoint"):
        checkpointer.save(3, state)
    assert checkpointer.steps() == [1, 2]
    checkpointer.load(state, step=1)
    assert torch.equal(_model(state).a, _model(_large(1)).a)
    assert checkpointer.save(3, state).step == 3


def test_a_load_of_a_part_does_not_make_a_mix_usable(half_loaded):
    checkpointer, state = half_loaded
    checkpointer.load(state, step=1, only=("model",))
    with pytest.raises(StateUnusable):
        checkpointer.save(3, state)
    checkpointer.load(state, step=1)
    checkpointer.save(3, state)


def test_a_load_of_a_part_that_falls_back_leaves_a_usable_state(half_loaded):
    checkpointer, _ = half_loaded
    state = _large(4)
    with pytest.warns(StateWarning, match="falling back"):
        assert checkpointer.load(state, only=("model",)).step == 1
    checkpointer.save(3, state)


def test_a_value_that_refuses_its_state_makes_the_state_unusable(tmp_path):
    class Picky(Value):
        def load_state_dict(self, value):
            raise KeyError("lr")

    Checkpointer(tmp_path, wait=True).save(1, _state(picky=Value(1)))
    state = _state(picky=Picky(1))
    checkpointer = Checkpointer(tmp_path, wait=True)
    with pytest.raises(KeyError):
        checkpointer.resume(state)
    with pytest.raises(StateUnusable):
        state.capture()


# -- disks ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 1 MiB of its own, and a function that mounts it anew with other options."""

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
        return done.stderr

    path = tmp_path / "disk"
    path.mkdir()
    problem = mount("size=1m") if os.geteuid() == 0 else "not root"
    if problem:
        reason = f"a file system cannot be mounted here: {problem}"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    try:
        yield path, mount
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_read_only_run_is_loaded_and_a_save_into_it_says_so(disk):
    path, mount = disk
    checkpointer = Checkpointer(path, wait=True)
    checkpointer.save(1, _state())
    assert not mount("remount,ro")
    state = _state(_net(1))
    assert Checkpointer(path, wait=True).load(state).step == 1
    with pytest.raises(StoreError, match="mounted read-only"):
        checkpointer.save(2, state)
    with pytest.raises(StoreError, match="mounted read-only"):
        Checkpointer(path, timeout=1, wait=True).resume(state)
    assert not mount("remount,rw")
    assert checkpointer.steps() == [1]
    checkpointer.save(2, state)


def _fill(path, *, but):
    """Fill the disk but for some bytes."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - but)


@pytest.mark.parametrize("pages", [0, 2, 5, 6])
def test_a_full_disk_is_told_on_every_rank_and_costs_only_the_save_it_stopped(disk, pages):
    path, _ = disk

    def save(comm):
        state = Sharded(comm.rank, 2, 1)
        checkpointer = Checkpointer(LocalStore(path), comm=comm, arena_bytes=4096, wait=True)
        checkpointer.save(1, state)
        comm.all_gather("saved", b"")
        if comm.rank == 0:
            _fill(path / "filler", but=4096 * pages)
        comm.all_gather("filled", b"")
        state.set(2)
        try:
            checkpointer.save(2, state)
            text = None
        except DistckptError as e:
            text = f"{type(e).__name__}: {e}"
        comm.all_gather("failed", b"")
        left = sorted(str(p.relative_to(path)) for p in path.rglob("step-00000002*/*"))
        comm.all_gather("looked", b"")
        if comm.rank == 0:
            (path / "filler").unlink()
        comm.all_gather("freed", b"")
        checkpointer.save(3, state)
        return text, left

    def load(comm):
        state = Sharded(comm.rank, 2)
        Checkpointer(LocalStore(path), comm=comm, wait=True).load(state, step=1)
        return state.is_at(1)

    with layouts.quiet():
        results = on_threads(2, save)
    for text, left in results:
        assert text.startswith("StoreError")
        assert "the file system is full" in text
        assert left == []
    assert on_threads(2, load) == [True, True]
    assert Checkpointer(path, wait=True).steps() == [1, 3]
