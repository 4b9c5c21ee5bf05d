"""A pickle's opcodes, gone through before it is unpickled: no memo index may ask for more memory than the pickle needs.

Python's unpickler keeps what is memoised in an array as long as the largest index says: ten bytes can ask for 64 GB.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from distckpt.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable

_ALONE = rb"[(012NQRabdelost)u}\]\x81\x85-\x89\x8f-\x94\x97\x98]"
_FIXED = rb"[Khq\x80\x82].|[M\x83]..|[Jj\x84].{4}|[G\x95].{8}"
_SIZES = {ord(c): n for n, letters in ((1, "Khq\x80\x82"), (2, "M\x83"), (4, "Jjr\x84"), (8, "G\x95")) for c in letters}
_LINES = {ord(c): n for n, letters in ((1, "FILSVgP"), (2, "ci")) for c in letters}
_COUNTED = {ord(c): n for n, letters in ((1, "UC\x8a\x8c"), (4, "TXB\x8b"), (8, "\x8d\x8e\x96")) for c in letters}
_AT_ONCE = 1000  # opcodes; the regular expression keeps something of each that it has passed


def check_memo(data: bytes, where: str) -> bool:
    """Whether the pickle that begins here ends here, too.

    FormatError for a memo index that is larger than a pickle of this length can have, or an unknown opcode.
    """
    simple = _simple(len(data))
    at = 0
    while data[at : at + 1] not in {b"", b"."}:
        found = simple(data, at)
        at = found.end() if found else _passed(data, at, where)
    return at < len(data)


def _simple(length: int) -> Callable[[bytes, int], re.Match[bytes] | None]:
    """Match of opcodes of fixed length. The index of LONG_BINPUT is at most about `length`."""
    low = min(max(length.bit_length() - 1, 0) // 8, 3)  # bytes below the highest that is not zero
    put = b"r.{%d}[\\x00-\\x%02x]%s" % (low, min(length >> 8 * low, 0xFF), b"\\x00" * (3 - low))
    return re.compile(b"(?:%s|%s|%s){1,%d}" % (_ALONE, _FIXED, put, _AT_ONCE), re.DOTALL).match


def _passed(data: bytes, at: int, where: str) -> int:
    """Where the opcode after the one at `at`, of variable length, begins."""
    code = data[at]
    if code in _COUNTED:
        start = at + 1 + _COUNTED[code]
        return start + int.from_bytes(data[at + 1 : start], "little")
    if len(data) - at <= _SIZES.get(code, 0):
        return len(data)  # cut short: the unpickler says so
    end = at
    for _ in range(_LINES.get(code, int(code == ord("p")))):
        end = data.find(b"\n", end + 1)
        if end < 0:
            return len(data)
    number = data[at + 1 : end]
    if end == at or (code == ord("p") and not (number.isdigit() and len(number) < 10 and int(number) <= len(data))):
        raise FormatError(f"{where}: not a pickle that can be read: opcode {data[at : at + 5]!r} at byte {at}")
    return end + 1
