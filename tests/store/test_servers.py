"""The servers of the tests start, take what is written, and leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from tests.store import servers

STARTER = """
import sys
from tests.store import servers
bucket = servers.start(sys.argv[1]).bucket()
print(servers.start(sys.argv[1]).folder, *(d.pid for d in servers.start(sys.argv[1])._daemons), flush=True)
sys.stdin.read()
"""


def runs(pid):
    """Whether a process is there, and no zombie that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", servers.params)
def test_every_bucket_is_new_and_takes_what_is_written(name):
    server = servers.start(name)
    assert server is servers.start(name)
    for bucket in (server.bucket(), server.bucket()):
        store = from_url(bucket.uri, config=bucket.options, client_options={"allow_http": True})
        assert obstore.list(store).collect() == []
        obstore.put(store, "a/b", b"123")
        assert [found["path"] for found in obstore.list(store).collect()] == ["a/b"]
        assert bytes(obstore.get(store, "a/b").bytes()) == b"123"


@pytest.mark.parametrize("kill", [False, True])
def test_a_server_ends_with_the_process_that_started_it(kill):
    servers.start("moto")  # or it skips
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", STARTER, "moto"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True
    )
    with child:
        folder, *pids = child.stdout.readline().split()
        if kill:
            child.kill()
        else:
            child.stdin.close()
        child.wait(30)
    deadline = time.monotonic() + 30
    while any(map(runs, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert os.path.exists(folder) == kill
    if kill:
        Path(folder, "0.log").unlink()
        Path(folder).rmdir()


def test_a_missing_server_skips_and_where_ci_runs_fails(monkeypatch):
    monkeypatch.setattr(servers, "_PATH", "/none")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="moto_server"):
        servers.start("moto")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="moto_server"):
        servers.start("moto")
    with pytest.raises(pytest.skip.Exception, match="radosgw"):
        servers.start("ceph")
