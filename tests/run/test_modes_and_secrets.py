"""Who may read what a run leaves behind, and that no credential stands in it."""

from __future__ import annotations

import os
import stat

import pytest
import torch

from distckpt import After, Checkpointer, Keep, TrainState
from distckpt.cli import main as cli
from distckpt.errors import StoreError
from distckpt.store.object import ObjectStore
from tests.store import servers


def _trained(root, steps, **options):
    """A launch that saves these steps by the writer process, with all that may follow a save."""
    state = TrainState(model=torch.nn.Linear(4, 4), rng=False)
    with Checkpointer(root, keep=Keep(last=2, best=("loss", "min", 1)), timeout=30, **options) as c:
        c.resume(state)
        for step in steps:
            c.save(step, state, {"loss": 1 / step})


@pytest.mark.parametrize(("umask", "directory", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_the_umask_decides_about_every_file_and_directory(tmp_path, umask, directory, file):
    root = tmp_path / "run"
    before = os.umask(umask)
    try:
        _trained(root, [1, 2, 3, 4], after_commit=[After(("true",))])
        assert cli(["export", str(root), "-o", str(tmp_path / "out" / "model.safetensors")]) == 0
        assert cli(["reshard", str(root), str(tmp_path / "dcp"), "--to", "dcp"]) == 0
    finally:
        os.umask(before)
    found = {p: stat.S_IMODE(p.lstat().st_mode) for p in (root, *tmp_path.rglob("*")) if not p.is_symlink()}
    assert {p.name for p in found} >= {
        "last.json",
        "meta.json",
        "events.jsonl",
        "commit.json",
        "0001.json",
        ".metadata",
    }
    wrong = {str(p): oct(mode) for p, mode in found.items() if mode != (directory if p.is_dir() else file)}
    assert not wrong


def _logs(capfd, caplog):
    out, err = capfd.readouterr()
    return f"{out}\n{err}\n{caplog.text}"


def test_credentials_stand_in_no_file_object_log_or_message(tmp_path, monkeypatch, capfd, caplog, recwarn):
    found = servers.start("moto").bucket()
    secret, key = "s3cr3t-of-the-bucket", "AKIA0OF0THE0BUCKET"
    options = found.options | {"secret_access_key": secret, "access_key_id": key}
    for name, value in found._replace(options=options).environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t0k3n-of-the-session")
    _trained(found.uri, [1, 2, 3], local=tmp_path / "near", after_commit=[After(("env",))])
    _trained(ObjectStore(f"{found.uri}/given", options), [1, 2])
    for command in (["ls", found.uri], ["show", found.uri], ["verify", found.uri], ["report", found.uri, "-o"]):
        to = [str(tmp_path / "report.html")] if command[-1] == "-o" else []
        assert cli([*command, *to]) == 0
    told = [_logs(capfd, caplog), *(str(w.message) for w in recwarn)]
    down = ObjectStore(found.uri, options | {"endpoint": f"http://127.0.0.1:{servers.free_port()}"}, timeout=0.5)
    with pytest.raises(StoreError) as caught:
        down.list("")
    told += [str(caught.value), repr(caught.value.__cause__), repr(down)]
    client = servers.client(**options)
    bucket = found.uri.split("/")[2]
    keys = [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert any(name.endswith("commit.json") for name in keys)
    content = {name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in keys}
    content |= {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(name.endswith("events.jsonl") for name in content)
    content |= {f"message {number}": text.encode() for number, text in enumerate(told)}
    for name, data in content.items():
        for word in (secret, key, "t0k3n-of-the-session"):
            assert word.encode() not in data, name
