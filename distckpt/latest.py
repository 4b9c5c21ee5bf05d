"""What was made for the latest few keys, so that it is not made again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

T = TypeVar("T")

_MOST = 4


class Latest(Generic[T]):
    """Values of the latest keys. They must not be changed."""

    def __init__(self) -> None:
        self._made: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key; where there is none, what `make` makes."""
        found = self._made.pop(key, None) or make()
        self._made[key] = found
        for old in list(self._made)[:-_MOST]:
            self._made.pop(old, None)
        return found

    def clear(self) -> None:
        """Forget them all."""
        self._made.clear()
