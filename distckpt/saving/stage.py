"""Copying live tensors into an arena, where they lie as they will in the data file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distckpt.saving import device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distckpt.format.datafile import Image
    from distckpt.saving.arena import Arena


def stage(
    image: Image, chunks: Sequence[torch.Tensor], lasting: Sequence[bool], arena: Arena
) -> Callable[[], None] | None:
    """Make the first `image.table_start` bytes of an arena those of the image. chunks: live, in file order.

    lasting: which of them stay as they are until an optimizer steps. Returns what waits for copies from a device; None
    where there are none.
    """
    view, header = arena.view, len(image.header)
    view[:header] = image.header
    sources = [chunk.resolve_conj().resolve_neg() for chunk in chunks]
    if arena.laid[:2] != (image.packed, header):
        with torch.inference_mode(mode=False):  # made in that mode, they could not be written to outside of it
            memory = torch.frombuffer(view, dtype=torch.uint8)
            places = (memory[header + s.start : header + s.start + s.nbytes] for s in image.segments)
            targets = [p.view(t.dtype).view(t.shape) for p, t in zip(places, sources, strict=True)]
        arena.laid = (image.packed, header, targets)
    view[image.objects_start : image.table_start] = image.objects
    here = [i for i, source in enumerate(sources) if source.device.type != "cuda"]
    if here:
        torch._foreach_copy_([arena.laid[2][i] for i in here], [sources[i] for i in here])
    waits = []
    for place in {s.device for s in sources if s.device.type == "cuda"}:
        device.pin(arena)
        there = [i for i, source in enumerate(sources) if source.device == place]
        targets = [arena.laid[2][i] for i in there]
        waits.append(device.copy(targets, [sources[i] for i in there], [lasting[i] for i in there]))

    def wait() -> None:
        for of_device in waits:
            of_device()

    return wait if waits else None
