"""A real object store to measure against, with a proxy before it, in a process that is no rank's child.

So what it costs is not counted as a rank's, and it ends, and removes its folders, when the rank that asked for it is
gone. Started as `python -m benchmarks.object_server NAME`, it answers each line of JSON on its input with one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.ranks import World

SERVERS = ("ceph", "moto")
"""Those that tests/store/servers.py starts and this measures, the fastest first."""


class Absent(Exception):
    """The server is not installed, or does not start."""


@dataclass(frozen=True, slots=True)
class Served:
    """A bucket, as every rank sees it. proxy: the endpoint by which requests are slowed down, and counted."""

    name: str
    uri: str
    options: dict[str, str]
    proxy: str
    _process: subprocess.Popen[bytes] | None

    def ask(self, what: str, **values: Any) -> Any:
        """Have the server's process do something, on rank 0 (None on the others). See `_Served`."""
        return _ask(self._process, what, values) if self._process else None

    @property
    def slow(self) -> dict[str, str]:
        """Options by way of the proxy."""
        return self.options | {"endpoint": self.proxy}

    @contextmanager
    def environment(self) -> Iterator[None]:
        """The options where Amazon's own tools look for them."""
        names = {"endpoint": "AWS_ENDPOINT_URL", "region": "AWS_REGION"}
        mine = {names.get(option, f"AWS_{option.upper()}"): value for option, value in self.options.items()}
        before = {name: os.environ.get(name) for name in mine}
        os.environ.update(mine)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def served(world: World, name: str) -> Iterator[Served]:
    """A server with an empty bucket, while the block lasts. Collective; Absent on every rank where there is none."""
    process, said = None, None
    if world.rank == 0:
        command = [sys.executable, "-m", "benchmarks.object_server", name]
        root = Path(__file__).parents[1]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
        process.wait()  # it has forked itself
        said = _ask(process, "start", {})
    said = world.gather(said)[0]
    try:
        if "absent" in said:
            raise Absent(said["absent"])
        yield Served(name, said["uri"], said["options"], said["proxy"], process)
        world.barrier()
    finally:
        if process and process.stdin and process.stdout:
            process.stdin.close()
            process.stdout.read()  # until it has ended


def _ask(process: subprocess.Popen[bytes] | None, what: str, values: dict[str, Any]) -> Any:
    assert process
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps({"do": what, **values}).encode() + b"\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline() or '{"absent": "it ended"}')


class _Served:
    """What the process does: each method is a message."""

    def __init__(self, server: Any, bucket: Any, proxy: Any) -> None:
        self._server, self._bucket, self._proxy = server, bucket, proxy

    def start(self) -> dict[str, Any]:
        """Say where the bucket is."""
        return {"uri": self._bucket.uri, "options": self._bucket.options, "proxy": self._proxy.endpoint}

    def slow(self, latency: float = 0.0, bandwidth: float | None = None) -> None:
        """Add seconds to each request by way of the proxy, let so many bytes a second through each way."""
        self._proxy.latency = latency
        self._proxy.bandwidth(bandwidth)

    def requests(self) -> list[str]:
        """Lines of the requests by way of the proxy since this was last asked."""
        lines = [request.line for request in self._proxy.requests]
        self._proxy.clear()
        return lines

    def clear(self) -> None:
        """Remove everything from the bucket, and have the server give its room back."""
        from obstore.store import from_url

        root = self._bucket.uri.rpartition("/")[0]
        store: Any = from_url(root, config=self._bucket.options, client_options={"allow_http": True})
        for batch in store.list():
            store.delete([each["path"] for each in batch])
        if self._server.name == "ceph":
            configuration = str(self._server.folder / "ceph.conf")
            self._server.run("radosgw-admin", "-c", configuration, "-n", "client.rgw", "gc", "process", "--include-all")


def _main(name: str) -> None:
    """Serve until the input ends."""
    if os.fork():
        os._exit(0)
    os.setsid()
    try:
        server, bucket = _started(name)
    except Absent as e:
        sys.stdin.readline()
        print(json.dumps({"absent": str(e)}), flush=True)
        return
    try:
        with import_module("tests.store.faulty").Faulty(bucket.address) as proxy:
            one = _Served(server, bucket, proxy)
            for line in sys.stdin:
                said = json.loads(line)
                print(json.dumps(getattr(one, said.pop("do"))(**said)), flush=True)
    finally:
        server.stop()
        shutil.rmtree(server.folder, ignore_errors=True)


def _started(name: str) -> tuple[Any, Any]:
    try:
        import pytest

        servers = import_module("tests.store.servers")
    except ImportError as e:
        raise Absent(f"{name}: the tests' servers need pytest ({e})") from e
    try:
        server = servers.start(name)
    except (AssertionError, pytest.skip.Exception, pytest.fail.Exception) as e:
        raise Absent(f"{name}: {e}") from e
    return server, server.bucket()


if __name__ == "__main__":
    _main(sys.argv[1])
