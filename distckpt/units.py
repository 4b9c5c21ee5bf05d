"""Sizes as people write them, such as `2 TB` and `512 MiB`; and sizes and durations as they read them."""

from __future__ import annotations

import re

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_BYTES |= {f"{unit}i": 1 << (10 * power) for power, unit in enumerate("kmgtp", 1)}
_SECONDS = {"d": 86400, "h": 3600, "min": 60}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([kmgtp]i?)?b?")


def as_bytes(size: str | int) -> int:
    """Bytes of a size such as "2 TB" or "512MiB", or a number of them. ValueError."""
    if type(size) is int and size >= 0:
        return size
    match = _SIZE.fullmatch(size.strip().lower()) if isinstance(size, str) else None
    if not match:
        raise ValueError(f"{size!r}: a size such as '2 TB' or '500 MB', or a number of bytes, is expected")
    return int(float(match[1]) * _BYTES[match[2] or ""])


def size_text(nbytes: int) -> str:
    """Give a number of bytes as people read it: `1.2 GB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} PB"


def duration_text(seconds: float) -> str:
    """Give seconds as people read them: `2 h`, `90 s`."""
    for unit, length in _SECONDS.items():
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:g} s"
