"""What an object store is asked through: obstore's client of one URI, its calls tried again, its errors ours.

obstore itself tries again what its server refuses for now. What it gives up at once (a connection reset in a delete or
a create, a listing that breaks off, a request that times out) is tried again here: every call given to `ask` may be
made twice, as long as who gives it can tell what came of the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from distckpt.errors import KeyMissing, StoreError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

REQUEST = 60.0
"""Seconds that one request lasts at most."""
_PASSING = re.compile(r"HTTP error|timed out|status code: (?:5\d\d|408|429)|SlowDown|InternalError")
"""What obstore says of an error that may not come again."""
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
"""Variables that may name a server to be spoken to without TLS."""
_owner: list[int] = []
"""Process that has used obstore: its threads do not survive a fork."""


def plain(uri: str) -> str:
    """The URI of a prefix, without slashes at its end. Unsupported for one that names another than it seems to."""
    scheme, _, rest = uri.rstrip("/").partition("://")
    bucket, *parts = rest.split("/")
    where = f"{scheme}://{bucket.rpartition('@')[2].partition('?')[0]}/..."  # what else it holds may be a secret
    if "@" in bucket or "?" in rest:
        raise Unsupported(
            f"{where}: a URI takes no credentials or options: set them in the environment (or `?` as %3F)"
        )
    if "#" in rest or not rest.isprintable() or {"", ".", ".."} & {unquote(part) for part in parts}:
        raise Unsupported(f"{uri!r}: its parts must not be empty, `.` or `..`, nor have `#` (write %23) or line breaks")
    return f"{scheme}://{rest}"


class Client:
    """A client for what lies below a URI. Unsupported where obstore is not installed.

    options: settings of obstore (`endpoint`, `region`, `access_key_id`, ...), before what the environment says.
    timeout: seconds after which a call that fails is not tried again.
    """

    def __init__(self, uri: str, options: dict[str, str], timeout: float) -> None:
        self._uri, self._options, self.timeout = uri, options, timeout
        self._obstore = _imported()
        self.errors: Any = self._obstore.exceptions
        self._made: Any = None

    def ask(self, verb: str, key: str, call: Callable[[Any], T]) -> T:
        """Call with obstore's store, and again while that fails in a way that may pass. StoreError."""
        deadline = time.monotonic() + self.timeout
        pause = 0.1
        with self._mapped(verb, key):
            while True:
                try:
                    return self._call(call)
                except self.errors.GenericError as e:
                    if not _PASSING.search(str(e)) or time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, 5.0)

    def ask_once(self, verb: str, key: str, call: Callable[[Any], T]) -> T:
        """Likewise, for what cannot be asked twice."""
        with self._mapped(verb, key):
            return self._call(call)

    def _call(self, call: Callable[[Any], T]) -> T:
        if _owner and _owner[0] != os.getpid():
            raise StoreError(f"{self._uri}: used in a forked process, where its client cannot run: spawn it instead")
        _owner[:] = [os.getpid()]
        if self._made is None:
            self._made = _made(self._obstore, self._uri, self._options, self.timeout)
        return _off_main(lambda: call(self._made))

    @contextlib.contextmanager
    def _mapped(self, verb: str, key: str) -> Iterator[None]:
        """Turn obstore's errors into StoreErrors that say what, where and what to do."""
        where = f"{self._uri}/{key}" if key else self._uri
        known = self.errors
        try:
            yield
        except StoreError:
            raise
        except (known.BaseError, FileNotFoundError) as e:
            text = str(e)
            if "NoSuchBucket" in text or "ContainerNotFound" in text:
                raise StoreError(f"cannot {verb} {where}: there is no such bucket") from None
            if isinstance(e, FileNotFoundError):
                raise KeyMissing(f"cannot {verb} {where}: no such key") from None
            raise StoreError(f"cannot {verb} {where}: {_brief(text)}{_advice(known, e)}") from None


def _imported() -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as e:
        raise Unsupported(f"URIs of object stores need obstore: pip install 'distckpt[object]' ({e})") from e
    return obstore


def _made(obstore: Any, uri: str, options: dict[str, str], timeout: float) -> Any:
    endpoints = [options.get("endpoint", ""), *(os.environ.get(name, "") for name in _ENDPOINTS)]
    settings: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=min(timeout / 2, REQUEST)),  # so that one that hangs is asked again
            "connect_timeout": timedelta(seconds=min(timeout / 2, 10.0)),
            "allow_http": any(endpoint.startswith("http://") for endpoint in endpoints),
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
    while thread.is_alive():  # ends: its requests have timeouts
        thread.join(0.1)  # a signal that another thread took is handled between two, not when all is over
    if problem:
        raise problem[0]
    return result[0]


def _brief(text: str) -> str:
    """What an error says, on one line, without signatures in URLs."""
    line = " ".join(text.partition("Debug source")[0].split())
    return re.sub(r"<\?xml[^>]*>|\?[^ )]*", "", line)[:500]


def _advice(known: Any, error: Exception) -> str:
    text = str(error)
    if "169.254." in text or "metadata.google" in text:  # where a cloud's own machines find theirs
        return " (there are no credentials: set them in the environment or in ~/.aws, as for the cloud's own tools)"
    if "Account must be specified" in text:
        return " (set AZURE_STORAGE_ACCOUNT_NAME)"
    refused = isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError))
    if refused or re.search(r"status code: 40[13]", text):
        return " (check the credentials, and that they may read, write, list and delete here)"
    if "timed out" in text or "error sending request" in text:
        return " (the server does not answer: check endpoint, region and network)"
    return ""
