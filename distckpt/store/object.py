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
import os
import re
import secrets
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from distckpt.errors import KeyExists, KeyMissing, KeyTruncated, StateWarning, StoreError, Unsupported
from distckpt.store.base import FOR_GOOD, Entry, Pace, check, read_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

T = TypeVar("T")

PART = 8 << 20
"""Bytes that go up, or come down, in one request."""
_MOST_PARTS = 9_000
"""Parts of one object: servers take 10,000."""
IN_FLIGHT = 8
_REQUEST = 60.0
"""Seconds that one request lasts at most."""
_RACERS, _RACES = 8, 4
SETTLES = 2.0
"""Seconds within which every other job's requests that were on their way have arrived, where claims decide."""
_PATIENCE = 30.0
_CLAIM = ".claim-"

_keeps_conditions: dict[tuple[str, ...], bool] = {}
"""Bucket -> whether its server keeps the condition of a create."""
_probing = threading.Lock()
_owner: list[int] = []
"""Process that has used obstore: its threads do not survive a fork."""


class ObjectStore:
    """Keys below the prefix of a URI, such as `s3://bucket/runs/7`.

    options: settings of obstore (`endpoint`, `region`, `access_key_id`, ...), before what the environment says.
    timeout: seconds after which a request that fails is not tried again. Unsupported where obstore is not installed.
    """

    pace = Pace(gap=1 << 20, in_flight=IN_FLIGHT)

    def __init__(self, uri: str, options: Mapping[str, str] | None = None, *, timeout: float = 120.0) -> None:
        self.root = uri.rstrip("/")
        self._options, self._timeout = dict(options or {}), timeout
        self._bucket = "/".join(self.root.split("/")[:3])
        self._obstore = _imported()
        self._made: Any = None

    def __repr__(self) -> str:
        return f"ObjectStore({self.root!r})"

    @property
    def address(self) -> dict[str, Any]:
        """See Store.address. Holds what `options` do: not for a log."""
        return {"root": self.root, "options": self._options, "timeout": self._timeout}

    @property
    def _store(self) -> Any:
        if _owner and _owner[0] != os.getpid():
            raise StoreError(f"{self.root}: used in a forked process, where its client cannot run: spawn it instead")
        _owner[:] = [os.getpid()]
        if self._made is None:
            with self._mapped("open", ""):
                self._made = _client(self._obstore, self.root, self._options, self._timeout)
        return self._made

    # -- the six verbs -----------------------------------------------------------------------------------------------

    def list(self, prefix: str) -> list[Entry]:
        """See Store.list."""
        check(prefix, prefix=True)
        with self._mapped("list", prefix):
            found = _off_main(lambda: self._obstore.list_with_delimiter(self._store, prefix or None))
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
        with self._mapped("look at", key):
            return _off_main(lambda: self._obstore.head(self._store, key))

    def read(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """See Store.read."""
        check(key)
        stop = start + sum(map(len, buffers))
        rest = [b for b in buffers if len(b)]
        for low in range(start, stop, 2 * PART):
            high = min(stop, low + 2 * PART)
            with self._mapped("read", key):
                data = memoryview(_off_main(lambda: self._obstore.get_range(self._store, key, start=low, end=high)))  # noqa: B023  called at once
            if len(data) != high - low:
                raise KeyTruncated(f"{self.root}/{key}: ends at byte {low + len(data)}, byte {high} was asked for")
            while data:
                n = min(len(data), len(rest[0]))
                rest[0][:n] = data[:n]
                data, rest[0] = data[n:], rest[0][n:]
                rest = rest[not len(rest[0]) :]

    def write(self, key: str, pieces: Iterable[memoryview], *, size: int, stable: int = 0) -> None:
        """See Store.write. Holds as many parts as are in flight; pieces that stay FOR_GOOD are sent as they lie."""
        check(key)
        part = max(PART, -(-size // _MOST_PARTS))
        counted = _Counted(pieces, lasting=stable == FOR_GOOD)
        with self._mapped("write", key):
            if size <= part:
                data = b"".join(counted)
                counted.check(key, size)
                _off_main(lambda: self._obstore.put(self._store, key, data, use_multipart=False))
            else:
                checked = counted.checked(key, size)
                _off_main(
                    lambda: self._obstore.put(
                        self._store, key, checked, use_multipart=True, chunk_size=part, max_concurrency=IN_FLIGHT
                    )
                )

    def create(self, key: str, data: bytes) -> None:
        """See Store.create."""
        check(key)
        if self._keeps_conditions():
            _until(self._timeout, lambda: self._create_once(key, data))
        else:
            self._create_by_claim(key, data)

    def delete(self, key: str) -> None:
        """See Store.delete."""
        check(key)
        with self._mapped("delete", key), contextlib.suppress(FileNotFoundError):
            _off_main(lambda: self._obstore.delete(self._store, key))

    # -- create, if absent -------------------------------------------------------------------------------------------

    def _create_once(self, key: str, data: bytes) -> bool:
        """Whether it is created, by us; False if that is not known and must be tried again. KeyExists."""
        problem = None
        try:
            with self._mapped("create", key):
                return self._put_if_absent(key, data) or self._settled(key, data)
        except KeyExists:
            raise
        except StoreError as e:  # its answer may have been lost, or one before that of a retry
            problem = e
        try:
            return self._settled(key, data)
        except KeyMissing:
            raise problem from None

    def _put_if_absent(self, key: str, data: bytes) -> bool:
        """Ask for it. False where the server says that it is there."""
        try:
            _off_main(lambda: self._obstore.put(self._store, key, data, mode="create", use_multipart=False))
        except self._obstore.exceptions.AlreadyExistsError:
            return False
        return True

    def _settled(self, key: str, data: bytes) -> bool:
        """Whether a key that is there was created by us: its content says so. KeyExists if not; KeyMissing."""
        if self.head(key) != len(data) or read_all(self, key, limit=len(data)) != data:
            raise KeyExists(f"{self.root}/{key}: exists with other content")
        return True

    def _keeps_conditions(self) -> bool:
        """Whether a create is one here, in a race too: tried once for each bucket by each process."""
        place = (self._bucket, *(f"{k}={v}" for k, v in sorted(self._options.items())))
        with _probing:
            if place not in _keeps_conditions:
                _keeps_conditions[place] = self._probe()
                if not _keeps_conditions[place]:
                    warnings.warn(
                        f"{self.root}: the server does not keep `If-None-Match: *` on a PUT. Commits are decided by "
                        f"claims instead, which is safe only if no request is on its way for longer than {SETTLES:.0f} "
                        "s: let no two jobs save to one run at once (docs/object-stores.md)",
                        StateWarning,
                        stacklevel=5,
                    )
        return _keeps_conditions[place]

    def _probe(self) -> bool:
        names = [f".probe-{secrets.token_hex(8)}" for _ in range(_RACES)]
        with self._mapped("try a create in", ""), ThreadPoolExecutor(_RACERS) as pool:
            if not self._put_if_absent(names[0], b"first") or self._put_if_absent(names[0], b"late"):
                kept = False
            else:
                kept = all(self._race(pool, name) for name in names[1:])
            for name in names if kept else names[:1]:
                self._obstore.delete(self._store, name)
        return kept

    def _race(self, pool: ThreadPoolExecutor, name: str) -> bool:
        """Whether of several that create a key at once one succeeds, and its content stays."""
        start = threading.Barrier(_RACERS)

        def run(racer: int) -> bool:
            start.wait(_REQUEST)
            try:
                return self._put_if_absent(name, b"%d" % racer)
            except self._obstore.exceptions.BaseError as e:
                if "409" not in str(e):  # a conflict: it was not this one
                    raise
                return False

        won = list(pool.map(run, range(_RACERS)))
        content = bytes(self._obstore.get(self._store, name).bytes())
        return won.count(True) == 1 and content == b"%d" % won.index(True)

    def _create_by_claim(self, key: str, data: bytes) -> None:
        """Create on a server that has no conditions: of those who claim the key at about the same time, one writes it.

        Each puts a claim beside the key, waits until every other one's has arrived, and lists them: the first by name
        writes, the others wait for what it writes; for one that does not in time, the next.
        """
        directory, _, name = key.rpartition("/")
        lead = f"{directory}/" if directory else ""
        nonce = f"{_CLAIM}{name}-{secrets.token_hex(8)}"
        with self._mapped("claim", key):
            if self._is_ours(key, data):
                return
            _off_main(lambda: self._obstore.put(self._store, lead + nonce, b""))
            try:
                time.sleep(SETTLES)
                deadline = time.monotonic() + _PATIENCE
                while not self._is_ours(key, data):
                    if nonce == min(self._claims(lead, name), default=nonce) or time.monotonic() > deadline:
                        _off_main(lambda: self._obstore.put(self._store, key, data))
                        time.sleep(SETTLES)
                    else:
                        time.sleep(SETTLES / 4)
            finally:
                _off_main(lambda: self._obstore.delete(self._store, lead + nonce))

    def _is_ours(self, key: str, data: bytes) -> bool:
        try:
            return self._settled(key, data)
        except KeyMissing:
            return False

    def _claims(self, lead: str, name: str) -> Sequence[str]:
        found = self._obstore.list_with_delimiter(self._store, lead.rstrip("/") or None)["objects"]
        names = (each["path"].rpartition("/")[2] for each in found)
        return [n for n in names if n.startswith(f"{_CLAIM}{name}-")]

    # -- errors ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _mapped(self, verb: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into StoreErrors that say what, where and what to do."""
        where = f"{self.root}/{key}" if key else self.root
        known = self._obstore.exceptions
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as e:
            if "NoSuchBucket" in str(e) or "ContainerNotFound" in str(e):
                raise StoreError(f"cannot {verb} {where}: there is no such bucket") from None
            raise KeyMissing(f"cannot {verb} {where}: no such key") from None
        except known.BaseError as e:
            text = str(e)
            if "NoSuchBucket" in text or "ContainerNotFound" in text:
                raise StoreError(f"cannot {verb} {where}: there is no such bucket") from None
            if "416" in text and "Range" in text:
                raise KeyTruncated(f"{where}: ends before the first byte that was asked for") from None
            raise StoreError(f"cannot {verb} {where}: {_brief(text)}{_advice(known, e)}") from None


class _Counted:
    """Pieces on their way into a request. Those that will not stay as they are are copied."""

    def __init__(self, pieces: Iterable[memoryview], *, lasting: bool) -> None:
        self._pieces, self._lasting = pieces, lasting
        self.nbytes = 0

    def __iter__(self) -> Iterator[Any]:
        for piece in self._pieces:
            self.nbytes += len(piece)
            if len(piece):
                yield piece if self._lasting else bytes(piece)

    def checked(self, key: str, size: int) -> Iterator[Any]:
        """Yield them, and end in an error, which aborts the upload, unless they have `size` bytes."""
        yield from self
        self.check(key, size)

    def check(self, key: str, size: int) -> None:
        """StoreError unless they had `size` bytes."""
        if self.nbytes != size:
            raise StoreError(f"{key}: the pieces have {self.nbytes} bytes, {size} were announced")


def _imported() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as e:
        raise Unsupported(f"URIs of object stores need obstore: pip install 'distckpt[object]' ({e})") from e
    return obstore


def _client(obstore: Any, uri: str, options: dict[str, str], timeout: float) -> Any:
    endpoint = (
        options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    )
    settings: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=min(timeout, _REQUEST)),
            "connect_timeout": timedelta(seconds=min(timeout, 10.0)),
            "allow_http": endpoint.startswith("http://"),
        },
        "retry_config": {
            "max_retries": 20,
            "retry_timeout": timedelta(seconds=timeout),
            "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
        },
    }
    if uri.startswith("s3://") and not options and (provider := _profile()):
        settings["credential_provider"] = provider
    return obstore.store.from_url(uri, config=options or None, **settings)


def _profile() -> Any:
    """Credentials of ~/.aws, where the environment has none, and boto3 is installed to read them."""
    own = os.environ.get("AWS_PROFILE") or os.path.exists(os.path.expanduser("~/.aws"))  # noqa: PTH110, PTH111
    if "AWS_ACCESS_KEY_ID" in os.environ or not own:
        return None
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        return None
    return Boto3CredentialProvider()


def _off_main(call: Callable[[], T]) -> T:
    """Call it; from the main thread, in another: no signal is handled while a call into obstore lasts."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    result: list[T] = []
    problem: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as e:  # noqa: BLE001  raised by who called
            problem.append(e)

    thread = threading.Thread(target=work, name="distckpt-object", daemon=True)
    thread.start()
    thread.join()  # its requests have timeouts
    if problem:
        raise problem[0]
    return result[0]


def _until(seconds: float, attempt: Callable[[], bool]) -> None:
    """Try again what failed without a sign of why, for so many seconds."""
    deadline = time.monotonic() + seconds
    pause = 0.1
    while True:
        try:
            if attempt():
                return
        except KeyExists:
            raise
        except StoreError:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


def _brief(text: str) -> str:
    """What an error says, on one line, without signatures in URLs."""
    line = " ".join(text.partition("Debug source")[0].split())
    return re.sub(r"<\?xml[^>]*>|\?[^ )]*", "", line)[:500]


def _advice(known: Any, error: Exception) -> str:
    if "169.254." in str(error):
        return " (there are no credentials: set them in the environment or in ~/.aws, as for the cloud's own tools)"
    refused = isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError))
    if refused or re.search(r"status code: 40[13]|\b40[13] (Forbidden|Unauthorized)", str(error)):
        return " (check the credentials, and that they may read, write, list and delete here)"
    if "169.254.169.254" in str(error) or "metadata.google" in str(error):
        return " (no credentials were found, here or from the cloud's own machines: docs/object-stores.md)"
    if "timed out" in str(error) or "error sending request" in str(error):
        return " (the server does not answer: check endpoint, region and network)"
    return ""
