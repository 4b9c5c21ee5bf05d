"""What an unpickled tree becomes: plain values and located tensors; what cannot be carried says what it is."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

from distckpt.errors import FormatError
from distckpt.foreign.located import Located, Undecodable
from distckpt.foreign.pickles import Attributes, Dtype, Unknown


def plain(value: Any, where: str) -> Any:
    """Value with what cannot be carried replaced by Undecodable, which says what it is; dtypes by their names.

    FormatError for one that unfolds without end: of members that it shares, or that contain it.
    """
    return _Plain(where).visit(value, 0)


class _Plain:
    def __init__(self, where: str) -> None:
        self._where, self._left = where, _MOST_VALUES

    def visit(self, value: Any, depth: int) -> Any:
        """One value, `depth` levels down."""
        self._left -= 1
        if self._left < 0 or depth > _MOST_DEPTH:
            raise FormatError(f"{self._where}: unfolds to more than {_MOST_VALUES} values, or {_MOST_DEPTH} levels")
        kind = type(value)
        if kind is Dtype:
            return f"torch.{value}"
        if value is None or kind in {bool, int, float, complex, str, bytes, Located, Undecodable}:
            return value
        if kind in {dict, OrderedDict, Counter}:
            keys = [self.visit(key, depth + 1) for key in value]
            if odd := [key for key in keys if type(key) in {Located, Undecodable}]:
                return Undecodable(f"{self._where}: a dict with a {type(odd[0]).__name__} as a key")
            members = [self.visit(member, depth + 1) for member in value.values()]
            return kind(dict(zip(keys, members, strict=True)))
        if kind in {list, tuple, set, frozenset}:
            return kind([self.visit(member, depth + 1) for member in value])
        if isinstance(value, Attributes):
            return self.visit(value.state, depth + 1)
        return Undecodable(f"{self._where}: {_name(value)}, which is no plain value: neither imported nor called")


def _name(value: Any) -> str:
    if isinstance(value, type) and issubclass(value, Unknown):
        return f"the global {value.name}"
    return f"an object of {value.name}" if isinstance(value, Unknown) else f"a {type(value).__name__}"


_MOST_DEPTH, _MOST_VALUES = 100, 2_000_000
