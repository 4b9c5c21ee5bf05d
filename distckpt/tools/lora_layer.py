"""One layer with LoRA merged in, as PEFT's layers merge it: operation by operation, so that the bits are the same.

The weight is in memory as a whole, with what is added to it: of a product in pieces the bits are others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distckpt.loading.stream import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.loading.open import Checkpoint


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that LoRA changes: its weight in the base, the adapter's tensors by what they are, and their scaling."""

    base: Checkpoint
    adapter: Checkpoint
    fqn: str
    parts: Mapping[str, str]
    scaling: float

    def weight(self, *, turned: bool) -> torch.Tensor:
        """Merge the weight, as PEFT's layers do."""
        held = {name: whole(self.adapter, fqn) for name, fqn in self.parts.items()}
        weight = whole(self.base, self.fqn)
        if "lora_A.weight" not in held:
            delta = _product(held["lora_embedding_B"], held["lora_embedding_A"], self.scaling, turned=turned)
            return weight.add_(delta.to(weight.dtype))
        delta = _product(held["lora_B.weight"], held["lora_A.weight"], self.scaling, turned=turned)
        if (magnitude := held.get("lora_magnitude_vector.weight")) is None:
            return weight.add_(delta)
        return _decomposed(weight, delta, magnitude, turned=turned)

    def bias(self, fqn: str) -> torch.Tensor:
        """Merge the bias that LoRA's own is added to."""
        return whole(self.base, fqn).add_(whole(self.adapter, self.parts["lora_B.bias"]) * self.scaling)


def _product(b: torch.Tensor, a: torch.Tensor, scaling: float, *, turned: bool) -> torch.Tensor:
    """What LoRA adds to a weight: in float32 where its matrices are of 16 bits, and rounded to them."""
    dtype = b.dtype
    delta = b.float() @ a.float() if dtype in {torch.float16, torch.bfloat16} else b @ a
    delta = (delta.T if turned else delta).mul_(scaling)
    return delta.to(dtype)


def _decomposed(weight: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """DoRA: the sum's rows are given the lengths that were learned."""
    rows = (weight.T if turned else weight) + (delta.T if turned else delta)
    factor = (magnitude / torch.linalg.norm(rows, dim=1).to(rows.dtype)).view(-1, 1)
    merged: torch.Tensor = (factor.T if turned else factor) * (weight + delta)
    return merged.to(weight.dtype)
