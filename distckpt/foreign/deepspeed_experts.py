"""Experts in a DeepSpeed tag: which expert of the whole layer each rank's are, and which ranks share them out. Pure.

Expert k of expert-parallel rank r, of which each has n, is expert r * n + k of its layer. Files of experts have these
numbers; what rank 0 says of its optimizer has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_WITHIN = "experts.deepspeed_experts."


@dataclass(frozen=True, slots=True)
class Experts:
    """How many experts each layer has, by what their names begin with.

    data_first: neighbouring ranks have the same experts (`use_data_before_expert_parallelism`), not neighbouring ones.
    """

    counts: Mapping[str, int]
    data_first: bool = False

    @staticmethod
    def of_names(names: Iterable[str], *, data_first: bool) -> Experts:
        """Experts of which these are the tensors."""
        numbers: dict[str, set[str]] = {}
        for name in names:
            before, within, rest = name.partition(_WITHIN)
            if within:
                numbers.setdefault(before + within, set()).add(rest.partition(".")[0])
        return Experts({lead: len(found) for lead, found in numbers.items()}, data_first)

    def number_of(self, name: str) -> tuple[str, int, str] | None:
        """(what a name begins with, the expert's number, the rest) of an expert's tensor; None for any other."""
        lead = next((lead for lead in self.counts if name.startswith(lead)), None)
        if lead is None:
            return None
        number, dot, rest = name.removeprefix(lead).partition(".")
        if not number.isdigit():
            raise FormatError(f"{name}: an expert without a number")
        return lead, int(number), dot + rest

    def alike(self, name: str) -> str:
        """Name that all experts of a layer have in common."""
        found = self.number_of(name)
        return f"{found[0]}*{found[2]}" if found else name

    def named(self, name: str, size: int, rank: int) -> str:
        """Name in the whole layer of what expert-parallel rank `rank` of `size` calls so. FormatError."""
        found = self.number_of(name)
        if found is None:
            return name
        lead, number, rest = found
        own = self.counts[lead] // size
        if self.counts[lead] % size or number >= own:
            raise FormatError(f"{name}: of {self.counts[lead]} experts, over {size} ranks")
        return f"{lead}{rank * own + number}{rest}"

    def is_of(self, name: str, size: int, rank: int) -> bool:
        """Whether expert-parallel rank `rank` of `size` has what is called so in the whole layer."""
        found = self.number_of(name)
        return found is None or found[1] // max(1, self.counts[found[0]] // size) == rank

    def part(self, rank: int, ranks: int, size: int) -> int:
        """Rank of `size` that expert-parallel rank `rank` of `ranks` is, for a layer over fewer ranks."""
        return rank * size // ranks if self.data_first else rank % size

    def shares(self, ranks: Sequence[int], count: int) -> list[list[int]]:
        """Ranks that share a group of parameters out over `count` of them, for each expert-parallel rank."""
        size = len(ranks) // count
        if self.data_first:
            return [[*ranks[part * count : (part + 1) * count]] for part in range(size)]
        return [[*ranks[part::size]] for part in range(size)]
