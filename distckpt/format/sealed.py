"""A JSON object that proves itself: its last member is `digest`, over every byte before it.

commit.json, the acks and the records of launches are sealed: each decides what is resumed, and none stands below
another's digest.
"""

from __future__ import annotations

import json
from typing import Any

from distckpt.errors import Corrupt
from distckpt.format.checksum import DIGEST_SIZE, digest
from distckpt.format.text import read_json

_TRAILER = len(',"digest":""}\n') + 2 * DIGEST_SIZE


def seal(body: dict[str, Any]) -> bytes:
    """JSON of an object, on one line, and the digest as its last member."""
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)[:-1].encode()
    return text + _trailer(text)


def unseal(data: bytes) -> Any:
    """Value that was sealed. Corrupt where the digest does not hold, before anything is parsed; FormatError."""
    text, trailer = data[:-_TRAILER], data[-_TRAILER:]
    if trailer != _trailer(text):
        raise Corrupt(f"its digest does not match its {len(data)} bytes")
    return read_json(text + b"}")


def _trailer(text: bytes) -> bytes:
    return f',"digest":"{digest(text)}"}}\n'.encode()
