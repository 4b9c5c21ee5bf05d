"""Non-tensor values as tagged JSON: what state_dicts hold besides tensors. Never pickle.

What JSON has stands as itself; everything else is an object with one key that begins with `$`. A value comes back
with its exact type and bits, or is refused on the way in, with the path to it.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, Unsupported
from distckpt.format.text import read_json, shown

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_DEPTH = 100
SAFE_INT = 2**53
"""Larger integers are tagged: readers in other languages would round them."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands where a tensor stood: its fqn in the checkpoint, and what to make of it (`torch` or `numpy`)."""

    fqn: str
    kind: str = "torch"


def encode(value: Any, name: str = "$") -> bytes:
    """JSON text of a value. Unsupported, with the path (which begins with `name`), for a type the format has not."""
    return json.dumps(tag(value, name), separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes | memoryview) -> Any:
    """Value that `encode` wrote. FormatError for anything else."""
    return untag(read_json(data))


def tag(value: Any, name: str = "$") -> Any:
    """Give a value as what JSON has. Unsupported like `encode`."""
    return _tag(value, name, 0)


def untag(value: Any) -> Any:
    """Value that `tag` was given. FormatError for anything else."""
    try:
        return _untag(value, 0)
    except (ValueError, TypeError, struct.error) as e:
        if isinstance(e, FormatError):
            raise
        raise FormatError(f"not a tagged JSON value: {e}") from e


def _tag(value: Any, path: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Unsupported(f"{path}: nested more than {MAX_DEPTH} deep, or in a circle")
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -SAFE_INT <= value <= SAFE_INT else {"$int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
    if kind is list:
        return [_tag(v, f"{path}[{i}]", depth + 1) for i, v in enumerate(value)]
    if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
        return {k: _tag(v, f"{path}.{k}", depth + 1) for k, v in value.items()}
    for tag, (known, to_json, _) in _TAGS.items():
        if kind is known:
            return {tag: to_json(value, path, depth + 1)}
    raise Unsupported(
        f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be saved: use None, bool, int, float, str, bytes, "
        "complex, tuple, list, set, dict or a tensor (a NumPy scalar: .item())"
    )


def _sequence(value: Any, path: str, depth: int) -> list[Any]:
    return [_tag(v, f"{path}[{i}]", depth) for i, v in enumerate(value)]


def _unordered(value: Any, path: str, depth: int) -> list[Any]:
    """Members in the order of their text, so that equal sets have equal bytes."""
    return sorted(_sequence(value, path, depth), key=lambda v: json.dumps(v, sort_keys=True))


def _pairs(value: Any, path: str, depth: int) -> list[Any]:
    return [
        [_tag(k, f"{path}.<key>", depth), _tag(v, f"{path}.{k if type(k) is str else shown(k)}", depth)]
        for k, v in value.items()
    ]


def _members(value: Any, depth: int) -> list[Any]:
    if type(value) is not list:
        raise FormatError(f"not a list of members: {shown(value)}")
    return [_untag(v, depth) for v in value]


def _mapping(value: Any, depth: int) -> dict[Any, Any]:
    if type(value) is not list or not all(type(pair) is list and len(pair) == 2 for pair in value):
        raise FormatError(f"not a list of pairs: {shown(value)}")
    found = {_untag(k, depth): _untag(v, depth) for k, v in value}
    if len(found) != len(value):
        raise FormatError(f"two keys are equal: {shown(value)}")
    return found


def _reference(value: Any, _depth: int) -> TensorRef:
    match value:
        case [str(fqn), str(kind)]:
            return TensorRef(fqn, kind)
    raise FormatError(f"not a reference to a tensor: {shown(value)}")


_TAGS: dict[str, tuple[type, Callable[[Any, str, int], Any], Callable[[Any, int], Any]]] = {
    "$int": (int, lambda v, _path, _depth: hex(v), lambda v, _depth: int(v, 16)),
    "$float": (
        float,
        lambda v, _path, _depth: struct.pack(">d", v).hex(),
        lambda v, _depth: struct.unpack(">d", bytes.fromhex(v))[0],
    ),
    "$bytes": (
        bytes,
        lambda v, _path, _depth: base64.b64encode(v).decode(),
        lambda v, _depth: base64.b64decode(v, validate=True),
    ),
    "$complex": (
        complex,
        lambda v, _path, _depth: struct.pack(">dd", v.real, v.imag).hex(),
        lambda v, _depth: complex(*struct.unpack(">dd", bytes.fromhex(v))),
    ),
    "$tuple": (tuple, _sequence, lambda v, depth: tuple(_members(v, depth))),
    "$set": (set, _unordered, lambda v, depth: set(_members(v, depth))),
    "$frozenset": (frozenset, _unordered, lambda v, depth: frozenset(_members(v, depth))),
    "$dict": (dict, _pairs, _mapping),
    "$ordered": (
        OrderedDict,
        _pairs,
        lambda v, depth: OrderedDict(_mapping(v, depth)),
    ),
    "$counter": (
        Counter,
        _pairs,
        lambda v, depth: Counter(_mapping(v, depth)),
    ),
    "$tensor": (
        TensorRef,
        lambda v, _path, _depth: [v.fqn, v.kind],
        _reference,
    ),
}


def _untag(value: Any, depth: int) -> Any:
    if depth > 2 * MAX_DEPTH:
        raise FormatError(f"nested more than {2 * MAX_DEPTH} deep")
    if isinstance(value, list):
        return [_untag(v, depth + 1) for v in value]
    if not isinstance(value, dict):
        return value
    tag = next((k for k in value if k.startswith("$")), None)
    if tag is None:
        return {k: _untag(v, depth + 1) for k, v in value.items()}
    if len(value) != 1 or tag not in _TAGS:
        raise FormatError(f"unknown tag {tag!r}")
    return _TAGS[tag][2](value[tag], depth + 1)


# -- parts of one value --------------------------------------------------------------------------------------------


def join(a: Any, b: Any, joins: str, key: str = "") -> Any:
    """Two parts of a value (tagged, or plain) in one: dicts by key, lists under the key `joins`. ValueError where they
    contradict each other.
    """  # noqa: D205
    if a == b and type(a) is type(b):
        return a
    if isinstance(a, dict) and isinstance(b, dict) and (a.keys() == b.keys() or not _tagged(a) | _tagged(b)):
        return {k: join(a[k], b[k], joins, k) if k in a and k in b else a.get(k, b.get(k)) for k in {**a, **b}}
    if isinstance(a, list) and isinstance(b, list):
        if key == joins:
            return [*a, *(member for member in b if member not in a)]
        if len(a) == len(b):
            return [join(x, y, joins) for x, y in zip(a, b, strict=True)]
        if all(isinstance(item, dict) and isinstance(item.get(joins), list) for item in [*a, *b]):
            some, more = sorted((a, b), key=len)
            return _join_groups(some, more, joins)
    raise ValueError(f"{a!r:.50} and {b!r:.50}")


def _join_groups(some: list[dict[str, Any]], more: list[dict[str, Any]], joins: str) -> list[dict[str, Any]]:
    """Groups of two parts, one of which lacks some. ValueError where it has one that the other has not."""
    whole = list(more)
    for group in some:
        same = (i for i, other in enumerate(whole) if {**other, joins: group[joins]} == group)
        if (i := next(same, None)) is None:
            raise ValueError(f"{group!r:.50} is no group of {more!r:.50}")
        whole[i] = join(whole[i], group, joins)
    return whole


def _tagged(value: dict[str, Any]) -> bool:
    return any(key.startswith("$") for key in value)
