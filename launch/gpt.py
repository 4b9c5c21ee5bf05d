"""A byte-level GPT: pre-norm blocks, learned positions, the output layer tied to the byte embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a GPT. `dropout` is a probability, in attention, after each sublayer and after the embedding."""

    layers: int = 2
    width: int = 288
    heads: int = 6
    seq: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided among {self.heads} heads")


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer, each added to its input: [batch, seq, width] to the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.norm_1 = nn.LayerNorm(shape.width)
        self.qkv = nn.Linear(shape.width, 3 * shape.width)
        self.attention_out = nn.Linear(shape.width, shape.width)
        self.norm_2 = nn.LayerNorm(shape.width)
        self.up = nn.Linear(shape.width, 4 * shape.width)
        self.down = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self._drop(self.attention_out(self._attend(self.norm_1(x))))
        return x + self._drop(self.down(functional.gelu(self.up(self.norm_2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        return (
            functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            .transpose(1, 2)
            .flatten(2)
        )

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


class GPT(nn.Module):
    """Bytes int64[batch, seq] to logits of the next byte, float32[batch, seq, 256]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.embed = nn.Embedding(BYTES, shape.width)
        self.position = nn.Parameter(torch.empty(shape.seq, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, BYTES, bias=False)
        self.out.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # what is added to the residual stream is scaled down by the number of additions, as in GPT-2
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * shape.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        x = functional.dropout(x, self.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.out(self.norm(x)))
