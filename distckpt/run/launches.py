"""Launches: one life of the job each, from resume to exit. They fence zombies off and make a rewind final.

A resume creates the next `launches/NNNN.json` with the checkpoint it resumed from. A commit of launch m counts only if
its checkpoint is not after what any later launch resumed from. So a writer left over from an earlier launch can commit
whatever it likes and is never resumed, and steps left behind by a deliberate rewind never come back.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from distckpt.errors import Corrupt, FormatError, KeyExists, RunConflict, Untrusted
from distckpt.format.layout import LAUNCHES, MOST_LAUNCHES, StepDir, launch_file, launch_number
from distckpt.format.sealed import seal, unseal
from distckpt.signing import refuse_keyless, signer, trusted
from distckpt.store.base import each, read_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distckpt.store.base import Store

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Launch:
    """Record of a launch. `resumed_from` is a step directory's name, None for a fresh start."""

    number: int
    resumed_from: str | None
    world_size: int
    host: str
    job: str
    date: str
    nonce: str
    """Random: two jobs that open the same number in the same second must not both believe it theirs."""

    def admits(self, directory: StepDir) -> bool:
        """Whether an earlier launch's commit of `directory` still counts."""
        start = StepDir.parse(self.resumed_from) if self.resumed_from else None
        return start is not None and directory <= start


def launch_numbers(store: Store) -> list[int]:
    """Number of every launch of a run, ascending: a record never changes, so these say whether there is another."""
    return sorted(n for n in (launch_number(entry.name) for entry in store.list(LAUNCHES)) if n is not None)


def read_launches(store: Store, known: dict[int, Launch | None] | None = None) -> list[Launch]:
    """Every launch of a run, by number. FormatError for a record that cannot be read: it might fence something.

    known: those that were read before, which are not read again; the others are added.
    """
    known = {} if known is None else known
    numbers = launch_numbers(store)
    new = [number for number in numbers if number not in known]
    known.update(zip(new, each(store.pace, lambda number: _read(store, number), new), strict=True))
    return [launch for number in numbers if (launch := known[number])]


def _read(store: Store, number: int) -> Launch | None:
    """Record of a launch; None for one that fences nothing, for it is not signed as it must be."""
    key = launch_file(number)
    try:
        members = unseal(read_all(store, key, limit=_MOST_BYTES), trusted())
        record = Launch(**{f.name: members[f.name] for f in fields(Launch)})  # a later version may add others
        if record.number != number or (record.resumed_from and not StepDir.parse(record.resumed_from)):
            raise FormatError(f"it names launch {record.number}, resumed from {record.resumed_from!r}")
    except Untrusted:
        return None
    except (TypeError, KeyError, FormatError, Corrupt) as e:
        raise FormatError(f"{store}: {key} is not the record of a launch ({e}); restore or remove it by hand") from e
    return record


def counts(directory: StepDir, launch: int, launches: Sequence[Launch]) -> bool:
    """Whether a commit of `directory` by launch number `launch` counts, given all launches."""
    return all(later.admits(directory) for later in launches if later.number > launch)


def open_launch(
    store: Store, resumed_from: StepDir | None, world_size: int, date: str, seen: Sequence[int] | None = None
) -> int:
    """Create the next launch's record and return its number.

    seen: numbers there were when it was looked for what to resume from. RunConflict if another launch has begun since:
    what it has saved, or left behind, this one does not know.
    """
    refuse_keyless()
    number = max(launch_numbers(store) if seen is None else seen, default=0)
    while True:
        if (number := number + 1) > MOST_LAUNCHES:
            raise FormatError(f"{store}: {launch_file(number - 1)} is the last launch there can be: who put it there?")
        record = Launch(
            number,
            str(resumed_from) if resumed_from else None,
            world_size,
            socket.gethostname(),
            job_name(),
            date,
            secrets.token_hex(6),
        )
        try:
            store.create(launch_file(number), seal(asdict(record), signer()))
        except KeyExists as e:
            if seen is None:
                continue  # another job opened this number in between; the fence decides between the two
            raise RunConflict(
                f"{store}: launch {number} has begun while this job was loading. If that job is not meant to train on "
                "this run, stop it; then start this one again"
            ) from e
        return number


def job_name() -> str:
    """Name of the job at its scheduler, the same for each of its restarts; else of the process."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name) not in {None, "", "none"}:  # what torchrun says unless it is told an id
            return f"{name}={os.environ[name]}"
    return f"pid={os.getpid()}"
