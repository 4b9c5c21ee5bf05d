"""A proxy that stands before a store's server and does to its requests what networks and servers do.

Every request is one connection to the server, so nothing is left over from one to the next. Which request suffers is
told by what it is (`PUT /bucket/key?partNumber=2`) and by its number among those alike: the same in every run.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import NamedTuple

_TIMEOUT = 60
"""Seconds after which the proxy itself gives up on a peer, and a hang ends."""

_CHUNK = 1 << 16
_DRIPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What becomes of one request. By default nothing out of the ordinary."""

    delay: float = 0
    """Seconds until the server hears of it."""
    until: threading.Event | None = None
    """The server hears of it once that is set."""
    status: int | None = None
    """The answer, without the server's ever hearing of it."""
    upload: int | None = None
    """Bytes of its body after which both connections are reset."""
    lost: bool = False
    """The server acts; the client sees its connection reset."""
    hang: bool = False
    """The server acts; the client hears nothing, on a connection that stays open."""
    body: int | None = None
    """Bytes of the answer's body after which the connection ends, as if the server had crashed."""
    slow: float = 0
    """Seconds that the answer's body takes, in small pieces."""
    flip: int | None = None
    """Byte of the answer's body that arrives with a bit flipped."""


FINE = Fault()


class Request(NamedTuple):
    """A request that the proxy saw, and what it did to it."""

    line: str
    fault: Fault


@dataclass(slots=True)
class _Rule:
    pattern: re.Pattern[str]
    fault: Fault
    skip: int
    times: int


@dataclass(slots=True)
class _Link:
    """A line of limited bandwidth, one way, shared by all connections."""

    rate: float | None = None
    _free: float = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, size: int) -> None:
        """Take the time that so many bytes need."""
        if self.rate is None:
            return
        with self._lock:
            self._free = max(self._free, time.monotonic()) + size / self.rate
            wait = self._free - time.monotonic()
        time.sleep(max(0, wait))


class Faulty:
    """A proxy before `address`, (host, port), as a context manager. What it does may be changed while it runs."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.latency: float = 0
        """Seconds added to every request."""
        self.requests: list[Request] = []
        self._address = address
        self._up, self._down = _Link(), _Link()
        self._rules: list[_Rule] = []
        self._chance: tuple[random.Random, list[Fault], float] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._begin(self._accept)
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(_TIMEOUT)
            assert not thread.is_alive(), "a connection of the proxy did not end"

    def on(self, pattern: str, fault: Fault, *, after: int = 0, times: int = 1) -> None:
        """Let `times` requests whose line matches the pattern suffer the fault, `after` so many that do not.

        A line is method, space, path with query, as in "PUT /bucket/run/commit.json". Of several rules that match, the
        first made counts the request, and the next once that one is used up.
        """
        with self._lock:
            self._rules.append(_Rule(re.compile(pattern), fault, after, times))

    def off(self, pattern: str) -> None:
        """Forget the rules of a pattern."""
        with self._lock:
            self._rules = [rule for rule in self._rules if rule.pattern.pattern != pattern]

    def shake(self, seed: int, faults: list[Fault], share: float) -> None:
        """Let that share of the requests that no rule meets suffer one of the faults, both drawn from the seed."""
        with self._lock:
            self._chance = (random.Random(seed), faults, share)

    def clear(self) -> None:
        """Forget rules, chance and the requests seen."""
        with self._lock:
            self._rules.clear()
            self._chance = None
            self.requests.clear()

    def bandwidth(self, rate: float | None) -> None:
        """Limit each direction to `rate` bytes per second; None lifts it."""
        self._up.rate = self._down.rate = rate

    def count(self, pattern: str) -> int:
        """Requests so far whose line matches."""
        with self._lock:
            return sum(re.search(pattern, request.line) is not None for request in self.requests)

    # -- connections -------------------------------------------------------------------------------------------------

    def _begin(self, work, *args):
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._begin(self._serve, client)

    def _serve(self, client):
        """One request and its answer. Whichever side breaks off, the other sees its connection end."""
        client.settimeout(_TIMEOUT)
        with client:
            try:
                with socket.create_connection(self._address, _TIMEOUT) as server:
                    self._exchange(client, server)
            except OSError:
                _reset(client)

    def _exchange(self, client, server):
        head, body = _head(client)
        if head is None:
            return
        line = " ".join(head.split(b"\r\n", 1)[0].decode("latin1").split(" ")[:2])
        fault = self._judge(line)
        self._ended.wait(self.latency + fault.delay)
        if fault.until and not fault.until.wait(_TIMEOUT):
            raise TimeoutError("a held request was never let go")
        if fault.status is not None:
            self._upload(client, None, head, body, None)
            client.sendall(_answer(fault.status))
            return
        # each request has a connection of its own: the server says so to the client as well
        server.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        if not self._upload(client, server, head, body, fault.upload):
            _reset(server)
            _reset(client)
        elif fault.lost or fault.hang:
            while server.recv(_CHUNK):
                pass
            if fault.hang:
                self._hang(client)
            _reset(client)
        else:
            self._download(server, client, fault)

    def _judge(self, line):
        with self._lock:
            fault = FINE
            for rule in self._rules:
                if rule.times and rule.pattern.search(line):
                    if rule.skip:
                        rule.skip -= 1
                    else:
                        rule.times -= 1
                        fault = rule.fault
                    break
            else:
                if self._chance:
                    draw, faults, share = self._chance
                    fault = draw.choice(faults) if draw.random() < share else FINE
            self.requests.append(Request(line, fault))
        return fault

    def _upload(self, client, server, head, body, limit):
        """Carry a request's body over. False if it reached the limit, where all is to break off."""
        left = _length(head)
        if b"expect: 100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if limit == 0:
            return False
        while left:
            body = body or client.recv(_CHUNK)
            if not body:
                raise ConnectionError("the client broke off")
            if limit is not None and limit <= len(body):
                server.sendall(body[:limit])
                return False
            limit = None if limit is None else limit - len(body)
            self._up.carry(len(body))
            if server is not None:
                server.sendall(body)
            left, body = left - len(body), b""
        return True

    def _download(self, server, client, fault):
        """Carry an answer over until the server ends it, but for what the fault keeps or changes."""
        head, data = _head(server)
        if head is None:
            raise ConnectionError("the server broke off")
        client.sendall(head)
        at = 0
        while data := data or server.recv(_CHUNK):
            if fault.flip is not None and at <= fault.flip < at + len(data):
                i = fault.flip - at
                data = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
            self._down.carry(len(data))
            if fault.slow:
                data = self._dripped(client, data, fault.slow)
            if fault.body is not None and at + len(data) > fault.body:
                client.sendall(data[: fault.body - at])
                return
            client.sendall(data)
            at, data = at + len(data), b""

    def _dripped(self, client, data, seconds):
        """Send all but the last piece of these bytes, one after another. Returns that."""
        step = -(-len(data) // _DRIPS)
        for low in range(0, len(data) - step, step):
            client.sendall(data[low : low + step])
            self._ended.wait(seconds / _DRIPS)
        return data[(len(data) - 1) // step * step :]

    def _hang(self, client):
        """Keep a client waiting, until it leaves or the proxy ends."""
        client.settimeout(0.05)
        deadline = time.monotonic() + _TIMEOUT
        while not self._ended.is_set() and time.monotonic() < deadline:
            try:
                if not client.recv(_CHUNK):
                    return
            except TimeoutError:
                pass


def _head(sock):
    """Head of a request or answer, blank line included, and what came of the body with it; None if nothing comes."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(_CHUNK)
        if not more:
            return None, b""
        data += more
        # "continue" is the server's word to this proxy, which has sent the body anyway
        if data.startswith(b"HTTP/1.1 100") and b"\r\n\r\n" in data:
            data = data.split(b"\r\n\r\n", 1)[1]
    head, body = data.split(b"\r\n\r\n", 1)
    return head + b"\r\n\r\n", body


def _length(head):
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    assert b"\r\ntransfer-encoding:" not in head.lower(), "a body without a length is not for this proxy"
    return int(found[1]) if found else 0


def _answer(status):
    return b"HTTP/1.1 %d Fault\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status


def _reset(sock):
    """End a connection as a crash does: what is under way is lost, and the peer hears of it."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    finally:
        sock.close()
