"""distckpt.save and distckpt.load: one process, and ranks as threads. Real ranks are in test_direct_ranks.py."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

import distckpt
from distckpt.adapters.tensors import kind_of
from distckpt.comm_threads import ThreadComm
from distckpt.errors import Corrupt, Mismatch, NotACheckpoint, RunConflict, StateWarning, StoreError, Unsupported
from distckpt.statedict import canonical
from distckpt.store.local import LocalStore
from distckpt.store.memory import MemoryStore
from tests.faults.failpoints import FaultyStore, Fuse


def names(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir() and not p.is_symlink())


def same(a, b):
    """Equal in values and in every type."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return sorted(map(repr, a)) == sorted(map(repr, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def on_threads(size, fn):
    """fn(comm) on each rank; its results. What one raised is raised."""
    results, errors = [None] * size, []

    def work(comm):
        try:
            results[comm.rank] = fn(comm)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(c,)) for c in ThreadComm.group(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    if errors:
        raise errors[0]
    return results


# -- values ------------------------------------------------------------------------------------------------------


def test_the_functions_are_the_package_s_whatever_subpackages_are_imported():
    import distckpt.loading.load
    import distckpt.saving.save
    from distckpt import load, save

    assert distckpt.save is save
    assert distckpt.load is load
    assert callable(save)
    assert "save" in distckpt.__all__


def test_a_nested_dict_comes_back_in_every_type(tmp_path):
    def tree(k):
        return {
            "model": OrderedDict({"w": torch.full((2, 3), 1.0 * k), "b": torch.arange(k, k + 4)}),
            "by_int": {0: torch.full((3,), 2.0 * k), 1: k, "1": -k},
            "by_tuple": {(1, "a"): [np.full(3, k, "i2"), (torch.ones(1) * k, None)]},
            "text": f"{k}",
            7: {"k": k},
            "array": np.full((2, 2), k, "f8"),
            "scalar": torch.tensor(k),
        }

    distckpt.save(tmp_path / "run", tree(5))
    into = tree(0)
    w = into["model"]["w"]
    inner = into["by_int"]
    report = distckpt.load(tmp_path / "run", into)
    assert same(into, tree(5))
    assert into["model"]["w"] is w
    assert into["by_int"] is inner
    assert report.step == 0


leaves = st.one_of(
    st.none(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.integers(0, 5), max_size=3).map(lambda v: torch.tensor(v, dtype=torch.int16)),
    st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(lambda v: np.array(v, "f4")),
)
keys = st.one_of(st.text(max_size=3), st.integers(), st.tuples(st.integers(0, 3), st.text(max_size=1)))
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=2).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


def blank(value):
    """The same structure with other values: what a load is given to fill."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 99)
    if isinstance(value, dict):
        return {k: blank(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(blank, value))
    return "other" if not isinstance(value, np.ndarray) else np.zeros(1)


def ambiguous(tree):
    """Whether two tensors would have one name, as in {"a.b": tensor, "a": {"b": tensor}}: refused."""
    try:
        canonical(tree, kind_of)
    except Unsupported:
        return True
    return False


@given(st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(tree):
    store = MemoryStore()
    assume(not ambiguous(tree))
    distckpt.save(store, tree)
    into = blank(tree)
    distckpt.load(store, into)
    assert same(into, tree)


def test_objects_with_a_state_dict_are_asked_for_it_and_given_it_back(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5)

    model, optimizer, scheduler = made(1)
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    distckpt.save(tmp_path, {"model": model, "optim": optimizer, "scheduler": scheduler})
    model2, optimizer2, scheduler2 = made(2)
    distckpt.load(tmp_path, {"model": model2, "optim": optimizer2, "scheduler": scheduler2})
    assert same(dict(model.state_dict()), dict(model2.state_dict()))
    assert same(optimizer.state_dict()["state"], optimizer2.state_dict()["state"])
    assert optimizer2.param_groups[0]["lr"] == 0.1
    assert scheduler2.state_dict() == scheduler.state_dict()


def test_tied_tensors_of_a_model_are_stored_once(tmp_path):
    weight = torch.arange(6.0)
    report = distckpt.save(tmp_path, {"model": {"a": weight, "b": weight, "c": weight[:3]}})
    assert report.nbytes < 4096 + 300 + 2 * 24
    into = {"model": {"a": torch.zeros(6), "b": torch.zeros(6), "c": torch.zeros(3)}}
    distckpt.load(tmp_path, into)
    assert torch.equal(into["model"]["b"], weight)


def test_tensors_saved_apart_load_into_tied_ones_if_they_are_equal(tmp_path):
    """FSDP1's state dicts gather and cut each anew, so tied parameters are not one memory there."""
    tied = torch.zeros(300, 7)
    for path, b in (("equal", 1.0), ("differing", 2.0)):
        distckpt.save(tmp_path / path, {"model": {"a": torch.ones(300, 7), "b": torch.full((300, 7), b)}})
    distckpt.load(tmp_path / "equal", {"model": {"a": tied, "b": tied}})
    assert tied.eq(1).all()
    with pytest.raises(Mismatch, match=r"model\.b: saved with values of its own, but tied to model\.a here"):
        distckpt.load(tmp_path / "differing", {"model": {"a": tied, "b": tied}})


def test_two_values_are_not_loaded_into_one_memory_unless_they_are_equal(tmp_path):
    """Filled one after the other, the second would be lost: silently, or as a block that fails its checksum."""
    one, other = torch.arange(6.0), torch.arange(2.0, 8.0)
    distckpt.save(tmp_path / "differ", {"model": {"a": one}, "ema": {"a": other}})
    for a, b in ((one.clone(),) * 2, (shared := torch.zeros(9), shared[3:])):
        a, b = a[:6], b[:6]
        before = a.clone()
        with pytest.raises(Mismatch, match=r"model.a: shares memory with ema.a|ema.a: shares memory with model.a"):
            distckpt.load(tmp_path / "differ", {"model": {"a": a}, "ema": {"a": b}})
        assert torch.equal(a, before)
        distckpt.load(tmp_path / "differ", {"model": {"a": a}}, only=("model",))
        assert torch.equal(a, one)
    whole = torch.arange(8.0)
    distckpt.save(tmp_path / "fit", {"model": {"a": whole[:6]}, "ema": {"a": whole[2:]}, "view": whole})
    into = torch.zeros(8)
    distckpt.load(tmp_path / "fit", {"model": {"a": into[:6]}, "ema": {"a": into[2:]}, "view": into})
    assert torch.equal(into, whole)
    apart = torch.zeros(6, 2)
    distckpt.load(tmp_path / "differ", {"model": {"a": apart[:, 0]}, "ema": {"a": apart[:, 1]}})
    assert torch.equal(apart, torch.stack([one, other], 1))


def test_what_only_the_checkpoint_s_dicts_have_is_added(tmp_path):
    distckpt.save(tmp_path, {"x": {"a": 1, "b": {"t": torch.ones(2)}}})
    into = {"x": {"a": 0}}
    distckpt.load(tmp_path, into)
    assert same(into, {"x": {"a": 1, "b": {"t": torch.ones(2)}}})


def test_everything_missing_or_unexpected_is_told_at_once_and_nothing_changes(tmp_path):
    distckpt.save(tmp_path, {"model": {"a": torch.ones(2)}, "x": {"k": 1}, "gone": 1, "t": 5})
    into = {
        "model": {"a": torch.zeros(2), "b": torch.zeros(1)},
        "x": {"k": 0, "new": 0},
        "t": {"q": torch.zeros(1), "n": 1},
    }
    with pytest.raises(Mismatch) as e:
        distckpt.load(tmp_path, into)
    for name in ("model.b", "x.new", "gone"):
        assert name in str(e.value)
    assert into["x"] == {"k": 0, "new": 0}
    assert not into["model"]["a"].any()
    del into["t"]
    report = distckpt.load(tmp_path, into, strict=False)
    assert set(report.missing) == {"model.b", "x.new"}
    assert set(report.unexpected) == {"gone", "t"}
    assert into["x"] == {"k": 1, "new": 0}


def test_a_part_can_be_loaded_alone(tmp_path):
    distckpt.save(tmp_path, {"model": {"a": torch.ones(2)}, "x": {"k": 1}, 5: "five"})
    into = {"model": {"a": torch.zeros(2)}, "x": {"k": 0}, 5: ""}
    distckpt.load(tmp_path, into, only=("model",))
    assert same(into, {"model": {"a": torch.ones(2)}, "x": {"k": 0}, 5: ""})


def test_a_value_that_the_format_has_not_is_refused_with_its_path(tmp_path):
    with pytest.raises(Unsupported, match=r"x\.y\[1\]: a builtins\.object"):
        distckpt.save(tmp_path, {"x": {"y": [1, object()]}})
    for array in (np.ma.array([1, 2], mask=[0, 1]), np.array([1], ">i4"), np.array(["text"]), np.array([None])):
        with pytest.raises(Unsupported, match="x"):
            distckpt.save(tmp_path, {"x": array})
    with pytest.raises(Unsupported, match="state dict"):
        distckpt.save(tmp_path, torch.nn.Linear(1, 1))
    assert not names(tmp_path)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    def optimizer(*params):
        return {"state": {}, "param_groups": [{"lr": 0.1, "params": list(params)}]}

    distckpt.save(tmp_path, {"optim": optimizer("a", "b")})
    with pytest.raises(Mismatch, match=r"did not have \['c'\]"):
        distckpt.load(tmp_path, {"optim": optimizer("a", "c")})


def test_hyper_parameters_are_taken_by_parameter_not_by_place(tmp_path):
    def optimizer(*groups):
        return {"state": {}, "param_groups": [{"lr": lr, "params": params} for lr, params in groups]}

    distckpt.save(tmp_path, {"optim": optimizer((0.1, ["a"]), (0.2, ["b", "c"]))})
    into = {"optim": optimizer((0, ["c"]), (torch.tensor(0.0), ["a"]))}
    live = into["optim"]["param_groups"][1]["lr"]
    distckpt.load(tmp_path, into)
    assert [g["lr"] for g in into["optim"]["param_groups"]] == [0.2, torch.tensor(0.1)]
    assert into["optim"]["param_groups"][1]["lr"] is live
    with pytest.raises(Mismatch, match="differ"):
        distckpt.load(tmp_path, {"optim": optimizer((0, ["a", "b", "c"]))})


# -- paths and generations ---------------------------------------------------------------------------------------


def test_a_path_is_a_run_or_one_step_of_it(tmp_path):
    distckpt.save(tmp_path / "alone", {"a": 1})
    assert names(tmp_path / "alone") == ["step-00000000"]
    distckpt.save(tmp_path / "run" / "step-00001000", {"a": 2})
    distckpt.save(tmp_path / "run" / "step-00000500", {"a": 3})
    assert names(tmp_path / "run") == ["step-00000500", "step-00001000"]
    for path, a in (("alone", 1), ("run", 2), ("run/step-00001000", 2), ("run/step-00000500", 3)):
        into = {"a": 0}
        distckpt.load(tmp_path / path, into)
        assert into["a"] == a
    with pytest.raises(NotACheckpoint, match="500, 1000"):
        distckpt.load(tmp_path / "run" / "step-00000700", {"a": 0})
    with pytest.raises(NotACheckpoint):
        distckpt.load(tmp_path / "nothing", {"a": 0})


def test_a_path_that_would_not_give_back_what_is_saved_is_refused(tmp_path):
    distckpt.save(tmp_path / "step-00001000", {"a": 2})
    with pytest.raises(RunConflict, match="step-00001001"):
        distckpt.save(tmp_path, {"a": 1})
    with pytest.raises(Unsupported, match="generation"):
        distckpt.save(tmp_path / "step-00001000.2", {"a": 2})


def test_a_link_to_a_step_means_that_step(tmp_path):
    for a in (1, 2):  # the second is a further generation, to which `last` then leads
        distckpt.save(tmp_path / "step-00000005", {"a": a})
    distckpt.save(tmp_path / "last", {"a": 3})
    assert names(tmp_path) == ["step-00000005.2", "step-00000005.3"]
    assert not names(tmp_path / "last")
    into = {"a": 0}
    distckpt.load(tmp_path / "last", into)
    assert into["a"] == 3


def test_nothing_is_saved_inside_a_checkpoint(tmp_path):
    distckpt.save(tmp_path / "run" / "step-00000005", {"a": 1})
    (tmp_path / "run" / "step-00000005").rename(tmp_path / "best")
    with pytest.raises(RunConflict, match="give its parent"):
        distckpt.save(tmp_path / "best", {"a": 2})
    assert not names(tmp_path / "best")


def test_what_is_no_path_of_a_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for door in (lambda path: distckpt.save(path, {"a": 1}), lambda path: distckpt.load(path, {"a": 1})):
        with pytest.raises(Unsupported, match="hdfs://host/run: not a URI of file://"):
            door("hdfs://host/run")
    with pytest.raises(Unsupported, match="the path comes first"):
        distckpt.save({"a": 1}, "path")
    assert not any(tmp_path.iterdir())


def test_saving_again_replaces_and_keeps_the_two_newest(tmp_path):
    for a in range(5):
        distckpt.save(tmp_path, {"a": a})
    assert names(tmp_path) == ["step-00000000.4", "step-00000000.5"]
    into = {"a": None}
    distckpt.load(tmp_path, into)
    assert into["a"] == 4


def damage(path):
    file = next(path.glob("rank-*"))
    data = bytearray(file.read_bytes())
    data[4096] ^= 1
    file.write_bytes(data)


def test_a_damaged_generation_falls_back_to_the_one_before(tmp_path):
    for path in (tmp_path / "alone", tmp_path / "run" / "step-00000007"):
        for a in range(2):
            distckpt.save(path, {"a": torch.tensor([a])})
    for path, broken in (
        (tmp_path / "alone", "alone/step-00000000.2"),
        (tmp_path / "run" / "step-00000007", "run/step-00000007.2"),
    ):
        damage(tmp_path / broken)
        into = {"a": torch.tensor([9])}
        with pytest.warns(StateWarning, match="falling back"):
            report = distckpt.load(path, into)
        assert into["a"] == 0
        assert report.fell_back_from
        damage(tmp_path / broken.removesuffix(".2"))
        with pytest.warns(StateWarning), pytest.raises(Corrupt):
            distckpt.load(path, into)


def test_a_crash_at_any_point_of_a_save_leaves_the_one_before_or_the_new_one(tmp_path):
    """The n-th thing asked of the store fails, n = 1, 2, 3 ...; whatever the save said, a load gives a whole state."""
    old, new = {"a": torch.tensor([1]), "n": 1}, {"a": torch.tensor([2]), "n": 2}
    seen = set()
    for n in itertools.count(1):
        store = LocalStore(tmp_path / str(n))
        for _ in range(2):
            distckpt.save(store, old)
        fuse = Fuse()
        fuse.arm(n)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", StateWarning)  # pointers and older generations are not worth an error
                distckpt.save(FaultyStore(store, fuse), new)
            saved = True
        except StoreError:
            saved = False
        into = {"a": torch.tensor([0]), "n": 0}
        distckpt.load(store, into)
        assert same(into, new) or (not saved and same(into, old))
        seen.add((saved, into["n"]))
        if not fuse.blown:
            break
    assert {(True, 2), (False, 1)} <= seen


class Removing(MemoryStore):
    """Another save removes a generation after it was seen, just before it is read."""

    victim = None

    def content(self, key, limit):
        if self.victim and key.startswith(f"{self.victim}/"):
            for entry in self.list(self.victim):
                self.delete(f"{self.victim}/{entry.name}")
            self.victim = None
        return super().content(key, limit)


def test_a_generation_that_another_save_removes_is_passed_over():
    store = Removing()
    for a in range(3):
        distckpt.save(store, {"a": a})
    store.victim = "step-00000000.2"
    distckpt.save(store, {"a": 3})
    assert not store.victim
    store.victim = "step-00000000.4"
    distckpt.save(store, {"a": 4})
    store.victim = "step-00000000.5"
    into = {"a": None}
    distckpt.load(store, into)
    assert into["a"] == 2


def test_a_checkpointer_goes_on_from_what_was_saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    distckpt.save(tmp_path, {"model": model.state_dict()})
    other = torch.nn.Linear(3, 2)
    state = distckpt.TrainState(model=other, rng=False)
    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(state)
        assert torch.equal(other.weight, model.weight)
        checkpointer.save(1, state)
    into = {"model": torch.nn.Linear(3, 2).state_dict()}
    distckpt.load(tmp_path, into, only=("model",))
    assert torch.equal(into["model"]["weight"], model.weight)


def test_what_a_later_launch_left_behind_does_not_come_back(tmp_path):
    state = distckpt.TrainState(model=torch.nn.Linear(3, 2), rng=False)
    distckpt.save(tmp_path / "step-00000001", {"model": torch.nn.Linear(3, 2)})
    distckpt.save(tmp_path / "step-00000002", {"model": torch.nn.Linear(3, 2)})
    with distckpt.Checkpointer(tmp_path) as checkpointer:
        checkpointer.resume(state, step=1)
    assert distckpt.load(tmp_path, {"model": torch.nn.Linear(3, 2)}).step == 1
    distckpt.save(tmp_path / "step-00000002", {"model": torch.nn.Linear(3, 2)})
    assert distckpt.load(tmp_path, {"model": torch.nn.Linear(3, 2)}).step == 2


def test_what_another_tool_saved_is_loaded_too(tmp_path):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": torch.ones(2)}, "x": {"k": [1, 2]}}, checkpoint_id=tmp_path)
    into = {"model": {"w": torch.zeros(2)}, "x": {"k": 0}}
    distckpt.load(tmp_path, into)
    assert same(into, {"model": {"w": torch.ones(2)}, "x": {"k": [1, 2]}})


@pytest.mark.parametrize(
    "tree",
    [
        {"w": 0, "b": 1},
        {"model_state_dict": {"w": 0}, "optimizer_state_dict": "optimizer", "epoch": 3},
        {"model": {"w": 0}, "optimizer": "optimizer", "scheduler": {"last": 4}},
        {"app": {"model": {"w": 0}, "optimizer": "optimizer"}},
        {"model": {"module.w": 0, "module.b": 1}},
        {"generator": {"w": 0}, "net": {"w": 1}, "rng": {"seed": 5}},
    ],
)
def test_what_another_tool_saved_is_called_what_it_is_called_in_the_state_dict(tmp_path, tree):
    def filled(value, start):
        if isinstance(value, dict):
            return {k: filled(v, start) for k, v in value.items()}
        if value == "optimizer":
            states = {0: {"step": torch.tensor(start), "exp_avg": torch.full((2,), start)}}
            return {"state": states, "param_groups": [{"lr": start, "params": [0]}]}
        return torch.full((2,), start + value) if value in {0, 1} else [value, start]

    torch.save(filled(tree, 7.0), tmp_path / "saved.pt")
    into = filled(tree, 0.0)
    distckpt.load(tmp_path / "saved.pt", into)
    assert same(into, filled(tree, 7.0))


def test_a_model_s_own_state_dict_is_loaded_from_safetensors(tmp_path):
    save_file({"w": torch.ones(2), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    into = {"w": torch.zeros(2), "b": torch.zeros(1)}
    distckpt.load(tmp_path, into)
    assert same(into, {"w": torch.ones(2), "b": torch.ones(1)})


def test_what_another_tool_did_not_save_is_missing(tmp_path):
    """Of a TrainState's generators and counters that is told; a state dict asks for what is in it."""
    torch.save({"gen": {"w": torch.ones(2)}, "disc": {"w": torch.ones(2)}}, tmp_path / "saved.pt")
    into = {"generator": {"w": torch.zeros(2)}, "disc": {"w": torch.zeros(2)}}
    with pytest.raises(Mismatch, match=r"generator\.w: missing"):
        distckpt.load(tmp_path / "saved.pt", into)
    assert same(into, {"generator": {"w": torch.zeros(2)}, "disc": {"w": torch.zeros(2)}})
    with pytest.warns(StateWarning, match=r"it has no generator\.w(?s:.*)nothing takes its gen\.w"):
        report = distckpt.load(tmp_path / "saved.pt", into, strict=False)
    assert (report.missing, report.unexpected) == (["generator.w"], ["gen.w"])


# -- ranks -------------------------------------------------------------------------------------------------------


def test_what_differs_between_ranks_each_keeps(tmp_path):
    def tree(rank):
        return {"t": torch.full((2,), rank), "v": {"rank": rank}, "same": torch.ones(2), "n": 3}

    reports = on_threads(3, lambda comm: distckpt.save(tmp_path, tree(comm.rank), comm=comm))
    assert sorted(note.split()[0] for note in reports[0].notes) == ["object", "t"]

    def back(comm, **options):
        into = tree(7)
        distckpt.load(tmp_path, into, comm=comm, **options)
        return into

    for rank, into in enumerate(on_threads(3, back)):
        assert same(into, tree(rank))
    with pytest.raises(Mismatch, match=r"per_rank=\{'v': 'first'\}"):
        on_threads(2, back)
    with pytest.raises(Mismatch, match=r"per_rank=\{'t': 'first'\}"):
        on_threads(2, lambda comm: back(comm, per_rank={"v": "first"}))
    for into in on_threads(2, lambda comm: back(comm, per_rank={"v": "first", "t": "first"})):
        assert same(into, tree(0))


def test_a_value_that_one_rank_alone_has_comes_back_there(tmp_path):
    def tree(rank):
        return {f"only_{rank}": {"t": torch.full((2,), rank), "n": rank}, "all": 1}

    on_threads(2, lambda comm: distckpt.save(tmp_path, tree(comm.rank), comm=comm))

    def back(comm):
        into = {f"only_{comm.rank}": {"t": torch.zeros(2, dtype=torch.long), "n": 0}, "all": 0}
        distckpt.load(tmp_path, into, comm=comm)
        return into

    for rank, into in enumerate(on_threads(2, back)):
        assert same(into, tree(rank))


def test_pipeline_stages_each_have_a_part_of_one_optimizer(tmp_path):
    def tree(*layers, k=1.0):
        return {
            "model": {f"{n}.w": torch.full((2,), k * n) for n in layers},
            "optim": {
                "state": {f"{n}.w": {"m": torch.full((2,), k * n), "n": k} for n in layers},
                "param_groups": [{"lr": 0.1 * k, "params": [f"{n}.w" for n in layers]}],
            },
        }

    on_threads(2, lambda comm: distckpt.save(tmp_path, tree(comm.rank, comm.rank + 2), comm=comm))
    into = tree(3, 2, 1, 0, k=0.0)
    distckpt.load(tmp_path, into)
    assert same(into["optim"]["state"], tree(0, 1, 2, 3)["optim"]["state"])
    assert into["optim"]["param_groups"][0]["lr"] == 0.1

    def back(comm):
        into = tree(*[(0, 2, 3), (1,)][comm.rank], k=0.0)
        distckpt.load(tmp_path, into, comm=comm)
        return into

    assert same(on_threads(2, back)[1]["optim"]["state"], tree(1)["optim"]["state"])


def test_a_failure_on_one_rank_is_every_rank_s(tmp_path):
    def attempt(comm):
        with pytest.raises(Unsupported, match=r"rank 1: x: a builtins\.object"):
            distckpt.save(tmp_path, {"x": object() if comm.rank else 1}, comm=comm)

    on_threads(2, attempt)
    assert not names(tmp_path)
