"""Frozen weights are stored once: what a save leaves out, who refers to it, and that nothing is lost by it."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch

from distckpt import Checkpointer, Keep, TrainState
from distckpt.cli import main as cli
from distckpt.errors import Corrupt
from distckpt.format.box import Box
from distckpt.format.layout import StepDir
from distckpt.run.history import History
from distckpt.run.lease import lease
from distckpt.run.replicate import _let_go
from distckpt.run.retention import remove_all
from distckpt.run.source import open_source
from distckpt.run.sweep import leftovers
from distckpt.saving import save as saving
from distckpt.store.local import LocalStore
from distckpt.tools.copy import copy
from tests import ranks

WIDTH = 128


class Tuning:
    """A frozen layer, and a small one that is trained."""

    def __init__(self, seed=0, *, frozen=True):
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 2))
        self.base = self.model[0].requires_grad_(not frozen)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad])
        self.state = TrainState(model=self.model, optimizer=self.optimizer)

    def step(self):
        self.model(torch.randn(4, WIDTH)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def content(self):
        moments = [v for state in self.optimizer.state.values() for _, v in sorted(state.items())]
        return [t.detach().clone() for t in (*self.model.parameters(), *moments)]


def train(root, steps, tuning=None, *, wait=True, **options):
    """Train and save after each of these steps, in a launch of its own."""
    tuning = tuning or Tuning()
    with Checkpointer(root, timeout=30, **options) as c:
        c.resume(tuning.state)
        for step in steps:
            tuning.step()
            c.save(step, tuning.state, wait=wait)
    return tuning


def manifest(root, step):
    return open_source(root, step=step).manifest


def owners(root, step):
    """Steps whose files a checkpoint names, besides its own."""
    return {StepDir.parse(f.name.partition("/")[0]).step for f in manifest(root, step).files if "/" in f.name}


def partition_of(root, step, fqn):
    info = manifest(root, step).tensors[fqn]
    return list(info.partition.overlapping(Box.whole(info.shape)))


def own_bytes(root, step):
    return sum(f.size for f in manifest(root, step).files if "/" not in f.name)


def steps(root):
    return sorted({c.directory.step for c in History(LocalStore(root)).valid()})


def resumed(root, **options):
    tuning = Tuning(seed=1)
    with Checkpointer(root, timeout=30, **options) as c:
        report = c.resume(tuning.state)
    return tuning.content(), report


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_second_checkpoint_costs_what_is_trained_and_loads_bit_for_bit(tmp_path):
    first = train(tmp_path, [1, 2, 3])
    assert [owners(tmp_path, step) for step in (1, 2, 3)] == [set(), {1}, {1}]
    frozen = sum(t.nbytes for t in first.base.parameters())
    assert own_bytes(tmp_path, 2) < own_bytes(tmp_path, 1) - 0.95 * frozen
    found, report = resumed(tmp_path)
    assert report.step == 3
    assert same(found, first.content())
    assert cli(["verify", str(tmp_path), "--all"]) == 0


def test_saves_that_are_not_waited_for_share_what_is_committed_by_then(tmp_path):
    tuning = Tuning()
    with Checkpointer(tmp_path, timeout=30) as c:
        c.resume(tuning.state)
        for step in range(1, 6):
            tuning.step()
            pending = c.save(step, tuning.state)
            if step in {1, 4}:
                pending.wait()
    assert owners(tmp_path, 2) == {1}
    assert owners(tmp_path, 5)
    assert same(resumed(tmp_path)[0], tuning.content())


@pytest.mark.parametrize("empty", [False, True])
def test_a_launch_goes_on_with_what_it_resumed_from(tmp_path, empty):
    def tuning_of(seed):
        tuning = Tuning(seed)
        if empty:  # a frozen parameter without elements, which no file has
            tuning.base.register_parameter("none", torch.nn.Parameter(torch.zeros(0, 3), requires_grad=False))
        return tuning

    train(tmp_path, [1, 2], tuning_of(0))
    tuning = train(tmp_path, [3, 4], tuning_of(1))
    assert owners(tmp_path, 3) == owners(tmp_path, 4) == {1}
    if not empty:
        assert same(resumed(tmp_path)[0], tuning.content())


@pytest.mark.parametrize("how", ["data", "replaced", "thawed", "frozen more"])
def test_what_has_changed_is_written_anew_and_shared_from_then_on(tmp_path, how):
    tuning = Tuning()
    with Checkpointer(tmp_path, timeout=30, wait=True) as c:
        c.resume(tuning.state)
        c.save(1, tuning.state)
        if how == "data":
            tuning.base.weight.data[WIDTH - 1, WIDTH - 1] += 1  # which the tensor's version does not tell
        elif how == "replaced":
            tuning.base.weight = torch.nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)
        elif how == "thawed":
            tuning.base.requires_grad_(True)
        else:
            tuning.model[1].requires_grad_(False)
        c.save(2, tuning.state)
        c.save(3, tuning.state)
        assert owners(tmp_path, 2) == set()
        assert owners(tmp_path, 3) == (set() if how == "thawed" else {2})
    assert same(resumed(tmp_path)[0][:4], tuning.content()[:4])


def test_a_part_of_a_large_state_is_not_shared_for_all_of_an_old_file_would_stay(tmp_path):
    tuning = Tuning(frozen=False)
    tuning.model[1].requires_grad_(False)
    train(tmp_path, [1, 2], tuning)
    assert owners(tmp_path, 2) == set()


def test_what_was_loaded_in_part_or_from_elsewhere_is_not_taken_for_the_runs(tmp_path):
    train(tmp_path / "run", [1])
    tuning = Tuning(seed=2)
    with Checkpointer(tmp_path / "run", timeout=30, wait=True) as c:
        c.resume(tuning.state, only=("optim",))
        c.save(2, tuning.state)
    assert owners(tmp_path / "run", 2) == set()
    assert same(resumed(tmp_path / "run")[0], tuning.content())
    other = Tuning(seed=3)
    with Checkpointer(tmp_path / "other", timeout=30, wait=True) as c:
        c.load(other.state, source=tmp_path / "run")
        c.save(1, other.state)
    assert owners(tmp_path / "other", 1) == set()


def test_who_is_referred_to_stays_and_goes_with_the_last_that_refers_to_it(tmp_path):
    tuning = train(tmp_path, range(1, 6), keep=Keep(last=2))
    assert steps(tmp_path) == [1, 4, 5]
    assert leftovers(History(LocalStore(tmp_path)), alone=True) == []
    assert cli(["prune", str(tmp_path), "--last", "1", "--delete"]) == 0
    assert steps(tmp_path) == [1, 4, 5]  # never the two newest
    with torch.no_grad():
        tuning.base.weight.zero_()
    with Checkpointer(tmp_path, timeout=30, keep=Keep(last=2), wait=True) as c:
        c.resume(Tuning(seed=1).state)
        for step in (6, 7, 8):
            tuning.step()
            c.save(step, tuning.state)
    assert steps(tmp_path) == [6, 7, 8]
    assert same(resumed(tmp_path)[0], tuning.content())


def test_what_a_reader_got_hold_of_in_time_keeps_what_it_refers_to(tmp_path):
    train(tmp_path, [1, 2])
    with lease(LocalStore(tmp_path), StepDir(2)):  # since it was decided that both are to go
        assert remove_all(History(LocalStore(tmp_path)), [StepDir(1), StepDir(2)], [1]) == ([], [])
    assert steps(tmp_path) == [1, 2]


def test_a_rewind_shares_with_what_counts(tmp_path):
    train(tmp_path, [1])
    tuning = Tuning(seed=4)
    with Checkpointer(tmp_path, timeout=30, wait=True) as c:
        c.resume(tuning.state)
        with torch.no_grad():
            tuning.base.weight.zero_()
        c.save(5, tuning.state)
        c.save(6, tuning.state)
        c.resume(tuning.state, step=1)
        c.save(2, tuning.state)
    assert owners(tmp_path, 2) == {1}
    assert steps(tmp_path) == [1, 2]


def test_damage_to_what_is_shared_is_named_and_nothing_is_resumed_from_it(tmp_path, capsys):
    train(tmp_path, [1, 2, 3])
    (file,) = (tmp_path / "step-00000001").glob("rank-*")
    data = bytearray(file.read_bytes())
    data[9000] ^= 1
    file.write_bytes(data)
    assert cli(["verify", str(tmp_path)]) == 1
    assert "model.0.weight" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Corrupt, match="step-00000001"), Checkpointer(tmp_path, timeout=30) as c:
            c.resume(Tuning().state)


def test_copies_are_whole_without_the_checkpoint_that_was_referred_to(tmp_path):
    tuning = train(tmp_path / "run", [1, 2])
    copy(tmp_path / "run", tmp_path / "copy")
    assert same(resumed(tmp_path / "copy")[0], tuning.content())
    assert owners(tmp_path / "copy", 2) == set()
    again = train(tmp_path / "copy", [3], Tuning(seed=1))
    assert owners(tmp_path / "copy", 3) == {2}
    assert same(resumed(tmp_path / "copy")[0], again.content())


def test_tiers_send_what_is_shared_once_and_a_new_machine_goes_on_from_the_root(tmp_path):
    tuning = train(tmp_path / "root", [1, 2, 3], local=tmp_path / "near", wait=False)
    assert owners(tmp_path / "root", 3)
    new = train(tmp_path / "root", [4, 5], Tuning(seed=1), local=tmp_path / "new", wait=False)
    assert owners(tmp_path / "new", 5)
    assert own_bytes(tmp_path / "root", 5) < 40_000
    assert same(resumed(tmp_path / "root")[0], new.content())
    assert same(new.content()[:2], tuning.content()[:2])


def test_what_was_resumed_may_go_while_what_it_named_is_named_on(tmp_path):
    train(tmp_path, [1, 2])
    tuning = train(tmp_path, range(3, 8), Tuning(seed=1), keep=Keep(last=2))
    assert steps(tmp_path) == [1, 6, 7]
    assert owners(tmp_path, 6) == owners(tmp_path, 7) == {1}
    assert same(resumed(tmp_path)[0], tuning.content())


def test_saves_ask_nothing_of_a_root_behind_a_local_directory(tmp_path):
    root, away, near = tmp_path / "root", tmp_path / "away", tmp_path / "near"
    train(root, [1, 2], local=tmp_path / "another machine's")
    tuning = Tuning(seed=1)
    with warnings.catch_warnings(), Checkpointer(root, local=near, timeout=30, wait=True) as c:
        warnings.simplefilter("ignore")  # the root is behind
        c.resume(tuning.state)
        root.rename(away)
        root.touch()  # whatever is asked of it fails
        tuning.step()
        c.save(3, tuning.state)
        root.unlink()
        away.rename(root)
        c.save(4, tuning.state)
    assert owners(near, 3) == owners(near, 4) == owners(root, 4) == {1}
    assert same(resumed(root)[0], tuning.content())


def test_files_that_were_sent_without_their_commit_are_not_let_go_while_they_are_named(tmp_path):
    tuning = train(tmp_path, [1, 2, 3])
    for step in (1, 2):
        (tmp_path / str(StepDir(step)) / "commit.json").unlink()  # killed, and its disk lost, before it sent them
    _let_go(History(LocalStore(tmp_path)), [StepDir(1), StepDir(2)])
    assert not (tmp_path / str(StepDir(2))).exists()
    assert same(resumed(tmp_path)[0], tuning.content())


def test_what_all_ranks_had_acked_is_committed_by_the_next_launch(tmp_path, monkeypatch):
    tuning = train(tmp_path, [1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving, "commit_when_acked", _interrupt)
        with Checkpointer(tmp_path, timeout=30, wait=True) as c:
            c.resume(tuning.state)
            tuning.step()
            c.save(2, tuning.state)
    assert steps(tmp_path) == [1]
    found, report = resumed(tmp_path)
    assert report.step == 2
    assert owners(tmp_path, 2) == {1}
    assert same(found, tuning.content())


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def _sharded(root, world, steps):
    """FSDP2 over a frozen layer and a trained one; what was resumed, and what is saved in the end."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 7))
    model[0].requires_grad_(False)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    state = TrainState(model=model, optimizer=optimizer)
    with Checkpointer(root, timeout=30) as c:
        c.resume(state)
        before = [p.full_tensor().clone() for p in model.parameters()]
        for step in steps:
            model(torch.ones(2, WIDTH) * step).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            c.save(step, state).wait()
    return before, [p.full_tensor() for p in model.parameters()]


def test_shards_of_any_number_of_ranks_share_what_others_wrote(tmp_path):
    saved = ranks.run(2, _sharded, str(tmp_path), 2, [1, 2])[0][1]
    assert owners(tmp_path, 2) == {1}
    before, after = ranks.run(3, _sharded, str(tmp_path), 3, [3, 4])[2]
    assert same(before, saved)
    assert owners(tmp_path, 4) == {1}
    assert len(manifest(tmp_path, 4).files) == 3 + 2
    written = {r for t in ("0.weight", "0.bias") for r, _ in partition_of(tmp_path, 4, f"model.{t}")}
    assert written == {3, 4}  # the files of the two ranks of step 1
    plain = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 7))
    with Checkpointer(tmp_path, timeout=30) as c:
        c.load(TrainState(model=plain), only=("model",))
    assert same(plain.parameters(), after)


def _stage(root, steps, *, frozen, change=False):
    """One layer a rank, as a pipeline has it; frozen: of which ranks, before and after the resume."""
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    model = torch.nn.ModuleDict({f"stage{rank}": torch.nn.Linear(WIDTH, WIDTH)})
    model.requires_grad_(rank not in frozen[0])
    state = TrainState(model=model)
    with Checkpointer(root, timeout=30, wait=True) as c:
        c.resume(state)
        if change and rank not in frozen[0]:
            with torch.no_grad():
                model[f"stage{rank}"].weight += 1
        model.requires_grad_(rank not in frozen[1])
        for step in steps:
            c.save(step, state)
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        c.load(state)
    return same(before, model.parameters())


def test_a_rank_that_freezes_its_first_parameters_after_a_resume_has_them_saved(tmp_path):
    def run(*steps, **how):
        assert ranks.run(2, partial(_stage, str(tmp_path), steps, **how)) == [True, True]

    run(1, 2, frozen=({1}, {1}))
    run(3, frozen=({1}, {1}))  # rank 0 has none of them, and it is the one that chooses
    assert owners(tmp_path, 2) == owners(tmp_path, 3) == {1}
    run(4, frozen=({1}, {0, 1}), change=True)
    assert owners(tmp_path, 4) == set()
