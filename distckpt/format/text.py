"""JSON that was read from disk, and how a value is quoted in a message: for bytes that nobody vouches for yet."""

from __future__ import annotations

import json
from typing import Any

from distckpt.errors import FormatError

_MOST_SHOWN = 200
_MOST_MEMBERS = 1000
_INT_LIMIT = 2**63
_DIGITS = bytes(48 if 48 <= b < 58 else 45 if chr(b) in "[,: \t\r\n-" else 32 for b in range(256))
_LONG = b"-" + b"0" * len(str(_INT_LIMIT))
"""What an integer of 19 digits looks like through `_DIGITS`, after whatever may stand before a number."""


def read_json(data: bytes | memoryview) -> Any:
    """Value of strict JSON in UTF-8. FormatError for a name given twice, NaN, or an integer of more than 64 bits."""
    # a call for every integer would take longer than all else, and almost no file has one that is long
    parse_int = _int if _LONG in b" ".join((b"", data)).translate(_DIGITS) else None
    try:
        return json.loads(str(data, "utf-8"), object_pairs_hook=_unique, parse_int=parse_int, parse_constant=_refuse)
    except (ValueError, RecursionError) as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(f"not JSON: {e}") from e


def shown(value: object) -> str:
    """Short text of a value. One that unfolds without end, of members that it shares, is not unfolded."""
    try:
        text = repr(value) if _unfolds(value) else f"a {type(value).__name__} too large to show"
    except (RecursionError, ValueError):  # nested too deep, or an integer of thousands of digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) < _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _unfolds(value: object) -> bool:
    """Whether a value has a thousand members in all, or fewer."""
    left: list[Any] = [value]
    for _ in range(_MOST_MEMBERS):
        if not left:
            break
        found = left.pop()
        if isinstance(found, (dict, list, tuple, set, frozenset)):
            if len(found) > _MOST_MEMBERS:
                return False
            left += [*found, *found.values()] if isinstance(found, dict) else found
    return not left


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("a JSON object names a key twice")
    return found


def _int(text: str) -> int:
    # a sum of larger ones could have more digits than Python agrees to print in the message that refuses it
    if len(text) > len(str(-_INT_LIMIT)) or not -_INT_LIMIT <= (value := int(text)) < _INT_LIMIT:
        raise FormatError(f"integer {text[:30]} has more than 64 bits")
    return value


def _refuse(constant: str) -> None:
    raise FormatError(f"{constant} is not JSON")
