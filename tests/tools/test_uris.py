"""The commands at URIs, as a user types them, against a real server: what they say and leave, and their exit codes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from distckpt import Checkpointer, Keep, Progress, TrainState
from distckpt.cli import main
from distckpt.run.history import History
from distckpt.run.lease import leased
from distckpt.store.base import write_all
from distckpt.store.object import ObjectStore
from distckpt.tools import preflight
from tests.store import servers


@pytest.fixture(scope="module")
def saved(bucket):
    """A run of four checkpoints: two epochs, a metric that is best in the second."""
    progress = Progress()
    state = TrainState(model=torch.nn.Linear(8, 8), progress=progress, rng=False)
    keep = Keep(last=9, best=("val_loss", "min", 1), per_epoch=True)
    with Checkpointer(f"{bucket.uri}/saved", keep=keep, wait=True) as c:
        for step, loss in enumerate([3.0, 1.0, 2.0, 2.5], 1):
            progress.epoch = step // 3
            c.save(step, state, {"val_loss": loss})
    return f"{bucket.uri}/saved"


@pytest.fixture
def run(saved, request):
    """A run like it for a test alone."""
    name = saved.removesuffix("saved") + request.node.name.replace("[", "-").replace("]", "")
    client, (lead, to) = servers.start("moto").client, (uri.split("/", 3)[2:] for uri in (saved, name))
    for found in client.list_objects_v2(Bucket=lead[0], Prefix=lead[1])["Contents"]:
        key = to[1] + found["Key"].removeprefix(lead[1])
        client.copy_object(Bucket=to[0], Key=key, CopySource={"Bucket": lead[0], "Key": found["Key"]})
    return name


def said(capsys, *arguments, code=0):
    """Text of a command that must end with this exit code; of a failure, its one line on stderr."""
    got = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert got == code, (got, out, err)
    assert "Traceback" not in out + err
    if code >= 3:
        assert err.count("\n") == 1
        assert not out
    return out + err


def told(capsys, *arguments, code=0):
    return json.loads(said(capsys, *arguments, "--json", code=code))


def steps(uri):
    return sorted(c.directory.step for c in History(ObjectStore(uri)).valid())


def test_ls_lists_what_there_is_and_what_each_is(run, capsys):
    write_all(ObjectStore(run), "step-00000009/rank-00000.aaaaaaaaaaaa.safetensors", b"half")
    rows = {row["path"]: row for row in told(capsys, "ls", run)}
    assert {path: row["status"] for path, row in rows.items()} == {
        "step-00000009": "incomplete",
        **{f"step-0000000{step}": "committed" for step in (4, 3, 2, 1)},
    }
    assert rows["step-00000002"]["names"] == ["best"]
    assert "step-00000004 (last)" in said(capsys, "ls", run + "/")


@pytest.mark.parametrize("path", ["", "/", "/last", "/step-00000004"])
def test_show_takes_a_run_a_step_or_a_pointer(saved, capsys, path):
    assert told(capsys, "show", saved + path)["step"] == 4
    assert told(capsys, "show", saved, "--step", 2)["metrics"] == {"val_loss": 1.0}


def test_verify_reads_every_byte_and_names_what_is_damaged(run, capsys):
    assert "whole" in said(capsys, "verify", run)
    store = ObjectStore(run)
    (file,) = (e for e in store.list("step-00000003") if e.name.startswith("rank-"))
    data = bytearray(file.size)
    store.read(f"step-00000003/{file.name}", 0, [memoryview(data)])
    data[4096] ^= 1
    write_all(store, f"step-00000003/{file.name}", bytes(data))
    text = said(capsys, "verify", run, "--all", code=1)
    assert "step-00000003: DAMAGED" in text
    assert "model." in text
    assert text.count("whole") == 3
    said(capsys, "verify", f"{run}/step-00000003", code=1)
    said(capsys, "verify", f"{run}/best")
    assert not leased(store)


def test_prune_removes_what_rules_let_go_of(run, capsys):
    assert told(capsys, "prune", run, "--last", 1)["goes"].keys() == {"step-00000001", "step-00000002"}
    assert steps(run) == [1, 2, 3, 4]
    said(capsys, "prune", run, "--last", 1, "--delete")
    assert steps(run) == [3, 4]
    assert [e.name for e in ObjectStore(run).list("") if e.size is None] == [
        "launches",
        "step-00000003",
        "step-00000004",
    ]


def test_gc_removes_what_killed_saves_left_once_nothing_changes_there(run, capsys):
    store = ObjectStore(run)
    store.delete("launches/0001.beat.json")
    write_all(store, "step-00000009/rank-00000.aaaaaaaaaaaa.safetensors", b"half")
    assert told(capsys, "gc", run)["bytes"] == 0
    time.sleep(1.1)
    assert "removed 4 B" in said(capsys, "gc", run, "--idle", "1 s", "--delete")
    assert store.list("step-00000009") == []
    assert steps(run) == [1, 2, 3, 4]


def test_repair_writes_pointers_and_registry_anew(run, capsys):
    store = ObjectStore(run)
    write_all(store, "last.json", b'{"checkpoint": "step-00000001", "step": 1}')
    for name in ("best.json", "meta.json"):
        store.delete(name)
    assert "last: step-00000004 (was step-00000001)" in said(capsys, "repair", run, "--best", "val_loss:min")
    assert told(capsys, "show", f"{run}/best")["step"] == 2


def test_a_pointer_leads_nowhere_but_to_a_step(run, capsys):
    write_all(ObjectStore(run), "last.json", b'{"checkpoint": "../saved/step-00000004", "step": 4}')
    assert "no run" in said(capsys, "show", f"{run}/last", code=3)


def test_watch_says_that_there_is_nothing_to_watch(saved, capsys):
    assert "no events.jsonl is kept at a URI" in said(capsys, "watch", saved, "--once", code=1)


def test_preflight_tries_what_a_run_does_and_leaves_nothing_there(run, bucket, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "_PROBE", 8 << 20)
    found = {c["check"]: c["state"] for c in told(capsys, "preflight", run)}
    names = ("write", "read", "list", "create", "clock", "rate", "delete", "save", "signals")
    assert found == dict.fromkeys(names, "ok")
    yet = f"{bucket.uri}/yet"
    assert "fit" in said(capsys, "preflight", yet)
    keys = [o["Key"] for o in servers.start("moto").client.list_objects_v2(Bucket=yet.split("/")[2])["Contents"]]
    assert not [key for key in keys if "probe" in key or "yet" in key]


@pytest.mark.parametrize("name", [p for p in servers.params if p != "moto"])
def test_preflight_tells_whether_the_server_keeps_conditions(name, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "_PROBE", 8 << 20)
    bucket = servers.start(name).bucket()
    for variable, value in bucket.environment.items():
        monkeypatch.setenv(variable, value)
    found = {c["check"]: c["state"] for c in told(capsys, "preflight", bucket.uri)}
    assert found["create"] == ("warn" if name in {"rclone", "swift"} else "ok")


# -- what goes wrong ---------------------------------------------------------------------------------------------------

LOOKING = [["ls"], ["show"], ["verify"], ["verify", "--all"], ["prune", "--last", "1"], ["gc"], ["repair"]]


@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
def test_where_there_is_nothing_it_says_so_in_one_line(command, saved, bucket, capsys):
    name, *more = command
    assert "there is nothing" in said(capsys, name, f"{bucket.uri}/nothing", *more, code=3)
    assert "there is nothing" in said(capsys, name, f"{bucket.uri}/nothing/last", *more, code=3)
    assert "there is no such bucket" in said(capsys, name, "s3://no-such-bucket/run", *more, code=4)
    assert "names no bucket" in said(capsys, name, "s3://", *more, code=1)
    assert "not a URI of file://, " in said(capsys, name, "hdfs://host/run", *more, code=1)
    if name not in {"show", "verify"} or more:
        assert "give its parent" in said(capsys, name, f"{saved}/last", *more, code=3)
    else:
        assert "does not exist" in said(capsys, name, f"{saved}/step-00000077", code=3)
        assert "no checkpoint of step 77" in said(capsys, name, saved, "--step", 77, code=3)
        assert "is not step 3" in said(capsys, name, f"{saved}/last", "--step", 3, code=3)


def test_preflight_fails_where_there_is_no_bucket(bucket, capsys):
    text = said(capsys, "preflight", "s3://no-such-bucket/run", code=1)
    assert "there is no such bucket" in text
    assert "not fit" in text


def test_wrong_credentials_are_one_line(capsys, monkeypatch):
    bucket = servers.start("azurite").bucket()
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    assert "there is nothing" in said(capsys, "ls", bucket.uri, code=3)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
    assert "check the credentials" in said(capsys, "ls", bucket.uri, code=4)
    assert "check the credentials" in said(capsys, "preflight", bucket.uri, code=1)


def test_a_file_uri_is_its_path(saved, tmp_path, capsys):
    state = TrainState(model=torch.nn.Linear(8, 8), rng=False)
    with Checkpointer(f"file://{tmp_path}/run", wait=True) as c:
        c.save(1, state)
    for uri in (f"file://{tmp_path}/run", f"file://{tmp_path}/run/last"):
        assert told(capsys, "show", uri)["step"] == 1
    assert "committed" in said(capsys, "watch", f"file://{tmp_path}/run", "--once")
    assert "three slashes" in said(capsys, "ls", "file://host/run", code=1)


def test_the_runs_below_a_prefix_are_listed(run, capsys):
    above, _, name = run.rpartition("/")
    rows = {row["run"]: row for row in told(capsys, "ls", above)}
    assert rows[name]["state"] == "ended"
    assert (rows[name]["step"], rows[name]["checkpoints"]) == (4, 4)


def test_a_run_at_a_uri_is_reported_by_what_its_commits_tell(run, capsys, tmp_path):
    assert told(capsys, "report", run, "-o", tmp_path / "r.html")["checkpoints"] == 4
    text = (tmp_path / "r.html").read_text()
    assert "keeps no events" in text
    assert text.count('class="bar"') == 2 * 4  # sizes, for a wide screen and a narrow one
    assert "val_loss" in text


def test_one_tensor_s_statistics(run, capsys):
    assert told(capsys, "show", run, "--tensor", "model.weight")["elements"] == 64


def test_quick_looks_at_sizes_and_headers(run, capsys):
    assert "sizes and headers are whole" in said(capsys, "verify", run, "--quick")
    key = next(e.name for e in ObjectStore(run).list("step-00000004") if e.name.startswith("rank-"))
    write_all(ObjectStore(run), f"step-00000004/{key}", b"short")
    assert "model.bias, model.weight" in said(capsys, "verify", run, "--quick", code=1)
