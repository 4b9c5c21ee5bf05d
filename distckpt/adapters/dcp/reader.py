"""StorageReader: dcp.load reads a checkpoint of ours, whoever saved it: Checkpointer, distckpt.save, or dcp.save.

What the checkpoint has is offered under the names that DCP's planners ask for. Only the blocks that hold what a rank
asks for are read, each checked; no pickle is read: values are pickled here, in memory, because DCP unpickles them.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from distckpt import comm
from distckpt.adapters.dcp.names import Offer, offer
from distckpt.comm import SoloComm
from distckpt.errors import Mismatch, NotACheckpoint
from distckpt.format.box import Box, parts
from distckpt.format.objects import TensorRef
from distckpt.format.partition import Copies
from distckpt.loading.open import open_checkpoint
from distckpt.loading.plan import items_of
from distckpt.loading.read import read
from distckpt.loading.shared import refuse_shared
from distckpt.run.choose import Search, look_for
from distckpt.run.place import place
from distckpt.state import Shard, torch_dtype
from distckpt.statedict import insert, references
from distckpt.store.open import SCHEMES, is_uri, located

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem

    from distckpt.loading.open import Checkpoint
    from distckpt.loading.plan import Item


class StorageReader(storage.StorageReader):
    """Give it to dcp.load as `storage_reader`. `path`: as in `distckpt.load`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = located(path)
        self._checkpoint: Checkpoint | None = None
        self._offer = Offer()
        self._of_rank: frozenset[str] = frozenset()
        """Names of values that each rank saved its own of."""

    @property
    def checkpoint_id(self) -> str:
        """The path."""
        return str(self._path)

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has read of the checkpoint last asked for."""
        return self._checkpoint.bytes_read if self._checkpoint else 0

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path, or a URI of a store that distckpt knows."""
        return not is_uri(checkpoint_id) or str(checkpoint_id).partition("://")[0] in SCHEMES

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new load, from another path if one is given."""
        if checkpoint_id:
            self._path = located(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:  # noqa: ARG002
        """See torch's StorageReader. Opens the newest checkpoint that counts; NotACheckpoint, Corrupt."""
        where = place(self._path)
        directory = look_for(Search(SoloComm(), where.history, where.step))
        if directory is None:
            raise NotACheckpoint(f"{where.store} holds no committed checkpoint: {where.history.why_nothing()}")
        checkpoint = open_checkpoint(where.store, directory)
        content = checkpoint.manifest
        mine = checkpoint.rank_objects(comm.current().rank % content.world_size) if content.rank_objects else {}
        own = {name: mine[name] for name in content.rank_objects if name in mine}
        shared = {name: checkpoint.object(name) for name in content.objects}
        self._checkpoint, self._offer = checkpoint, offer(content.tensors, content.aliases, shared | own)
        self._of_rank = self._offer.values() - offer((), {}, shared).values()
        offered = _Offered({fqn: self._described(found) for fqn, found in self._offer.content.items()})
        offered.other_names = {fqn: self._described(found) for fqn, found in self._offer.other_names.items()}
        meta = StorageMeta(checkpoint_id=self.checkpoint_id)
        return Metadata(offered, planner_data=self._offer.paths, storage_data={}, storage_meta=meta)

    def _described(self, found: Any) -> TensorStorageMetadata | BytesStorageMetadata:
        if not (isinstance(found, TensorRef) and found.kind == "torch"):
            return BytesStorageMetadata()
        info = self._opened.manifest.tensors[found.fqn]
        shape = Box.whole(info.shape)
        boxes = [part.box for _, region in info.partition.overlapping(shape) for part in parts(region, info.shape)]
        chunks = [ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in boxes]
        return TensorStorageMetadata(TensorProperties(torch_dtype(info.dtype)), torch.Size(info.shape), chunks)

    @property
    def _opened(self) -> Checkpoint:
        assert self._checkpoint is not None
        return self._checkpoint

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **options: Any) -> None:  # noqa: FBT001
        """See torch's StorageReader. Nothing to do: `read_metadata` has opened the checkpoint."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """See torch's StorageReader. Tells the coordinator which checkpoint this rank has opened."""
        content = self._opened.manifest
        return replace(plan, storage_data=f"{self._opened.directory} (attempt {content.attempt})")

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """See torch's StorageReader. Mismatch unless all ranks have opened the same checkpoint."""
        opened = sorted({str(plan.storage_data) for plan in plans})
        if len(opened) > 1:
            raise Mismatch(f"{self._path}: saved again while it was opened, ranks see {opened}: load again")
        return [replace(plan, storage_data=(rank, len(plans))) for rank, plan in enumerate(plans)]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See torch's StorageReader. Corrupt where a block does not match its checksum; the state is a mix then."""
        ranks = plan.storage_data
        items: list[Item] = []
        tensors: list[tuple[ReadItem, torch.Tensor]] = []
        values: list[tuple[ReadItem, Any, dict[str, torch.Tensor]]] = []
        for wanted in plan.items:
            found = self._offer.find(wanted.storage_index.fqn)
            if wanted.type == LoadItemType.BYTE_IO:
                self._refuse_of_rank(wanted.storage_index.fqn, ranks)
                made = {fqn: self._empty(fqn) for fqn in references(found)}
                for fqn, tensor in made.items():
                    items += self._items(fqn, Box.whole(tensor.shape), tensor, ranks)
                values.append((wanted, found, made))
            else:
                target = planner.resolve_tensor(wanted).detach()
                items += self._items(found.fqn, _box(wanted), target, ranks)
                tensors.append((wanted, target))
        refuse_shared(self._opened, items)
        read(self._opened, items)
        for wanted, target in tensors:
            planner.commit_tensor(wanted, target)
        for wanted, found, made in values:
            planner.load_bytes(wanted, _pickled(insert(found, made)))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _empty(self, fqn: str) -> torch.Tensor:
        info = self._opened.manifest.tensors[fqn]
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype))

    def _items(self, fqn: str, box: Box, target: torch.Tensor, ranks: tuple[int, int]) -> Iterator[Item]:
        """What to read of a tensor, to fill `target` with this box of it."""
        info, (rank, world_size) = self._opened.manifest.tensors[fqn], ranks
        own = None
        if isinstance(info.partition, Copies):
            own = info.partition.copy_of(rank) if world_size == self._opened.manifest.world_size else None
            if own is None:
                raise Mismatch(_OF_RANK.format(fqn, self._opened.manifest.world_size, world_size))
        if tuple(target.shape) != box.sizes:
            raise Mismatch(f"{fqn}: {list(box.sizes)} are to be read into a tensor of {list(target.shape)}")
        if box.numel:
            yield from items_of(fqn, fqn, info, Shard(box, target), own)

    def _refuse_of_rank(self, fqn: str, ranks: tuple[int, int]) -> None:
        """Mismatch for a value that each rank saved its own of, where the ranks are others now."""
        content, (rank, world_size) = self._opened.manifest, ranks
        if fqn in self._of_rank and (world_size != content.world_size or rank != comm.current().rank):
            raise Mismatch(_OF_RANK.format(fqn, content.world_size, world_size))


_OF_RANK = (
    "{}: each of the {} ranks saved its own, which {} ranks cannot share out; distckpt.load(..., per_rank=...) can "
    "give every rank that of rank 0"
)


def _box(wanted: ReadItem) -> Box:
    """Region of the global tensor that is wanted."""
    start = wanted.storage_index.offset or (0,) * len(wanted.lengths)
    offsets = tuple(a + b for a, b in zip(start, wanted.storage_offsets, strict=True))
    return Box(offsets, tuple(wanted.lengths))


def _pickled(value: Any) -> io.BytesIO:
    """What DCP's planner unpickles."""
    made = io.BytesIO()
    torch.save(value, made)
    made.seek(0)
    return made


class _Offered(dict[str, "TensorStorageMetadata | BytesStorageMetadata"]):
    """What planners look a name up in. `other_names` are found, but not listed: they are there already."""

    other_names: dict[str, TensorStorageMetadata | BytesStorageMetadata]

    def __contains__(self, fqn: object) -> bool:
        return super().__contains__(fqn) or fqn in self.other_names

    def __missing__(self, fqn: str) -> TensorStorageMetadata | BytesStorageMetadata:
        return self.other_names[fqn]
