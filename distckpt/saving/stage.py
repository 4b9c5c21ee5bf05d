"""Copying live tensors into an arena, where they lie as they will in the data file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.format.datafile import Image


def stage(image: Image, chunks: Mapping[str, tuple[str, torch.Tensor]], view: memoryview) -> None:
    """Make the first `image.table_start` bytes of `view` those of the image. chunks: name -> (fqn, live tensor)."""
    view[: len(image.header)] = image.header
    memory = torch.frombuffer(view, dtype=torch.uint8)
    targets, sources = [], []
    for segment in image.segments:
        if segment.nbytes:
            source = chunks[segment.name][1].detach().resolve_conj().resolve_neg()
            place = memory[segment.start : segment.start + segment.nbytes]
            targets.append(place.view(source.dtype).view(source.shape))
            sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
    view[image.objects_start : image.table_start] = image.objects
