"""Retention and pointers of a run at a URI, by the training process and by the writer's, against a real server."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from distckpt import Checkpointer, Keep
from distckpt.store.base import read_all
from distckpt.store.object import ObjectStore
from tests.run.test_retention import state
from tests.store import servers

LOSS = {10: 5.0, 20: 1.0, 30: 3.0, 40: 4.0, 50: 6.0}


@pytest.fixture
def uri(monkeypatch):
    bucket = servers.start("moto").bucket()
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    return bucket.uri


def said(uri, name):
    return json.loads(read_all(ObjectStore(uri), f"{name}.json", limit=1 << 20))


def directories(uri):
    return [e.name for e in ObjectStore(uri).list("") if e.name.startswith("step-")]


def _train(uri, wait, steps):
    with Checkpointer(uri, keep=Keep(last=2, best=("val_loss", "min", 1)), wait=wait) as c:
        for step in steps:
            saved = c.save(step, state(step), {"val_loss": LOSS[step]})
        if len(steps) < len(LOSS):
            saved.result(60)
            os.kill(os.getpid(), signal.SIGKILL)


def _check(uri):
    assert directories(uri) == ["step-00000020", "step-00000040", "step-00000050"]
    assert said(uri, "last") == {"checkpoint": "step-00000050", "step": 50}
    assert said(uri, "best") == {"checkpoint": "step-00000020", "step": 20}
    assert said(uri, "meta")["keep"] == {"last": 2, "best": ["val_loss", "min", 1]}
    assert [e["path"] for e in said(uri, "meta")["checkpoints"]] == directories(uri)[::-1]


@pytest.mark.parametrize("wait", [True, False])
def test_after_each_save_what_no_rule_keeps_goes_and_pointers_follow(uri, wait):
    _train(uri, wait, [*LOSS])
    _check(uri)
    with Checkpointer(uri) as c:
        assert c.resume(state()).step == 50


def test_a_launch_after_a_kill_keeps_what_the_one_before_did(uri):
    process = multiprocessing.get_context("spawn").Process(target=_train, args=(uri, False, [10, 20, 30, 40]))
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL
    with Checkpointer(uri, keep=Keep(last=2, best=("val_loss", "min", 1)), wait=True) as c:
        assert c.resume(state()).step == 40
        c.save(50, state(), {"val_loss": 6.0})
    _check(uri)
