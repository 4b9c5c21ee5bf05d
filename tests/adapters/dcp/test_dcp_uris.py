"""The drop-in at URIs, against a real server, driven by torch's own dcp.save, dcp.async_save and dcp.load."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import distckpt
from distckpt.adapters.dcp import StorageReader, StorageWriter
from distckpt.cli import main
from distckpt.store.object import ObjectStore
from tests import layouts, ranks
from tests.adapters.dcp.test_dcp import flat, load, save, values
from tests.adapters.dcp.test_dcp_ranks import _spawnable
from tests.products.test_state_dicts import build, state_dict
from tests.store import servers

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.fixture
def bucket(monkeypatch):
    found = servers.start("moto").bucket()
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return found


def directories(uri):
    return [entry.name for entry in ObjectStore(uri).list("") if entry.size is None]


def test_values_of_every_kind_come_back_through_dcp_and_through_ours(bucket, capsys):
    save(values(5), bucket.uri)
    by_dcp, by_ours = values(0), values(0)
    load(by_dcp, bucket.uri)
    distckpt.load(bucket.uri, by_ours)
    assert flat(by_dcp) == flat(by_ours) == flat(values(5))
    assert main(["verify", f"{bucket.uri}/last"]) == 0


def test_a_uri_means_what_it_means_to_distckpt_save(bucket):
    for step in (1000, 2000):
        save({"a": step}, f"{bucket.uri}/step-{step:08d}")
    dcp.save({"a": 3}, checkpoint_id=f"{bucket.uri}/step-00003000", storage_writer=StorageWriter("memory://elsewhere"))
    assert directories(bucket.uri) == ["step-00001000", "step-00002000", "step-00003000"]
    into = {"a": 0}
    for name, wanted in (("", 3), ("/last", 3), ("/step-00001000", 1000)):
        load(into, bucket.uri + name)
        assert into["a"] == wanted
    writer = StorageWriter(f"{bucket.uri}/")
    assert pickle.loads(pickle.dumps(writer)).checkpoint_id == writer.checkpoint_id == bucket.uri


def test_of_a_step_that_is_saved_again_the_newest_and_the_one_before_stay(bucket):
    for value in range(4):
        save({"a": value}, bucket.uri)
    assert directories(bucket.uri) == ["step-00000000.3", "step-00000000.4"]


def test_what_is_not_there_is_told(bucket):
    with pytest.raises(CheckpointException, match="holds no committed checkpoint: there is nothing"):
        load({"a": 0}, bucket.uri)
    with pytest.raises(CheckpointException, match="there is no such bucket"):
        save({"a": 0}, "s3://no-such-bucket/run")


def _async(root, environment, kind):
    os.environ.update(environment)
    model, optimizer, state = build("fsdp2")
    layouts.fill(state.capture())
    if kind == AsyncCheckpointerType.PROCESS:
        _spawnable()
    writer = StorageWriter(root)
    for _ in range(2):
        future = dcp.async_save(state_dict(model, optimizer), storage_writer=writer, async_checkpointer_type=kind)
        future.result(60)
    layouts.zero(model, optimizer)
    layouts.make_moments(model, optimizer)
    dcp.load(into := state_dict(model, optimizer), storage_reader=StorageReader(root))
    distckpt.load(root, into)
    return layouts.wrong(state.capture())


@pytest.mark.full  # the same in a directory: test_dcp_ranks.py
@pytest.mark.parametrize("kind", AsyncCheckpointerType, ids=lambda kind: kind.value)
def test_ranks_save_asynchronously(kind, bucket):
    assert ranks.run(2, _async, bucket.uri, bucket.environment, kind) == [[], []]


def _killed(uri):
    from distckpt.adapters.dcp import writer

    writer.commit_when_acked = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    save({"w": torch.full((4,), 2.0)}, uri)


def test_a_save_that_was_killed_before_its_commit_is_none_and_the_next_one_is(bucket):
    save({"w": torch.full((4,), 1.0)}, bucket.uri)
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(bucket.uri,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert directories(bucket.uri) == ["step-00000000", "step-00000000.2"]
    into = {"w": torch.zeros(4)}
    load(into, bucket.uri)
    assert into["w"][0] == 1
    save({"w": torch.full((4,), 3.0)}, bucket.uri)
    load(into, bucket.uri)
    assert into["w"][0] == 3
    save({"w": torch.full((4,), 4.0)}, bucket.uri)
    assert directories(bucket.uri) == ["step-00000000.3", "step-00000000.4"], "what the killed one left is gone, too"
