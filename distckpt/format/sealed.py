"""A JSON object that proves itself: its last member is `digest`, over every byte before it.

commit.json, the acks and the records of launches are sealed: each decides what is resumed, and none stands below
another's digest. Signed, they prove who made them, too.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt
from distckpt.format.checksum import digest
from distckpt.format.text import read_json

if TYPE_CHECKING:
    from collections.abc import Callable

_TRAILER = len(f',"digest":"{digest()}"}}\n')
_SIGNATURE = re.compile(rb',"signature":"([a-z0-9:]+)"\Z')
_MOST_SIGNATURE = 1000


def seal(body: dict[str, Any], sign: Callable[[bytes], str] | None = None) -> bytes:
    """JSON of an object, on one line, and the digest as its last member.

    sign: makes the member before that, `signature`, over every byte before it.
    """
    text = json.dumps(body, separators=(",", ":"), allow_nan=False)[:-1].encode()
    if sign:
        text += f',"signature":"{sign(text)}"'.encode()
    return text + _trailer(text)


def unseal(data: bytes, check: Callable[[bytes, str], None] | None) -> Any:
    """Value that was sealed. Corrupt where the digest does not hold, before anything is parsed; FormatError.

    check: raises for what was signed and its signature ("" where there is none).
    """
    text, trailer = data[:-_TRAILER], data[-_TRAILER:]
    if trailer != _trailer(text):
        raise Corrupt(f"its digest does not match its {len(data)} bytes")
    if check:
        found = _SIGNATURE.search(text, max(0, len(text) - _MOST_SIGNATURE))
        check(text[: found.start()] if found else text, found[1].decode() if found else "")
    return read_json(text + b"}")


def _trailer(text: bytes) -> bytes:
    return f',"digest":"{digest(text)}"}}\n'.encode()
