"""Frozen weights are stored once: a save names the files of an earlier checkpoint of the run that has them.

All of them or none: where every rank finds every parameter without a gradient as it was when that checkpoint was saved
(or loaded), they are left out of the rank's file. Whoever of them has changed, or was thawed and frozen again, has all
of them written anew. Only where they are at least half of the state: an earlier checkpoint stays as long as a later
one names its files, optimizer and all.

Same steps on every rank; only rank 0 knows which of the checkpoints that have them are committed, and says so.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from distckpt.errors import DistckptError
from distckpt.format.checksum import SHA256
from distckpt.format.dtype import item_size
from distckpt.format.manifest import FileInfo, TensorInfo, owners
from distckpt.format.partition import Copies, Pieces
from distckpt.saving.commit import Attempt, committed_manifest, is_committed
from distckpt.signing import algorithm
from distckpt.state import State, content_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from distckpt.format.box import Shape
    from distckpt.format.layout import StepDir
    from distckpt.format.manifest import Manifest
    from distckpt.format.partition import Partition
    from distckpt.saving.merge import Agreed
    from distckpt.state import GlobalTensor
    from distckpt.store.base import Store

CHANGED = 4
"""Flag of a rank that does not hold them as they were."""
_CHOICE = 3
"""Bit of rank 0's flag from which on it says which checkpoint is to be named: 1 for the first; 0: none."""
_MOST = 8
"""Checkpoints that are remembered: those in flight (more than two, where each node has a disk), and a committed one."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """A checkpoint that has them, or names who has, or will once it is committed. content: rank 0 knows it then.

    owners: whose files these are, as far as retention here could remove them.
    """

    attempt: Attempt
    owners: frozenset[StepDir]
    content: Manifest | None = None


class Named(NamedTuple):
    """Tensors of an earlier checkpoint, and its files, as they stand in the manifest of a later one."""

    tensors: dict[str, TensorInfo]
    files: tuple[FileInfo, ...]


class Frozen:
    """Which checkpoints of a run have the frozen parameters as this rank holds them.

    store: where saves commit; no other is asked, for it may be out of reach. None: nothing is shared.
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._sums: dict[str, int] = {}
        """Of this rank's parts, as they were."""
        self._names: frozenset[str] = frozenset()
        """Of all of them, on any rank."""
        self._holders: list[_Holder] = []

    def flag(self, state: State, rank: int) -> int:
        """What this rank tells the others at a save."""
        if not self._holders:
            return CHANGED if any(t.frozen and t.shards for t in state.tensors.values()) else 0
        if any(self._sums.get(name) != value for name, value in _sums(state).items()):
            return CHANGED
        return self._chosen() << _CHOICE if rank == 0 else 0

    def _chosen(self) -> int:
        """Return 1 + index of the newest of them that is committed; 0 if none is known to be."""
        assert self._store
        for at in reversed(range(len(self._holders))):
            holder = self._holders[at]
            with suppress(DistckptError):  # then they are written anew, which is always right
                if holder.content is None:
                    holder = replace(holder, content=committed_manifest(self._store, holder.attempt))
                    self._holders[at] = holder
                here = holder.content and all(is_committed(self._store, owner) for owner in holder.owners)
                if here and holder.content and (holder.content.is_strong or algorithm() is not SHA256):
                    return at + 1
        return 0

    def shared(self, tensors: Mapping[str, Agreed], flags: Sequence[int]) -> frozenset[str]:
        """Tensors that a save need not write. The same on every rank, for flags alone decide."""
        frozen = _frozen(tensors)
        if not (flags and flags[0] >> _CHOICE and _worth_it(tensors, frozen)):
            return frozenset()
        return frozenset() if any(flag & CHANGED for flag in flags) else frozenset(frozen)

    def named(self, shared: Collection[str], flags: Sequence[int], world_size: int) -> Named:
        """How a manifest names them, after the files of `world_size` ranks. On rank 0."""
        if not shared:
            return Named({}, ())
        holder = self._holders[(flags[0] >> _CHOICE) - 1]
        content = holder.content
        assert content is not None
        found = {fqn: content.tensors[fqn] for fqn in shared}
        first = content.world_size if all(_is_elsewhere(t, content) for t in found.values()) else 0
        files = tuple(
            f if "/" in f.name else FileInfo(holder.attempt.key(f.name), f.size, f.header, f.digest)
            for f in content.files[first:]
        )
        moved = {fqn: replace(t, partition=_moved(t.partition, world_size - first)) for fqn, t in found.items()}
        return Named(moved, files)

    def wrote(
        self,
        attempt: Attempt,
        state: State,
        tensors: Mapping[str, Agreed],
        flags: Sequence[int],
        shared: Collection[str],
    ) -> None:
        """Take note of a save, before anything of the state changes. It writes all of them, if none is shared."""
        if shared or not self._store:
            return
        frozen = _frozen(tensors)
        if not _worth_it(tensors, frozen):
            self._holders = []
        elif self._holders and frozen.keys() == self._names and not any(flag & CHANGED for flag in flags):
            self._holders = [*self._holders, _holder(attempt)][-_MOST:]
        else:
            self._sums, self._names, self._holders = _sums(state), frozenset(frozen), [_holder(attempt)]

    def loaded(self, state: State, content: Manifest, attempt: Attempt) -> None:
        """Take note of a checkpoint of this run that was loaded whole.

        If it names some of an earlier one, those alone are shared: it need not stay itself.
        """
        assert self._store
        names = {fqn for fqn, info in content.tensors.items() if _is_elsewhere(info, content)}
        whose = owners(content)
        if not names:
            names, whose = {*content.tensors}, frozenset({attempt.directory})
        as_saved = {f: t for f, t in state.tensors.items() if f in names and _kind(content.tensors[f]) == _kind(t)}
        here = frozenset(owner for owner in whose if is_committed(self._store, owner))
        self._sums, self._names = _sums(State(as_saved)), frozenset()
        self._holders = [_Holder(attempt, here, content)]


def _holder(attempt: Attempt) -> _Holder:
    return _Holder(attempt, frozenset({attempt.directory}))


def _kind(tensor: TensorInfo | GlobalTensor) -> tuple[Shape, str]:
    return tuple(tensor.shape), tensor.dtype


def _is_elsewhere(info: TensorInfo, content: Manifest) -> bool:
    """Whether a tensor of a checkpoint lies in files of earlier ones."""
    at = info.partition
    return (min((f for f, _ in at.pieces), default=0) if isinstance(at, Pieces) else at.first) >= content.world_size


def _moved(partition: Partition, by: int) -> Partition:
    if isinstance(partition, Pieces):
        return replace(partition, pieces=tuple((file + by, region) for file, region in partition.pieces))
    return replace(partition, first=partition.first + by)


def _frozen(tensors: Mapping[str, Agreed]) -> dict[str, Agreed]:
    """Those that some rank holds a part of, and so has compared."""
    return {f: t for f, t in tensors.items() if t.frozen and 0 not in t.shape and not isinstance(t.layout, Copies)}


def _worth_it(tensors: Mapping[str, Agreed], frozen: Mapping[str, Agreed]) -> bool:
    return bool(frozen) and 2 * _nbytes(frozen) >= _nbytes(tensors)


def _nbytes(tensors: Mapping[str, Agreed]) -> int:
    return sum(prod(t.shape) * item_size(t.dtype) for t in tensors.values())


def _sums(state: State) -> dict[str, int]:
    """CRC-32C of each part of a frozen parameter that this rank holds, and what it is a part of."""
    return {
        f"{fqn} {_kind(tensor)} {shard.region}": content_of(shard.tensor)
        for fqn, tensor in state.tensors.items()
        if tensor.frozen and 0 not in tensor.shape
        for shard in tensor.shards
    }
