"""From files to a checkpoint: acks say what each rank finished, whoever sees them all commits. Knows no tensors.

`ack-00000` carries the manifest's draft, so anyone can commit for a job that died after its last ack. commit.json is
created once, if absent: doing it twice with the same content is harmless, and a second attempt's is refused.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from distckpt.errors import (
    Corrupt,
    FormatError,
    KeyExists,
    KeyMissing,
    RanksMissing,
    RunConflict,
    StoreError,
    failure_text,
)
from distckpt.format import manifest
from distckpt.format.layout import COMMIT, StepDir, ack_file, ack_rank, data_file
from distckpt.format.manifest import FileInfo, Manifest
from distckpt.format.sealed import seal, unseal
from distckpt.signing import own, refuse_to_commit, signer
from distckpt.store.base import each, read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distckpt.store.base import Store

_MOST_ACK = 1 << 30


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at saving a step."""

    directory: StepDir
    id: str
    world_size: int

    def key(self, name: str) -> str:
        """Key of a file of this attempt's directory."""
        return f"{self.directory}/{name}"


def write_ack(store: Store, attempt: Attempt, rank: int, file: FileInfo, draft: Manifest | None) -> None:
    """Say that a rank's data file is durable. Rank 0 adds the manifest, in which the ranks' files are still missing."""
    said = _words(attempt, rank) | {"file": [file.name, file.size, file.header, file.digest]}
    if draft:
        said["draft"] = manifest.to_json(draft)
    write_all(store, attempt.key(ack_file(rank, attempt.id)), seal(said, signer()))


def write_refusal(store: Store, attempt: Attempt, rank: int, error: BaseException) -> None:
    """Say that a rank failed: nobody will commit this attempt."""
    said = _words(attempt, rank) | {"error": failure_text(error)}
    write_all(store, attempt.key(ack_file(rank, attempt.id)), seal(said, signer()))


def _words(attempt: Attempt, rank: int) -> dict[str, Any]:
    """Whose ack it is, in its own words: else that of another attempt could stand in for it, signature and all."""
    return {"rank": rank, "directory": str(attempt.directory), "attempt": attempt.id}


def acked_ranks(store: Store, attempt: Attempt) -> set[int]:
    """Ranks that have said anything about this attempt."""
    ranks = (ack_rank(entry.name, attempt.id) for entry in store.list(str(attempt.directory)))
    return {rank for rank in ranks if rank is not None}


def read_ack(store: Store, attempt: Attempt, rank: int) -> dict[str, Any]:
    """What a rank said. KeyMissing; Corrupt or FormatError where it is damaged."""
    key = attempt.key(ack_file(rank, attempt.id))
    try:
        said: dict[str, Any] = unseal(read_all(store, key, limit=_MOST_ACK), own())
    except (Corrupt, FormatError) as e:
        raise type(e)(f"{key}: {e}") from e
    match said:
        case {"file": [str(name), int(), int(), str()]} | {"error": str(name)} if said.items() >= _words(
            attempt, rank
        ).items() and ("error" in said or name == data_file(rank, attempt.id)):
            return said
    raise FormatError(f"{key} is not the ack of rank {rank} in this attempt")


def acked_part(store: Store, attempt: Attempt, rank: int) -> tuple[FileInfo, Manifest | None]:
    """Return what a rank has finished, and (rank 0) the draft. RunConflict if it refused; KeyMissing, Corrupt."""
    said = read_ack(store, attempt, rank)
    if "error" in said:
        raise RunConflict(f"{attempt.directory}: rank {rank} gave the attempt up: {said['error']}")
    return FileInfo(*said["file"]), manifest.from_json(said["draft"]) if "draft" in said else None


def found_attempt(store: Store, directory: StepDir, attempt: str) -> Attempt:
    """Attempt of this id; its world size is what rank 0's ack tells, 0 where that cannot be read."""
    draft = _draft(store, directory, attempt)
    return Attempt(directory, attempt, draft.world_size if draft else 0)


def launch_of(store: Store, directory: StepDir, attempt: str) -> int | None:
    """Launch that an attempt is of, as rank 0's ack tells; None where that cannot be read."""
    draft = _draft(store, directory, attempt)
    return draft.launch if draft else None


def _draft(store: Store, directory: StepDir, attempt: str) -> Manifest | None:
    try:
        said = read_ack(store, Attempt(directory, attempt, 0), 0)
        return manifest.from_json(said["draft"]) if "draft" in said else None
    except (KeyMissing, Corrupt, FormatError):
        return None


def complete(store: Store, attempt: Attempt, draft: Manifest | None = None) -> Manifest:
    """Return the manifest of an attempt that every rank has acked. draft: that of rank 0's ack, where it is at hand.

    RunConflict if one refused; KeyMissing, Corrupt or FormatError where an ack cannot be used.
    """
    said = each(store.pace, lambda rank: read_ack(store, attempt, rank), range(attempt.world_size))
    for rank, ack in enumerate(said):
        if "error" in ack:
            raise RunConflict(f"{attempt.directory}: rank {rank} gave the attempt up: {ack['error']}")
    if any("signature" in ack for ack in said):
        refuse_to_commit()
    draft = draft or manifest.from_json(said[0].get("draft"))
    if (draft.attempt, StepDir(draft.step, draft.generation)) != (attempt.id, attempt.directory):
        raise FormatError(f"{attempt.directory}: what rank 0 acked is of another attempt or step")
    whole = replace(draft, files=(*(FileInfo(*ack["file"]) for ack in said), *draft.files))
    manifest.check(whole)
    return whole


def commit(store: Store, attempt: Attempt, whole: Manifest) -> None:
    """Make the checkpoint. RunConflict if another attempt has committed this directory."""
    try:
        store.create(attempt.key(COMMIT), manifest.encode(whole, signer()))
    except KeyExists as e:
        raise RunConflict(f"{attempt.key(COMMIT)}: another job or launch committed it first; ours is not used") from e


def commit_when_acked(store: Store, attempt: Attempt, draft: Manifest | None, *, timeout: float) -> Manifest:
    """Wait for every rank's ack, then commit. RanksMissing names those whose ack did not come within `timeout` s.

    draft: see `complete`.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001
    while missing := set(range(attempt.world_size)) - acked_ranks(store, attempt):
        if made := committed_manifest(store, attempt):
            return made  # by a resume, which took us for dead: and it has removed the acks
        if time.monotonic() > deadline:
            told = ", ".join(map(str, sorted(missing)[:16])) + (
                f" and {len(missing) - 16} more" if len(missing) > 16 else ""
            )
            raise RanksMissing(f"{attempt.directory}: no ack from ranks {told} within {timeout:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    try:
        whole = complete(store, attempt, draft)
    except KeyMissing as e:
        if made := committed_manifest(store, attempt):
            return made
        raise RunConflict(f"{e}: a later launch took this attempt's job for dead, and has cleared it away") from e
    commit(store, attempt, whole)
    return whole


def remove_acks(store: Store, attempt: Attempt) -> None:
    """Remove the acks of a committed attempt: all they said stands in commit.json, so one left behind does no harm."""
    with contextlib.suppress(StoreError):
        acks = [attempt.key(ack_file(rank, attempt.id)) for rank in acked_ranks(store, attempt)]
        each(store.pace, store.delete, acks)


def committed_manifest(store: Store, attempt: Attempt) -> Manifest | None:
    """What an attempt has committed; None if it has not. StoreError, Corrupt or FormatError: that cannot be told."""
    try:
        found = manifest.decode(read_all(store, attempt.key(COMMIT), limit=manifest.MAX_BYTES), own())
    except KeyMissing:
        return None
    return found if found.attempt == attempt.id else None


def may_be_committed(store: Store, attempt: Attempt) -> bool:
    """Whether its directory's commit is this attempt's, or cannot be read: then nothing of it may be removed."""
    try:
        return committed_manifest(store, attempt) is not None
    except (StoreError, Corrupt, FormatError):
        return True


def abandon(store: Store, attempt: Attempt, files: Iterable[str]) -> None:
    """Remove files of an attempt that failed, acks first in the list: on a full disk they would block the next.

    A create that raised may have made the commit all the same: then everything stays.
    """
    if not may_be_committed(store, attempt):
        for name in files:
            with contextlib.suppress(StoreError):  # the failure that led here is the one to raise; gc finds leftovers
                store.delete(attempt.key(name))


def is_committed(store: Store, directory: StepDir) -> bool:
    """Whether a step directory has a commit, whole or damaged."""
    try:
        store.head(f"{directory}/{COMMIT}")
    except KeyMissing:
        return False
    return True
