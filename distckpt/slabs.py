"""Slabs: host memory that bytes pass through on their way, used again and again.

Where a device is at the other end they are pinned, and copies run on a stream of their own, beside what is read,
summed or written meanwhile. For the CPU there is no stream, and a copy is done when its call returns.

Invariant: a slab is handed out again only once all that was copied out of it, or into it, has arrived.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from typing_extensions import Self

_TILE = 128


class Slabs:
    """Slabs for copies from or to `devices`, for one save or load. All is copied once its block ends.

    The copies come after what the calling thread has asked of the devices before. The streams are made by that thread,
    and named in every other: there, the current one is the default one, whatever the caller has chosen.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = [torch.cuda.Stream(device) for device in dict.fromkeys(devices) if device.type == "cuda"]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._free: deque[tuple[torch.Tensor, list[torch.cuda.Event]]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.arrived()

    def take(self, nbytes: int) -> torch.Tensor:
        """Memory (uint8) of so many bytes or more, page-aligned: used before, where there is some."""
        while free := self._used():
            slab, copied = free
            for event in copied:
                event.synchronize()
            if len(slab) >= nbytes:
                return slab
        if self._streams:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        # of its own, so it is given back in the end: malloc would keep the most it ever was
        memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without large pages; page by page it takes as long as to fill
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def _used(self) -> tuple[torch.Tensor, list[torch.cuda.Event]] | None:
        try:
            return self._free.popleft()
        except IndexError:
            return None

    def give(self, slab: torch.Tensor) -> None:
        """Take memory back. It is not waited for what is still being copied: `take` does."""
        self._free.append((slab, [stream.record_event() for stream in self._streams]))

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """In this block, this thread's copies that do not block run beside what the devices are doing."""
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.device(stream.device))
                stack.enter_context(torch.cuda.stream(stream))  # alone, it would end by making a context on device 0
            yield

    def arrived(self) -> None:
        """Wait until all that was copied so far has arrived: then every stream, and the host, sees it."""
        for stream in self._streams:
            stream.synchronize()


def copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors into host memory, all of one device at once. Of a CUDA device it has only begun on return."""
    pairs = [each for target, source in zip(targets, sources, strict=True) for each in _tiles(target, source)]
    for device in dict.fromkeys(source.device for _, source in pairs):
        to = [target for target, source in pairs if source.device == device]
        of = [source.resolve_conj().resolve_neg() for _, source in pairs if source.device == device]
        torch._foreach_copy_(to, of, non_blocking=device.type == "cuda")


def _tiles(target: torch.Tensor, source: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Cut a copy that strides through host memory: row by row it would miss the TLB at every element."""
    if source.is_cpu and source.ndim and source.stride(-1) != 1 and source.shape[-1] > _TILE:
        return zip(target.split(_TILE, -1), source.split(_TILE, -1), strict=True)
    return [(target, source)]
