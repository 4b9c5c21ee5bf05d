"""What the coordinator of a dcp.save makes of all ranks' parts: the manifest's tensors, and the objects.

DCP keeps one rank's value of a name for all; so what differs between ranks under one name is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, Mismatch, Unsupported
from distckpt.format import objects
from distckpt.format.manifest import TensorInfo
from distckpt.format.partition import divided

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.adapters.dcp.names import Structure
    from distckpt.adapters.dcp.part import Part
    from distckpt.format.box import Box, Shape


@dataclass(frozen=True, slots=True)
class Whole:
    """Content of a checkpoint: tensors and aliases as the manifest has them, encoded objects by name."""

    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    objects: dict[str, bytes]


def joined(structure: Structure, parts: Sequence[Part]) -> Whole:
    """Join the ranks' parts. Mismatch where ranks differ under one name; Unsupported."""
    _refuse_differing(parts)
    values = {fqn: objects.decode(encoded) for part in parts for fqn, encoded in part.values.items()}
    named = structure.named(values)
    names = {leaf.fqn: name for name, leaf in named.tensors.items()}
    expected = dict(zip(structure.tensors, structure.tensors, strict=True)) | structure.outline()[0]
    if wrong := [fqn for fqn in names if names[fqn] != expected[fqn]]:
        raise Unsupported(f"{wrong[0]}: what it is part of is neither an optimizer's state dict nor anything else")
    aliases = _aliases(parts)
    tensors = {name: info for name, info in _tensors(parts).items() if name not in aliases}
    if lost := names.keys() - {f for f in names if names[f] in tensors or names[f] in aliases}:
        raise Unsupported(f"{min(lost)}: no rank was given it to write")
    return Whole(tensors, aliases, {n: objects.encode(value, n) for n, value in named.objects.items()})


def _refuse_differing(parts: Sequence[Part]) -> None:
    ranks: dict[str, dict[str, list[int]]] = {}
    for part in parts:
        for fqn, value in part.sums.items():
            ranks.setdefault(fqn, {}).setdefault(value, []).append(part.rank)
    differing = {fqn: list(by_value.values()) for fqn, by_value in ranks.items() if len(by_value) > 1}
    if differing:
        told = [f"  {fqn}: rank {a[0]} and rank {b[0]} differ" for fqn, (a, b, *_) in sorted(differing.items())[:20]]
        more = [f"  and {len(differing) - 20} more"] if len(differing) > 20 else []
        raise Mismatch(
            "\n".join(
                [
                    "ranks have different values under one name, and dcp.save keeps one rank's for all:",
                    *told,
                    *more,
                    "make them equal, give each rank a name of its own, or use distckpt.save, which keeps each rank's",
                ]
            )
        )


def _aliases(parts: Sequence[Part]) -> dict[str, str]:
    aliases = {fqn: first for part in parts for fqn, first in part.ties.items()}
    for part in parts:
        if untied := aliases.keys() & part.chunks.keys():
            raise Mismatch(f"{min(untied)}: tied to {aliases[min(untied)]} on some ranks, and not on rank {part.rank}")
    return aliases


def _tensors(parts: Sequence[Part]) -> dict[str, TensorInfo]:
    pieces: dict[str, list[tuple[int, Box]]] = {}
    kinds: dict[str, tuple[Shape, str]] = {}
    for part in parts:
        for name, (shape, dtype, boxes) in part.chunks.items():
            if kinds.setdefault(name, (shape, dtype)) != (shape, dtype):
                raise Mismatch(f"{name}: rank {part.rank} has {dtype}{list(shape)}, another {kinds[name]}")
            pieces.setdefault(name, []).extend((part.rank, box) for box in boxes)
    found = {}
    for name, (shape, dtype) in kinds.items():
        partition = divided(shape, pieces[name])
        try:
            partition.check()
        except FormatError as e:
            raise Unsupported(f"{name}: the parts that DCP gave the ranks to write do not make it up: {e}") from e
        found[name] = TensorInfo(shape, dtype, partition)
    return found
