"""Local directories that not all ranks share: a disk in each node, in front of one root."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings

import pytest
import torch
from torch import nn

from distckpt import Checkpointer, Keep, Local, TrainState
from distckpt.errors import DistckptError
from distckpt.run import pending
from distckpt.run.history import History
from distckpt.store.local import LocalStore
from tests import ranks
from tests.run import lives


class Training:
    """A small model, sharded over all ranks."""

    def __init__(self):
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
        for layer in self.model:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.state = TrainState(model=self.model, optimizer=self.optimizer)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.full((4, 48), 0.5)).square().sum().backward()
        self.optimizer.step()

    def content(self):
        moments = [v for state in self.optimizer.state.values() for _, v in sorted(state.items())]
        return [t.full_tensor().tolist() if hasattr(t, "full_tensor") else t.tolist() for t in moments] + [
            p.full_tensor().tolist() for p in self.model.parameters()
        ]


def train(far, nodes, steps):
    """Resume and save after each of these steps, on a rank of `nodes[rank]`: (step resumed, its content, the last's)."""
    training = Training()
    local = Local(nodes[torch.distributed.get_rank()], keep=Keep(last=2))
    c = Checkpointer(far, local=local, timeout=20)
    report = c.resume(training.state)
    loaded = training.content() if report else None
    for step in steps:
        training.step()
        c.save(step, training.state).wait()
    last = training.content()
    c.close()
    return report and report.step, loaded, last


def last_words(far, nodes, steps, path):
    """Train, note what was saved, and be killed before anything is sent."""
    training = Training()
    local = Local(nodes[torch.distributed.get_rank()], bandwidth=1000)
    c = Checkpointer(far, local=local, timeout=20)
    c.resume(training.state)
    for step in steps:
        training.step()
        c.save(step, training.state).wait()
    content = training.content()
    if torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(content))
    torch.distributed.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(far, nodes):
    """Save step 1, which is not sent, and be killed when all ranks but the last have saved step 2."""
    training = Training()
    rank = torch.distributed.get_rank()
    c = Checkpointer(far, local=Local(nodes[rank], bandwidth=1000), timeout=20)
    c.resume(training.state)
    c.save(1, training.state).wait()
    if rank == 3:
        c._saver._background.staged = lambda *_, **__: None
    c.save(2, training.state)
    lives.until(lambda: rank == 3 or list(nodes[rank].glob(f"step-00000002/ack-{rank:05d}.*")))
    torch.distributed.barrier()
    for pid in [*lives.writers([os.getpid()]), os.getpid()]:
        os.kill(pid, signal.SIGKILL)


def half_sent(far, nodes):
    """Save twice, where one node alone can send what it has."""
    training = Training()
    rank = torch.distributed.get_rank()
    with warnings.catch_warnings(), Checkpointer(far, local=nodes[rank], timeout=8) as c:
        warnings.simplefilter("ignore")
        if rank == 2:
            c._places.replication = lambda: None
        c.resume(training.state)
        for step in (1, 2):
            c.save(step, training.state).wait()
        lives.until(lambda: len(list(far.glob("step-00000002/ack-*"))) == 2)


def send_each(far, nodes):
    """Save, and do nothing until the root has it, again and again."""
    training = Training()
    with Checkpointer(far, local=nodes[torch.distributed.get_rank()], timeout=20) as c:
        c.resume(training.state)
        for step in (1, 2, 3):
            c.save(step, training.state)
            lives.until(lambda step=step: step in steps_at(far), 15)
            torch.distributed.barrier()


def fail_once(far, nodes):
    """Save, on rank 1 without memory the second time, and again."""
    training = Training()
    rank = torch.distributed.get_rank()
    with warnings.catch_warnings(), Checkpointer(far, local=nodes[rank], timeout=20) as c:
        warnings.simplefilter("error")
        c.resume(training.state)
        c.save(1, training.state).wait()
        stage = pending.stage
        if rank == 1:
            pending.stage = None
        saved = c.save(2, training.state)
        pending.stage = stage
        time.sleep(2)
        with pytest.raises(DistckptError, match="failed on rank 1"):
            saved.wait()
        c.save(3, training.state).wait()
        lives.until(lambda: 3 in steps_at(far), 15)


def run(world, far, nodes, steps):
    return ranks.run(world, train, far, nodes, steps, timeout=90)


def steps_at(root):
    return sorted({c.directory.step for c in History(LocalStore(root)).valid()})


@pytest.fixture
def far(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def nodes(tmp_path):
    return [tmp_path / "a", tmp_path / "a", tmp_path / "b", tmp_path / "b"]


def test_each_node_saves_on_its_own_and_the_root_gets_all_of_it(far, nodes):
    saved = run(4, far, nodes, [1, 2, 3])[0][2]
    assert steps_at(far)[-1] == 3
    assert json.loads((far / "last.json").read_text())["step"] == 3
    for node, numbers in ((nodes[0], {0, 1}), (nodes[2], {2, 3})):
        files = {int(f.name[5:10]) for f in (node / "step-00000003").glob("rank-*")}
        assert files == numbers
        assert steps_at(node)[-1] == 3
        assert not list(node.glob("step-*/ack-*"))
    assert not list(far.glob("step-*/ack-*"))
    for step, loaded, _ in run(4, far, nodes, []):
        assert (step, loaded) == (3, saved)


@pytest.mark.full
def test_a_node_that_is_replaced_reads_the_root_and_goes_on(far, nodes, tmp_path):
    saved = run(4, far, nodes, [1, 2])[0][2]
    shutil.rmtree(nodes[2])
    for step, loaded, _ in run(4, far, [*nodes[:2], tmp_path / "new", tmp_path / "new"], [3]):
        assert (step, loaded) == (2, saved)
    assert steps_at(far)[-1] == 3


@pytest.mark.full
def test_other_ranks_on_other_nodes_read_what_lies_elsewhere_from_the_root(far, nodes):
    saved = run(4, far, nodes, [1, 2])[0][2]
    for step, loaded, _ in run(3, far, [nodes[2], nodes[0], nodes[0]], [3]):
        assert (step, loaded) == (2, saved)
    assert steps_at(far)[-1] == 3


def test_what_all_nodes_have_saved_is_resumed_though_nothing_was_sent(far, nodes, tmp_path):
    said = tmp_path / "said.json"
    ranks.run(4, last_words, far, nodes, [1, 2], said, may_die=range(4), timeout=90)
    assert steps_at(far) == []
    for step, loaded, _ in run(4, far, nodes, []):
        assert (step, loaded) == (2, json.loads(said.read_text()))
    assert steps_at(far)[-1] == 2


@pytest.mark.full
def test_what_a_lost_node_had_saved_alone_does_not_count(far, nodes, tmp_path):
    before = run(4, far, nodes, [1])[0][2]
    ranks.run(4, last_words, far, nodes, [2], tmp_path / "said.json", may_die=range(4), timeout=90)
    time.sleep(0.2)
    shutil.rmtree(nodes[2])
    for step, loaded, _ in run(4, far, [*nodes[:2], tmp_path / "new", tmp_path / "new"], [2]):
        assert (step, loaded) == (1, before)
    assert steps_at(far) == [1, 2]


def test_each_save_is_sent_though_nothing_follows_it(far, nodes):
    ranks.run(4, send_each, far, nodes, timeout=90)


def test_a_save_that_a_rank_gave_up_stops_nothing_of_what_follows(far, nodes):
    ranks.run(4, fail_once, far, nodes, timeout=90)
    assert steps_at(far)[-1] == 3


@pytest.mark.full
def test_ranks_on_other_nodes_than_before_resume_what_was_whole_behind_a_save_that_was_not(far, nodes):
    ranks.run(4, die_half_way, far, nodes, may_die=range(4), timeout=90)
    shutil.rmtree(far / "step-00000002", ignore_errors=True)
    assert steps_at(far) == []
    for step, _, _ in run(4, far, nodes[::-1], [2]):
        assert step == 1
    assert steps_at(far) == [1, 2]


def test_a_directory_that_is_a_copy_of_another_nodes_is_a_node_of_its_own(far, nodes):
    saved = run(4, far, nodes, [1])[0][2]
    shutil.rmtree(nodes[2])
    shutil.copytree(nodes[0], nodes[2], symlinks=True)
    for step, loaded, _ in run(4, far, nodes, [2]):
        assert (step, loaded) == (1, saved)
    assert steps_at(far) == [1, 2]
    assert {int(f.name[5:10]) for f in nodes[2].glob("step-00000002/rank-*")} == {2, 3}


def test_what_one_node_could_not_send_is_resumed_whichever_rank_comes_to_be_there(far, nodes):
    ranks.run(4, half_sent, far, nodes, timeout=90)
    for step, _, _ in run(3, far, [nodes[2], nodes[0], nodes[0]], [3]):
        assert step == 2
    assert steps_at(far)[-2:] == [2, 3]
