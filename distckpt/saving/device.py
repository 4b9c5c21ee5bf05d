"""Copies from a CUDA device into an arena, beside what the device is doing.

They run on a stream of their own, and the training process waits for none of them. What may change at any time
(buffers, gradients) is copied before the device goes on, parameters and their states before the next optimizer step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from distckpt.saving.arena import Arena

_streams: dict[torch.device, torch.cuda.Stream] = {}


def pin(arena: Arena) -> None:
    """Have the device copy into an arena directly. Where the system refuses, copies are slower, and right."""
    if not arena.unpin:
        place = ctypes.addressof(ctypes.c_char.from_buffer(arena.view))
        runtime: Any = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(place, arena.nbytes, 0)) == 0:
            arena.unpin = lambda: runtime.cudaHostUnregister(place)


def copy(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], lasting: Sequence[bool]
) -> Callable[[], None]:
    """Begin to copy from one device. Returns what waits until all of it is done.

    lasting: which sources stay as they are until an optimizer steps.
    """
    device = sources[0].device
    training = torch.cuda.current_stream(device)
    side = _streams.setdefault(device, torch.cuda.Stream(device))
    side.wait_stream(training)
    with torch.cuda.stream(side):
        changing = _copied(targets, sources, [not lasts for lasts in lasting])
        done = _copied(targets, sources, lasting)
    for source in sources:
        source.record_stream(side)
    training.wait_event(changing)

    def fence(*_: object) -> None:
        torch.cuda.current_stream(device).wait_event(done)
        hook.remove()

    hook = register_optimizer_step_pre_hook(fence)
    return done.synchronize


def _copied(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], which: Sequence[bool]
) -> torch.cuda.Event:
    """Enqueue some of the copies; the event tells when they are done."""
    chosen = [(t, s) for t, s, wanted in zip(targets, sources, which, strict=True) if wanted]
    if chosen:
        torch._foreach_copy_([t for t, _ in chosen], [s for _, s in chosen], non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return event
