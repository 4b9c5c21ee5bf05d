"""StorageWriter: dcp.save and dcp.async_save write a checkpoint of ours.

DCP plans, and gathers the plans on a coordinator; it tells each rank which attempt this is, along with its plan. Each
rank writes one data file and acks it; the coordinator makes the manifest of what the ranks report, and commits.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.distributed.checkpoint import storage
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from distckpt import __version__
from distckpt.adapters.dcp.names import Structure
from distckpt.adapters.dcp.part import Part, Ticket, write
from distckpt.adapters.dcp.whole import joined
from distckpt.errors import StoreError, Unsupported
from distckpt.format.layout import StepDir, ack_file, attempt_of, data_file, object_file
from distckpt.format.manifest import Manifest, ObjectInfo
from distckpt.loading.open import Checkpoint
from distckpt.run.place import Place, place
from distckpt.run.publish import now, publish
from distckpt.saving.commit import Attempt, abandon, commit_when_acked, remove_acks, write_ack
from distckpt.signing import algorithm
from distckpt.store.base import write_all
from distckpt.store.open import SCHEMES, is_uri, located

if TYPE_CHECKING:
    import os

    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner


@dataclass(frozen=True, slots=True)
class _Save:
    """What the coordinator knows of the save under way."""

    where: Place
    attempt: Attempt
    structure: Structure
    launch: int
    date: str


class StorageWriter(storage.StorageWriter):
    """Give it to dcp.save or dcp.async_save as `storage_writer`. `path`: as in `distckpt.save`.

    timeout: seconds that the coordinator waits for the ranks' files to be seen, once they are written.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 600.0) -> None:
        self._path = located(path)
        self._timeout = timeout
        self._save: _Save | None = None
        self._ends = threading.Lock()
        """Held while a save is committed or taken back: one whose future nobody waited for may still be under way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), timeout=self._timeout), (self._path,)

    @property
    def checkpoint_id(self) -> str:
        """The path."""
        return str(self._path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path, or a URI of a store that distckpt knows."""
        return not is_uri(checkpoint_id) or str(checkpoint_id).partition("://")[0] in SCHEMES

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a new save, to another path if one is given."""
        if checkpoint_id:
            self._path = located(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002, FBT001
        """See torch's StorageWriter. `kwargs` must be called that: else DCP does not pass what it holds."""
        if not kwargs.get("use_collectives", True):
            raise Unsupported("dcp.save(use_collectives=False): ranks that do not talk cannot agree on one checkpoint")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See torch's StorageWriter."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See torch's StorageWriter. On the coordinator: choose attempt and names, and tell every rank."""
        if not all(plan.usable for plan in plans):
            raise Unsupported("a planner with enable_plan_caching=True gives ranks the plan of an earlier save")
        where = place(self._path)
        if self._save:  # a save with this writer failed on another rank, or is not waited for: this one takes its place
            with self._ends:
                _discard(self._save.where, self._save.attempt)
        directory = StepDir(where.step or 0, where.generation_to_save())
        attempt = Attempt(directory, secrets.token_hex(6), len(plans))
        structure = _structure(plans)
        names, models = structure.outline()
        self._save = _Save(where, attempt, structure, where.launch(), now())
        return [
            replace(plan, storage_data=Ticket(rank, attempt, _of_plan(names, plan), models))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See torch's StorageWriter. Returns once this rank's data file is durable."""
        ticket, store = plan.storage_data, place(self._path).store
        assert isinstance(ticket, Ticket)
        try:
            part = write(store, ticket, plan, planner)
            if ticket.rank:  # the coordinator's ack carries the manifest
                write_ack(store, ticket.attempt, ticket.rank, part.file, None)
        except Exception:  # DCP tells the other ranks; without this one's ack nobody takes the attempt for complete
            own = [ack_file(ticket.rank, ticket.attempt.id), data_file(ticket.rank, ticket.attempt.id)]
            abandon(store, ticket.attempt, own)
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex("distckpt"), part.file.size, part)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """See torch's StorageWriter. On the coordinator: commit."""
        assert self._save is not None
        under_way = self._save
        where = under_way.where
        parts = [result.storage_data for of_rank in results for result in of_rank]
        with self._ends:
            try:
                manifest = self._commit(under_way, parts)
            except Exception:
                _discard(where, under_way.attempt)
                raise
            self._save = None
        remove_acks(where.store, under_way.attempt)
        publish(where.history, Checkpoint(where.store, under_way.attempt.directory, manifest), where.then())

    def _commit(self, under_way: _Save, parts: list[Part]) -> Manifest:
        attempt, store = under_way.attempt, under_way.where.store
        if [(part.rank, part.attempt) for part in parts] != [(r, attempt.id) for r in range(attempt.world_size)]:
            raise Unsupported(f"{attempt.directory}: ranks wrote for another save than this one")
        whole = joined(under_way.structure, parts)
        files = {}
        for name, data in whole.objects.items():
            file = object_file(name, attempt.id)
            write_all(store, attempt.key(file), data)
            files[name] = ObjectInfo(file, len(data), algorithm().digest(data))
        draft = Manifest(
            step=attempt.directory.step,
            generation=attempt.directory.generation,
            launch=under_way.launch,
            attempt=attempt.id,
            date=under_way.date,
            world_size=attempt.world_size,
            tensors=whole.tensors,
            files=(),
            objects=files,
            aliases=whole.aliases,
            writer={"distckpt": __version__},
        )
        write_ack(store, attempt, 0, parts[0].file, draft)
        return commit_when_acked(store, attempt, draft, timeout=self._timeout)


def _structure(plans: list[SavePlan]) -> Structure:
    paths: dict[str, tuple[str | int, ...]] = {}
    tensors = set()
    for plan in plans:
        known = plan.planner_data if isinstance(plan.planner_data, dict) else {}
        for item in plan.items:
            paths[item.index.fqn] = known.get(item.index.fqn, (item.index.fqn,))
            if item.type != WriteItemType.BYTE_IO:
                tensors.add(item.index.fqn)
    return Structure(paths, frozenset(tensors))


def _of_plan(names: dict[str, str], plan: SavePlan) -> dict[str, str]:
    return {item.index.fqn: names[item.index.fqn] for item in plan.items if item.index.fqn in names}


def _discard(where: Place, attempt: Attempt) -> None:
    """Remove what all ranks wrote for an attempt that is over: acks first, so that nobody takes it for complete."""
    with contextlib.suppress(StoreError):  # what led here is the error to raise; older generations are removed anyway
        found = [e.name for e in where.store.list(str(attempt.directory)) if attempt_of(e.name) == attempt.id]
        acks = [ack_file(rank, attempt.id) for rank in range(attempt.world_size)]
        abandon(where.store, attempt, [*acks, *(name for name in found if name not in acks)])
