"""What a load did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(slots=True)
class LoadReport:
    """What a load did. Names are fqns of the live state.

    `missing` and `unexpected` are empty unless asked for (strict=False, only=). `bytes_read` counts what this rank
    read from the store, in bytes; `seconds` is wall time. `unverified` tensors are of another tool's file, of which no
    checksum covers a part; verify=True has them checked whole. `metrics` were recorded with it, and `world_size` ranks
    saved it.
    """

    step: int
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    fell_back_from: dict[int, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1
    bytes_read: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"step {self.step}: {len(self.loaded)} tensors, {self.bytes_read / 1e6:.1f} MB read in {self.seconds:.2f} s"
        ]
        lines += [f"  fell back from step {step}: {why}" for step, why in self.fell_back_from.items()]
        lines += [f"  missing (left as it was): {name}" for name in self.missing]
        lines += [f"  unexpected (not loaded): {name}" for name in self.unexpected]
        lines += [f"  cast: {name} {how}" for name, how in self.cast.items()]
        if self.unverified:
            lines.append(
                f"  unverified: {len(self.unverified)} tensors, whose source has no checksum of a part of them"
            )
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
