"""Real object stores for tests: each starts with the first test that asks for it, and ends with this process.

`start("moto").bucket()` is an empty bucket: the URI and the options that an ObjectStore is made of. A server that is
not installed skips the test and says why; where CI runs, one of IN_CI that is missing is a failure.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import email.utils
import functools
import getpass
import hashlib
import hmac
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.store import confs

_TIMEOUT = 60
"""Seconds that a server's start, or a command of its, may take."""

_PATH = os.pathsep.join(
    [
        f"{sys.prefix}/bin",
        f"{sys.prefix}/node_modules/.bin",
        f"{sys.prefix}/swift/bin",
        os.environ.get("PATH", ""),
        "/usr/sbin",
        "/sbin",
    ]
)
"""`make venv` installs moto and Azurite, `make servers` the others; what lies in PATH serves as well."""

_KEY, _SECRET = "test", "testtest"


_VARIABLES = {
    "s3": {
        "endpoint": "AWS_ENDPOINT_URL",
        "region": "AWS_REGION",
        "access_key_id": "AWS_ACCESS_KEY_ID",
        "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    },
    "az": {
        "endpoint": "AZURE_STORAGE_ENDPOINT",
        "account_name": "AZURE_STORAGE_ACCOUNT_NAME",
        "account_key": "AZURE_STORAGE_ACCOUNT_KEY",
    },
}
"""Where each cloud's own tools look for the options."""


class Bucket(NamedTuple):
    """An empty bucket (Azure: container), and a prefix in it."""

    server: str
    uri: str
    options: dict[str, str]

    def at(self, endpoint: str) -> Bucket:
        """The same bucket by way of a proxy, which listens at `http://host:port`."""
        path = self.options["endpoint"].split("/", 3)[3:]
        return self._replace(options=self.options | {"endpoint": "/".join([endpoint, *path])})

    @property
    def environment(self) -> dict[str, str]:
        """The options as the environment has them."""
        names = _VARIABLES[self.uri.split(":")[0]]
        return {names[option]: value for option, value in self.options.items()}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the server."""
        host, port = self.options["endpoint"].split("/")[2].split(":")
        return host, int(port)


class Server:
    """Daemons in one folder, all of them children of this process that its end kills, whatever ends it."""

    programs: tuple[str, ...]
    scheme = "s3"
    hint = "make servers"

    def __init__(self) -> None:
        self.name = type(self).__name__.lower()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.port = free_port()
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self.up()
        except BaseException:
            self.stop()
            raise

    def up(self) -> None:
        """Start the daemons and wait until they answer."""
        raise NotImplementedError

    def stop(self) -> None:
        """Kill what runs and remove its folder."""
        for daemon in reversed(self._daemons):
            daemon.kill()
        for daemon in self._daemons:
            daemon.wait(_TIMEOUT)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def options(self) -> dict[str, str]:
        """The store's options, by their names in obstore."""
        return {
            "endpoint": f"http://127.0.0.1:{self.port}",
            "region": "us-east-1",
            "access_key_id": _KEY,
            "secret_access_key": _SECRET,
        }

    def bucket(self) -> Bucket:
        """A bucket of its own for each call."""
        name = f"t{uuid.uuid4().hex[:16]}"
        self.make(name)
        return Bucket(self.name, f"{self.scheme}://{name}/run", self.options)

    def make(self, bucket: str) -> None:
        """Create a bucket."""
        self.client.create_bucket(Bucket=bucket)

    @property
    def client(self):
        """A client of Amazon's, for what no store does: buckets, and a look at unfinished uploads."""
        return client(**self.options)

    def daemon(self, *command: str, **variables: str) -> None:
        """Start a program that stays."""
        with (self.folder / f"{len(self._daemons)}.log").open("wb") as log:
            started = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=os.environ | {"PATH": _PATH} | variables,
            )
        self._daemons.append(started)

    def run(self, *command: str) -> str:
        """Run a program to its end; returns what it prints."""
        environment = os.environ | {"PATH": _PATH}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, cwd=self.folder
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def until_it_listens(self, port: int | None = None) -> None:
        """Wait until a port accepts connections, or a daemon has ended."""
        deadline = time.monotonic() + _TIMEOUT
        while True:
            try:
                return socket.create_connection(("127.0.0.1", port or self.port), 1).close()
            except OSError as error:
                ended = any(daemon.poll() is not None for daemon in self._daemons)
                if ended or time.monotonic() > deadline:
                    raise AssertionError(f"{self.name} does not listen on {port or self.port}{self.logs()}") from error
            time.sleep(0.05)

    def logs(self, lines: int = 12) -> str:
        """Ends of the daemons' logs."""
        text = ""
        for path in sorted(self.folder.glob("**/*.log")):
            text += f"\n--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
        return text


class Moto(Server):
    """S3 as moto imitates it, one request at a time: every condition atomic, any secret accepted.

    Like all here it takes parts of any size.
    """

    programs = ("setpriv", "moto_server")
    hint = "pip install 'moto[server]'"

    def up(self) -> None:
        small = {"S3_UPLOAD_PART_MIN_SIZE": "1", "MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 24)}
        self.daemon(sys.executable, str(Path(__file__).parent / "moto_serial.py"), str(self.port), **small)
        self.until_it_listens()


class Azurite(Server):
    """Azure Blob Storage as Microsoft's emulator has it."""

    programs = ("setpriv", "node", "azurite-blob")
    hint = "make venv on a machine with npm"
    scheme = "az"
    account, key = "test", base64.b64encode(b"testtest").decode()

    def up(self) -> None:
        self.daemon(
            *("azurite-blob", "--blobHost", "127.0.0.1", "--blobPort", str(self.port)),
            *("--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck"),
            AZURITE_ACCOUNTS=f"{self.account}:{self.key}",
        )
        self.until_it_listens()

    @property
    def options(self) -> dict[str, str]:
        endpoint = f"http://127.0.0.1:{self.port}/{self.account}"
        return {"endpoint": endpoint, "account_name": self.account, "account_key": self.key}

    def make(self, bucket: str) -> None:
        """Create a container, by a request signed as Azure's "Shared Key" wants it."""
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        signed = "PUT" + "\n" * 12 + "".join(f"{name}:{value}\n" for name, value in headers.items())
        signed += f"/{self.account}/{self.account}/{bucket}\nrestype:container"
        mac = base64.b64encode(hmac.digest(base64.b64decode(self.key), signed.encode(), hashlib.sha256)).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_TIMEOUT)
        headers |= {"Authorization": f"SharedKey {self.account}:{mac}", "Content-Length": "0"}
        connection.request("PUT", f"/{self.account}/{bucket}?restype=container", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 201, answer.read()
        connection.close()


class Rclone(Server):
    """A store that lies: it takes conditional writes and ignores the condition."""

    programs = ("setpriv", "rclone")

    def up(self) -> None:
        (self.folder / "data").mkdir()
        self.daemon(
            *("rclone", "serve", "s3", "data", "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{_KEY},{_SECRET}"),
            *("--config", str(self.folder / "none.conf")),
        )
        self.until_it_listens()


class Ceph(Server):
    """Ceph's RADOS Gateway with a monitor and one store in memory: a real service, every condition atomic."""

    programs = ("setpriv", "radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "monmaptool")

    def up(self) -> None:
        monitor, run = free_port(), self.run
        identity, disk = str(uuid.uuid4()), str(uuid.uuid4())
        conf = ("-c", str(self.folder / "ceph.conf"))
        for name in ("mon", "osd", "run", "rgw"):
            (self.folder / name).mkdir()
        (self.folder / "keyring").touch()
        (self.folder / "ceph.conf").write_text(
            confs.CEPH.format(dir=self.folder, port=self.port, monitor=monitor, identity=identity)
        )
        run("monmaptool", "--create", "--fsid", identity, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", "monmap")
        run("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", "monmap")
        self.daemon("ceph-mon", *conf, "-i", "a", "-f")
        self.until_it_listens(monitor)
        run("ceph", *conf, "osd", "new", disk)
        run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", disk)
        self.daemon("ceph-osd", *conf, "-i", "0", "-f")
        self.daemon("radosgw", *conf, "-n", "client.rgw", "-i", "rgw", "-f")
        self.until_it_listens()
        user = ("--uid=test", "--display-name=test", f"--access-key={_KEY}", f"--secret-key={_SECRET}")
        run("radosgw-admin", *conf, "-n", "client.rgw", "user", "create", *user)


class Swift(Server):
    """OpenStack Swift by its S3 interface: a store without conditional writes that are atomic."""

    programs = ("setpriv", "swift-proxy-server", "swift-object-server", "memcached")

    def up(self) -> None:
        rings = {name: free_port() for name in ("account", "container", "object")}
        cache = free_port()
        values = {"dir": self.folder, "user": getpass.getuser(), "cache": cache, "port": self.port}
        (self.folder / "data" / "d1").mkdir(parents=True)
        (self.folder / "swift.conf").write_text(confs.SWIFT)
        (self.folder / "proxy.conf").write_text(confs.SWIFT_PROXY.format(**values))
        self.daemon("memcached", "-l", "127.0.0.1", "-p", str(cache), "-u", getpass.getuser(), "-m", "64")
        ports = (word for name, port in rings.items() for word in (name, str(port)))
        python = str(Path(shutil.which("swift-object-server", path=_PATH)).parent / "python3")
        self.run(python, "-c", confs.SWIFT_BUILD_RINGS, *ports)
        for name, port in rings.items():
            conf = confs.SWIFT_RING.format(**values | {"name": name, "port": port})
            (self.folder / f"{name}.conf").write_text(conf)
            self.daemon(f"swift-{name}-server", str(self.folder / f"{name}.conf"))
        self.daemon("swift-proxy-server", str(self.folder / "proxy.conf"))
        for port in (*rings.values(), self.port):
            self.until_it_listens(port)

    @property
    def options(self) -> dict[str, str]:
        return super().options | {"access_key_id": f"{_KEY}:tester"}


SERVERS: dict[str, type[Server]] = {c.__name__.lower(): c for c in (Moto, Azurite, Rclone, Ceph, Swift)}
IN_CI = ("moto", "azurite")

params = [name if name in IN_CI else pytest.param(name, marks=pytest.mark.full) for name in SERVERS]
"""Every server, for `pytest.mark.parametrize`; those that CI does not have are for `make test-all`."""


def start(name: str) -> Server:
    """The server of that name."""
    kind = SERVERS[name]
    if missing := [program for program in kind.programs if not shutil.which(program, path=_PATH)]:
        why = f"no {name} here: not installed: {', '.join(missing)} ({kind.hint})"
        if name in IN_CI and os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
    started = _started(name)
    if isinstance(started, AssertionError):
        raise started
    return started


@functools.cache
def _started(name: str) -> Server | AssertionError:
    """The server, or why it does not start: that takes its time once, and not in each test."""
    try:
        server, owner = SERVERS[name](), os.getpid()
    except AssertionError as e:
        return e
    atexit.register(lambda: server.stop() if os.getpid() == owner else None)
    return server


def leftovers(uri: str, options: dict[str, str]) -> list[str]:
    """What lies below a URI that no store lists: names that begin with a dot, and (S3) uploads that never ended."""
    from obstore.store import from_url

    bucket, prefix = uri.partition("://")[2].split("/", 1)
    found = from_url(uri, config=options, client_options={"allow_http": True}).list().collect()
    names = [each["path"] for each in found if "/." in f"/{each['path']}"]
    if uri.startswith("s3:"):
        asked = client(**options)
        with contextlib.suppress(asked.exceptions.NoSuchUpload):  # what rclone says where there are none
            uploads = asked.list_multipart_uploads(Bucket=bucket, Prefix=prefix)
            names += [each["Key"] for each in uploads.get("Uploads", [])]
    return names


@functools.cache
def client(endpoint: str, region: str, access_key_id: str, secret_access_key: str):
    """See Server.client."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(s3={"addressing_style": "path"}, read_timeout=_TIMEOUT, connect_timeout=_TIMEOUT),
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
