"""Whether there is room for what a save writes: asked before any of it is written, at the cost of one system call."""

from __future__ import annotations

import errno
from math import prod
from typing import TYPE_CHECKING

from distckpt.errors import StoreError
from distckpt.format.dtype import item_size
from distckpt.format.partition import Copies, regions_of
from distckpt.units import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from distckpt.format.layout import StepDir
    from distckpt.format.partition import Partition
    from distckpt.saving.merge import Agreed
    from distckpt.store.base import Store


def needed(tensors: Mapping[str, Agreed], partitions: Mapping[str, Partition], ranks: Sequence[int] = ()) -> int:
    """Bytes that these ranks (none named: all) write of the tensors that are divided. Headers and sums are little."""
    found = 0
    for fqn, partition in partitions.items():
        if ranks:
            elements = sum(region.numel for rank in ranks for region in regions_of(partition, rank))
        else:
            elements = prod(partition.shape) * (partition.count if isinstance(partition, Copies) else 1)
        found += elements * item_size(tensors[fqn].dtype)
    return found


def lacking(store: Store, directory: StepDir, need: int, room: int | None) -> StoreError | None:
    """Return what to raise where there is not room for so many bytes. room: None where that is not known."""
    if room is None or need <= room:
        return None
    error = StoreError(
        f"{directory} needs {size_text(need)}, and {size_text(room)} are free in {store}: nothing was written "
        "(free room, or keep fewer checkpoints)"
    )
    error.errno = errno.ENOSPC
    return error
