"""Copying live tensors into an arena, where they lie as they will in the data file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.format.datafile import Image
    from distckpt.saving.arena import Arena


def stage(image: Image, chunks: Sequence[torch.Tensor], arena: Arena) -> None:
    """Make the first `image.table_start` bytes of an arena those of the image. chunks: live, in file order."""
    view, header = arena.view, len(image.header)
    view[:header] = image.header
    sources = [chunk.resolve_conj().resolve_neg() for chunk in chunks]
    if arena.laid[:2] != (image.packed, header):
        memory = torch.frombuffer(view, dtype=torch.uint8)
        places = (memory[header + s.start : header + s.start + s.nbytes] for s in image.segments)
        targets = [p.view(t.dtype).view(t.shape) for p, t in zip(places, sources, strict=True)]
        arena.laid = (image.packed, header, targets)
    if sources:
        torch._foreach_copy_(arena.laid[2], sources)
    view[image.objects_start : image.table_start] = image.objects
