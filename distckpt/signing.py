"""Signatures: who may write what is resumed from. Ed25519 keys, in the files that `ssh-keygen -t ed25519` makes.

DISTCKPT_SIGN_KEY           file of a private key without a passphrase: what is sealed here (commits, acks, records of
                            launches) is signed with it, and summed with SHA-256. The same for all ranks.
DISTCKPT_REQUIRE_SIGNATURE  file of public keys, a line each, as in `.pub`: nothing is read but what one of them signed.

Both are the environment's and no argument, so that they hold for whatever a job runs: the writer process, commands
after a commit, the command line, another framework's hooks. docs/signing.md tells what that is good for.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from base64 import b64encode
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, StoreError, Unsupported, Untrusted
from distckpt.format.checksum import CRC32C, SHA256, Algorithm

if TYPE_CHECKING:
    from collections.abc import Callable

SIGN_KEY = "DISTCKPT_SIGN_KEY"
REQUIRE_SIGNATURE = "DISTCKPT_REQUIRE_SIGNATURE"

_SIGNATURE = re.compile(r"ed25519:([0-9a-f]{64}):([0-9a-f]{128})")
_PUBLIC = re.compile(rb"([a-z]\S*[ \t]+[A-Za-z0-9+/=]+)(?:[ \t].*)?")


def signer() -> Callable[[bytes], str] | None:
    """Sign as this process is told to; None if it is not. FormatError, StoreError, Unsupported for its key."""
    if (path := _named(SIGN_KEY)) is None:
        return None
    key, public = _private(path)
    return lambda text: f"ed25519:{public}:{key.sign(text).hex()}"


def trusted() -> Callable[[bytes, str], None] | None:
    """Check a signature as this process is told to; None if it need not. Errors as of `signer`.

    The check raises Untrusted unless a text has the signature of one of the keys.
    """
    path = _named(REQUIRE_SIGNATURE)
    return _check(_publics(path), f"a key of {path}") if path else None


def own() -> Callable[[bytes, str], None] | None:
    """Check what ranks of one job tell each other through storage: it becomes part of what is signed here."""
    path = _named(SIGN_KEY)
    return trusted() or (_check(frozenset({_private(path)[1]}), f"the key of {path}") if path else None)


def algorithm() -> Algorithm:
    """How data files that are written here are summed: a signature above a CRC would prove nothing."""
    return SHA256 if _named(SIGN_KEY) else CRC32C


def look() -> None:
    """Raise now what is wrong with the keys. FormatError, StoreError, Unsupported."""
    for name in filter(_named, (SIGN_KEY, REQUIRE_SIGNATURE)):
        os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())  # a program may change its directory
    trusted()
    own()
    path, required = _named(SIGN_KEY), _named(REQUIRE_SIGNATURE)
    if path and required and _private(path)[1] not in _publics(required):
        raise Untrusted(f"{SIGN_KEY}={path}: its public key is not in {REQUIRE_SIGNATURE}={required}: add it there")


def refuse_keyless() -> None:
    """Untrusted where what is saved here could not be read here: for it cannot be signed, and must be."""
    path = _named(REQUIRE_SIGNATURE)
    if path and not _named(SIGN_KEY):
        raise Untrusted(f"{REQUIRE_SIGNATURE}={path} is set, {SIGN_KEY} is not: nothing saved here could be resumed")


def refuse_unsigned(name: str) -> None:
    """Untrusted for what no key can have signed, where signatures are required."""
    if path := _named(REQUIRE_SIGNATURE):
        raise Untrusted(f"{name}: is no checkpoint of distckpt, and so not signed; {REQUIRE_SIGNATURE}={path} is set")


def refuse_to_commit() -> None:
    """Untrusted where what ranks have signed would be committed without a signature."""
    if not _named(SIGN_KEY):
        raise Untrusted(
            f"other ranks have signed what they saved, and {SIGN_KEY} is not set here: set it on every rank"
        )


def _named(name: str) -> str | None:
    """File that a variable names; None if it is not set. FormatError for an empty one, which is meant to name one."""
    if os.environ.get(name) == "":
        raise FormatError(f"{name} is set, and empty: the file of a key is expected, or no such variable")
    return os.environ.get(name)


def fingerprint(signature: str) -> str:
    """Return the fingerprint of a signature's key, as `ssh-keygen -l` has it; "" for what is no signature."""
    if not (found := _SIGNATURE.fullmatch(signature)):
        return ""
    parts = (b"ssh-ed25519", bytes.fromhex(found[1]))
    blob = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    return "SHA256:" + b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _check(keys: frozenset[str], whose: str) -> Callable[[bytes, str], None]:
    def check(text: bytes, signature: str) -> None:
        if not signature:
            raise Untrusted(f"it is not signed; the signature of {whose} is required")
        found = _SIGNATURE.fullmatch(signature)
        if not found or found[1] not in keys:
            raise Untrusted(f"it is signed by {fingerprint(signature) or 'nobody known'}, not by {whose}")
        _, ed25519, invalid = _cryptography()
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(found[1]))
        try:
            public.verify(bytes.fromhex(found[2]), text)
        except invalid as e:
            raise Untrusted(f"its signature by {fingerprint(signature)} is not one of its content") from e

    return check


@lru_cache
def _private(path: str) -> tuple[Any, str]:
    """(key, its public key in hexadecimal digits)."""
    serialization, ed25519, _ = _cryptography()
    data = _content(path, SIGN_KEY)
    load = serialization.load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else serialization.load_pem_private_key
    try:
        key = load(data, password=None)
    except Exception as e:  # of many classes
        raise FormatError(f"{SIGN_KEY}={path}: {_WANTED}: {e}") from e
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FormatError(f"{SIGN_KEY}={path}: holds a {type(key).__name__}; {_WANTED}")
    return key, key.public_key().public_bytes_raw().hex()


_WANTED = "an Ed25519 private key without a passphrase is expected: ssh-keygen -t ed25519 -N '' -f FILE"


@lru_cache
def _publics(path: str) -> frozenset[str]:
    """Public keys of a file, in hexadecimal digits."""
    serialization, ed25519, _ = _cryptography()
    found = set()
    for number, line in enumerate(_content(path, REQUIRE_SIGNATURE).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        where = f"{REQUIRE_SIGNATURE}={path}, line {number}"
        bare = _PUBLIC.fullmatch(line.strip())
        try:
            key = serialization.load_ssh_public_key(bare[1] if bare else line)
        except Exception as e:  # of many classes
            raise FormatError(f"{where}: no public key (`ssh-ed25519 AAAA...`, as in a .pub file): {e}") from e
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise FormatError(f"{where}: is a {type(key).__name__}; ssh-ed25519 is expected")
        found.add(key.public_bytes_raw().hex())
    if not found:
        raise FormatError(f"{REQUIRE_SIGNATURE}={path}: has no key")
    return frozenset(found)


def _content(path: str, name: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as e:
        raise StoreError(f"{name}={path}: cannot be read: {e.strerror or e}") from e


def _cryptography() -> tuple[Any, Any, Any]:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as e:
        raise Unsupported(f"{SIGN_KEY}, {REQUIRE_SIGNATURE}: pip install 'distckpt[sign]' is needed ({e})") from e
    return serialization, ed25519, InvalidSignature
