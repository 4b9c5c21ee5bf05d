"""A prefix of an object store (S3, Google Cloud Storage, Azure) as a store, on `obstore` (extra `object`).

Every object is put whole, so a reader sees the old one or the new. What is larger than a part goes up in several, some
at once, and appears when the last has arrived; one that fails is aborted, and what a killed process leaves of it is for
a lifecycle rule of the bucket. Credentials, region and endpoint are found where each cloud's own tools look for them.

A create is one PUT with `If-None-Match: *`. Its answer can be lost, and some servers ignore the condition or do not
keep it in a race: so what came of it is settled by reading back, and whether the server keeps it is found out once for
each bucket, by trying. Where it does not, see `_create_by_claim`.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, KeyExists, KeyMissing, KeyTruncated, StateWarning, StoreError
from distckpt.store.base import FOR_GOOD, Entry, Pace, check, each
from distckpt.store.client import REQUEST, Client, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

PART = 8 << 20
"""Bytes that go up, or come down, in one request."""
_PIECE = 1 << 20
"""Bytes that are handed over, or copied, at once."""
_MOST_PARTS = 9_000
"""Parts of one object: servers take 10,000."""
IN_FLIGHT = 8
_MARK = "attempt"
"""Attribute of what goes up in parts: tells whether it is there where the answer to its last request was lost."""
_RACERS, _RACES = 8, 4
SETTLES = 2.0
"""Seconds within which every other job's requests that were on their way have arrived, where claims decide."""
_PATIENCE = 30.0
_CLAIM = ".claim-"

_probed: dict[tuple[str, ...], bool] = {}
"""Bucket -> whether its server keeps the condition of a create."""
_probing = threading.Lock()


class ObjectStore:
    """Keys below the prefix of a URI, such as `s3://bucket/runs/7`.

    options: settings of obstore (`endpoint`, `region`, `access_key_id`, ...), before what the environment says.
    timeout: seconds after which a request that fails is not tried again. Unsupported where obstore is not installed.
    """

    pace = Pace(gap=1 << 20, in_flight=IN_FLIGHT)

    def __init__(self, uri: str, options: Mapping[str, str] | None = None, *, timeout: float = 120.0) -> None:
        self.root = plain(uri)
        self._options = dict(options or {})
        self._bucket = "/".join(self.root.split("/")[:3])
        self._client = Client(self.root, self._options, timeout)

    def __repr__(self) -> str:
        return f"ObjectStore({self.root!r})"

    @property
    def address(self) -> dict[str, Any]:
        """See Store.address. Holds what `options` do: not for a log."""
        return {"root": self.root, "options": self._options, "timeout": self._client.timeout}

    # -- the six verbs -----------------------------------------------------------------------------------------------

    def list(self, prefix: str) -> list[Entry]:
        """See Store.list."""
        check(prefix, prefix=True)
        found = self._client.ask("list", prefix, lambda store: store.list_with_delimiter(prefix or None))
        lead = len(prefix) + 1 if prefix else 0
        entries = {path[lead:].rstrip("/"): None for path in found["common_prefixes"]}
        entries |= {each["path"][lead:]: each["size"] for each in found["objects"]}
        return sorted(Entry(name, size) for name, size in entries.items() if name and not name.startswith("."))

    def head(self, key: str) -> int:
        """See Store.head."""
        return int(self._head(key)["size"])

    def changed(self, key: str) -> float:
        """When a key was written, in seconds by the server's clock. KeyMissing."""
        return float(self._head(key)["last_modified"].timestamp())

    def _head(self, key: str) -> Any:
        check(key)
        return self._client.ask("look at", key, lambda store: store.head(key))

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Store.read."""
        check(key)
        stop = start + sum(map(len, buffers))
        rest = [b for b in buffers if len(b)]
        for low in range(start, stop, 2 * PART):
            high = min(stop, low + 2 * PART)
            data = memoryview(self._range(key, low, high))
            if len(data) != high - low:
                raise KeyTruncated(f"{self.root}/{key}: ends at byte {low + len(data)}, byte {high} was asked for")
            while data:
                n = min(len(data), len(rest[0]))
                rest[0][:n] = data[:n]
                data, rest[0] = data[n:], rest[0][n:]
                rest = rest[not len(rest[0]) :]

    def _range(self, key: str, low: int, high: int) -> Any:
        """Bytes of a range, fewer where the key ends in it. KeyTruncated where it ends before."""
        try:
            return self._client.ask("read", key, lambda store: store.get_range(key, start=low, end=high))
        except KeyMissing:
            raise
        except StoreError as e:
            if "range" not in str(e).lower():
                raise
            # each server has words of its own for a range that begins beyond the end
            if (size := self.head(key)) <= low:
                raise KeyTruncated(f"{self.root}/{key}: ends at byte {size}, byte {high} was asked for") from None
            if "non-partial" not in str(e):
                raise
        return self._client.ask("read", key, lambda store: _skimmed(store.get(key), low, high))

    def content(self, key: str, limit: int) -> bytes:
        """See Whole."""
        return self._content(check(key), limit)

    def _content(self, key: str, limit: int) -> bytes:
        def get(store: Any) -> bytes:
            got = store.get(key)
            if (size := got.meta["size"]) > limit:
                raise FormatError(f"{self.root}/{key} has {size} bytes; at most {limit} are read")
            return bytes(got.bytes())

        return self._client.ask("read", key, get)

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:
        """See Store.write. Holds as many parts as are in flight; pieces that stay FOR_GOOD are sent as they lie."""
        check(key)
        part = max(PART, -(-size // _MOST_PARTS))
        counted = _Counted(pieces, key, size, lasting=stable == FOR_GOOD)
        if size <= part:
            data = b"".join(counted)
            self._client.ask("write", key, lambda store: store.put(key, data, use_multipart=False))
        else:
            self._write_parts(key, counted, part)

    def _write_parts(self, key: str, counted: _Counted, part: int) -> None:
        mark = secrets.token_hex(16)
        many = {"use_multipart": True, "chunk_size": part, "max_concurrency": IN_FLIGHT, "attributes": {_MARK: mark}}
        try:
            self._client.ask_once("write", key, lambda store: store.put(key, _beside(iter(counted)), **many))
        except StoreError as problem:
            if not counted.whole or self._mark(key) != mark:
                raise problem from None
        finally:
            counted.stop()

    def _mark(self, key: str) -> str | None:
        try:
            found = self._client.ask("look at", key, lambda store: store.get(key, options={"head": True}).attributes)
        except KeyMissing:
            return None
        return dict(found).get(_MARK)

    def create(self, key: str, data: bytes) -> None:
        """See Store.create."""
        check(key)
        data = bytes(data)
        if not self._keeps_conditions():
            self._create_by_claim(key, data)
        elif not self._put_if_absent(key, data):
            self._settled(key, data)

    def delete(self, key: str) -> None:
        """See Store.delete."""
        self._delete(check(key))

    def _delete(self, key: str) -> None:
        with contextlib.suppress(KeyMissing):
            self._client.ask("delete", key, lambda store: store.delete(key))

    # -- create, if absent -------------------------------------------------------------------------------------------

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """Ask for it. False where the server says that it is there, perhaps by a request whose answer was lost."""

        def put(store: Any) -> bool:
            try:
                store.put(key, data, mode="create", use_multipart=False)
            except self._client.errors.AlreadyExistsError:
                return False
            return True

        return self._client.ask("create", key, put)

    def _settled(self, key: str, data: bytes) -> bool:
        """True for a key that was created by us: its content says so. KeyExists if by another; KeyMissing."""
        if self.head(key) != len(data) or self._content(key, len(data)) != data:
            raise KeyExists(f"{self.root}/{key}: exists with other content")
        return True

    def _keeps_conditions(self) -> bool:
        """Whether a create is one here, in a race too: tried once for each bucket by each process."""
        place = (self._bucket, *(f"{k}={v}" for k, v in sorted(self._options.items())))
        with _probing:
            if place not in _probed:
                _probed[place] = self._probe()
                if not _probed[place]:
                    warnings.warn(
                        f"{self.root}: the server does not keep `If-None-Match: *` on a PUT. Commits are decided by "
                        f"claims instead, which is safe only if no request is on its way for longer than {SETTLES:.0f} "
                        "s: let no two jobs save to one run at once (docs/object-stores.md)",
                        StateWarning,
                        stacklevel=5,
                    )
        return _probed[place]

    def _probe(self) -> bool:
        names = [f".probe-{secrets.token_hex(8)}" for _ in range(_RACES)]

        def kept(name: str) -> bool:
            return self._refuses_the_second(name) if name == names[0] else self._race(name)

        try:
            return all(each(self.pace, kept, names))
        finally:
            each(self.pace, self._delete, names)

    def _refuses_the_second(self, name: str) -> bool:
        self._put_if_absent(name, b"first")  # what that says may be about a request of its own, whose answer was lost
        return not self._put_if_absent(name, b"second") and self._content(name, PART) == b"first"

    def _race(self, name: str) -> bool:
        """Whether of several that create a key at once no two succeed, and the content of one stays."""
        start = threading.Barrier(_RACERS)

        def run(racer: int) -> bool:
            start.wait(REQUEST)
            return self._put_if_absent(name, b"%d" % racer)

        with ThreadPoolExecutor(_RACERS) as pool:
            won = list(pool.map(run, range(_RACERS)))
        able = [racer for racer, has in enumerate(won) if has] or range(_RACERS)  # the winner's answer may be lost
        return won.count(True) <= 1 and self._content(name, PART) in [b"%d" % racer for racer in able]

    def _create_by_claim(self, key: str, data: bytes) -> None:
        """Create on a server that has no conditions: of those who claim the key at about the same time, one writes it.

        Each puts a claim beside the key, waits until every other one's has arrived, and lists them: the first by name
        writes, the others wait for what it writes; for one that does not in time, the next.
        """
        directory, _, name = key.rpartition("/")
        lead = f"{directory}/" if directory else ""
        claim = (
            f"{_CLAIM}{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}-"  # a name may be as long as one may
        )
        nonce = claim + secrets.token_hex(8)
        if self._is_ours(key, data):
            return
        self._client.ask("claim", key, lambda store: store.put(lead + nonce, b""))
        try:
            time.sleep(SETTLES)
            deadline = time.monotonic() + _PATIENCE
            while not self._is_ours(key, data):
                if nonce == min(self._claims(lead, claim), default=nonce) or time.monotonic() > deadline:
                    self._client.ask("create", key, lambda store: store.put(key, data))
                    time.sleep(SETTLES)
                else:
                    time.sleep(SETTLES / 4)
        finally:
            self._client.ask("release", key, lambda store: store.delete(lead + nonce))

    def _is_ours(self, key: str, data: bytes) -> bool:
        try:
            return self._settled(key, data)
        except KeyMissing:
            return False

    def _claims(self, lead: str, claim: str) -> Sequence[str]:
        prefix = lead.rstrip("/") or None
        found = self._client.ask("list", lead, lambda store: store.list_with_delimiter(prefix))["objects"]
        names = (each["path"].rpartition("/")[2] for each in found)
        return [n for n in names if n.startswith(claim)]


class _Counted:
    """Pieces on their way into a request, `size` bytes in all. Those that will not stay as they are are copied."""

    def __init__(self, pieces: Iterable[memoryview], key: str, size: int, *, lasting: bool) -> None:
        self._pieces, self._key, self._size, self._lasting = pieces, key, size, lasting
        self._stopped = False
        self.whole = False
        """Whether all were asked for."""

    def __iter__(self) -> Iterator[Any]:
        """Yield them. StoreError, which aborts an upload, unless they have the size, or once they are stopped."""
        nbytes = 0
        for piece in self._pieces:
            nbytes += len(piece)
            for low in range(0, len(piece), _PIECE):
                if self._stopped:
                    raise StoreError(f"{self._key}: the write was given up")
                some = piece[low : low + _PIECE]
                yield some if self._lasting else bytes(some)
        if nbytes != self._size:
            raise StoreError(f"{self._key}: the pieces have {nbytes} bytes, {self._size} were announced")
        self.whole = True

    def stop(self) -> None:
        """Let no more go out: who gave them is gone, and may reuse them."""
        self._stopped = True


def _beside(pieces: Iterator[Any]) -> Iterator[Any]:
    """Yield pieces that a thread makes, one ahead.

    obstore cannot be asked for anything where it asks for a piece: and what goes from store to store is read by it.
    """
    with ThreadPoolExecutor(1, "distckpt-pieces") as pool:
        coming = pool.submit(next, pieces, None)
        while (piece := coming.result()) is not None:
            coming = pool.submit(next, pieces, None)
            yield piece


def _skimmed(got: Any, low: int, high: int) -> bytes:
    """Take a range out of a whole object, from a server that does not know of ranges."""
    data, at = bytearray(), 0
    for chunk in got.stream(min_chunk_size=PART):
        view = memoryview(chunk)
        data += view[max(0, low - at) : max(0, high - at)]
        at += len(view)
        if at >= high:
            break
    return bytes(data)
