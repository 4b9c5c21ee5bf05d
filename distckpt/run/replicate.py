"""Tiers: saves commit in a near store, and are replicated to the far one, the run's root, by a writer process.

Nothing is remembered of what was copied: the far store tells. A file that lies there whole is not sent again, and one
appears only whole; the commit is created last, so the far run is a run like any other. The newest checkpoint that the
far rules keep goes first: where saves come faster than they can be sent, those between are left out.

One writer process of each near store does it: rank 0's; or where nodes have each their own (run/nodes.py), one on each,
which sends what lies there, and its ranks' acks; and the one that finds everything sent commits. Imports no torch.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, KeyExists, KeyMissing, RunConflict
from distckpt.format.layout import COMMIT, ack_file, attempt_of
from distckpt.format.manifest import MAX_BYTES, owners
from distckpt.run.events import note
from distckpt.run.history import History
from distckpt.run.keep import Keep, decide
from distckpt.run.launches import launch_numbers
from distckpt.run.lease import SECONDS as LEASED
from distckpt.run.lease import lease
from distckpt.run.outbound import Outbound
from distckpt.run.publish import Retention, Then, published, retain
from distckpt.run.retention import listed, remove
from distckpt.saving.commit import (
    Attempt,
    acked_part,
    acked_ranks,
    commit,
    committed_manifest,
    complete,
    is_committed,
    read_ack,
    remove_acks,
)
from distckpt.store.base import read_all, write_all
from distckpt.store.open import reopened
from distckpt.units import duration_text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from distckpt.format.layout import StepDir
    from distckpt.loading.open import Checkpoint
    from distckpt.store.base import Store

_UNCOMMITTED = 4
"""Newest attempts that a node keeps before the root has them: nodes are at most two saves apart, so two are whole."""
_PAUSE = 1.0
"""Seconds after which what failed is tried again, at first; and between looks at the clock."""
_LONGEST_PAUSE = 60.0
_HELD = 1.0
"""Seconds that a piece on its way waits at most for a save to end: saves that never pause must not stop it for good."""


@dataclass(frozen=True)
class Rules:
    """What `Local` says of replication, as a message to the writer has it. keep: in the far store; near: here."""

    keep: Keep | None
    near: Keep | None
    bandwidth: int | None
    behind: float

    def to_json(self) -> dict[str, Any]:
        """What from_json takes."""
        kept = [keep.to_json() if keep else None for keep in (self.keep, self.near)]
        return {"keep": kept, "bandwidth": self.bandwidth, "behind": self.behind}

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Rules:
        """What to_json described."""
        far, near = (Keep.from_json(keep) if keep else None for keep in said["keep"])
        return Rules(far, near, said["bandwidth"], said["behind"])


class _Over(RunConflict):
    """A later launch has begun with the same near store, and sends what this one has not."""


class Replicator:
    """Copies what is saved near, in a thread, until it is finished. `tell`: says what a person must know."""

    def __init__(self, message: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._near, self._far = History(reopened(message["near"])), History(reopened(message["far"]))
        self._rules = Rules.from_json(message["rules"])
        self._apart: Mapping[str, Any] | None = message["apart"]
        self._tell, self._told = tell, ""
        self._launches, self._looked = _launches(self._near.store), 0.0
        self._lock = threading.Condition()
        self._free = threading.Event()
        self._free.set()
        self._ahead: list[tuple[StepDir, float]] = []
        """Near checkpoints that came since the far store's newest, and when."""
        self._asked, self._deadline = True, float("inf")
        self._lease, self._held_at = ExitStack(), 0.0
        self._held: StepDir | None = None
        self._outbound = Outbound(self._near.store, self._far.store, self._rules.bandwidth, self._look)
        self._thread = threading.Thread(target=self._run, name="distckpt-replicate", daemon=True)
        self._thread.start()

    def again(self) -> None:
        """Look again, for the job that this is for may have begun another launch."""
        self._launches = _launches(self._near.store)
        self.wake()

    def wake(self, directory: StepDir | None = None) -> None:
        """Look again, for a checkpoint was committed."""
        with self._lock:
            if directory:
                self._ahead.append((directory, time.monotonic()))
            self._asked = True
            self._lock.notify()

    def give_way(self, *, saving: bool) -> None:
        """Send next to nothing while a save is under way, which has disk, memory and this process to itself then."""
        if saving:
            self._free.clear()
        else:
            self._free.set()

    def finish(self, seconds: float) -> None:
        """End once nothing is left to copy, after `seconds` at the latest; what is left then is told."""
        with self._lock:
            self._deadline, self._asked = time.monotonic() + seconds, True
            self._lock.notify()
        self._thread.join(seconds + _PAUSE)
        if self._thread.is_alive() or self._ahead:
            self._say(f"{self._far.store} lacks the newest checkpoint still: the next launch sends it")

    def _run(self) -> None:
        pause, superseded = _PAUSE, 0.0
        while time.monotonic() < self._deadline:
            with self._lock:
                if not self._asked and self._deadline != float("inf"):
                    return
                if not self._asked:
                    self._lock.wait(_PAUSE)
                asked, self._asked = self._asked, False
            self._check_behind()
            if not asked:
                continue
            try:
                while self._once():
                    pause = _PAUSE
                superseded = 0.0
            except _Over:
                pass
            except RunConflict as e:
                superseded = superseded or time.monotonic()  # or this job's own launch is being opened
                if time.monotonic() - superseded > _PAUSE or self._deadline != float("inf"):
                    self._say(str(e))
                    return
                time.sleep(_PAUSE / 4)
                self.wake()
            except DistckptError as e:
                self._say(f"replicating to {self._far.store}: {e}")
                time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
                self.wake()

    def _check_behind(self) -> None:
        late = time.monotonic() - self._ahead[0][1] if self._ahead else 0.0
        if late > self._rules.behind:
            self._say(
                f"{self._far.store} is behind: it has lacked {self._ahead[0][0]} for longer than "
                f"{duration_text(self._rules.behind)}"
            )

    def _say(self, text: str) -> None:
        if text != self._told:
            self._told = text
            self._tell(text)
            note(self._near.store, "behind", why=text)

    # -- one checkpoint ----------------------------------------------------------------------------------------------

    def _once(self) -> bool:
        """Copy the newest of what lacks that can be copied now. False where there is none."""
        self._refuse_if_superseded()
        awaited, problem = False, None
        ahead: list[tuple[StepDir, Callable[[], bool]]] = []
        if self._apart:
            attempts, awaited = self._attempts()
            ahead += [(a.directory, partial(self._copy_part, a)) for a in attempts[:1]]
        ahead += [(c.directory, partial(self._copy, c)) for c in self._lacking()]
        for directory, copy in ahead:
            try:
                if self._copied(directory, copy):
                    return True
                awaited = True  # others have yet to send their part
            except (Corrupt, FormatError, KeyMissing) as e:  # noqa: PERF203
                problem = problem or e  # of what lies here: an older one may be whole
        if problem:
            raise problem
        if awaited:
            time.sleep(_PAUSE / 2)
            self.wake()
        else:
            with self._lock:
                self._ahead.clear()
        return False

    def _copied(self, directory: StepDir, copy: Callable[[], bool]) -> bool:
        started, before = time.monotonic(), self._outbound.sent
        with self._lease:
            self._hold(directory)
            if not copy():
                return False
        with self._lock:
            self._ahead = [(d, at) for d, at in self._ahead if d > directory]
        self._told = ""
        seconds, nbytes = round(time.monotonic() - started, 3), self._outbound.sent - before
        note(self._near.store, "replicated", step=directory.step, bytes=nbytes, seconds=seconds)
        return True

    def _hold(self, directory: StepDir) -> None:
        """Take a lease on what is being sent, a new one before that of an earlier call ends."""
        self._held, self._held_at = directory, time.monotonic()
        with self._lease.pop_all():
            self._lease.enter_context(lease(self._near.store, directory))

    def _refuse_if_superseded(self) -> None:
        """RunConflict once a later launch has begun: it removes what it takes for left behind, and sends what lacks."""
        known = _launches(self._near.store)
        if _launches(self._far.store) > known:
            raise RunConflict(f"{self._far.store}: a later launch, elsewhere, has resumed this run: nothing is sent")
        if known > self._launches:
            raise _Over

    def _look(self) -> None:
        """What is looked at again and again while a checkpoint is being sent, which can take hours."""
        self._free.wait(_HELD)
        self._check_behind()
        if self._held and time.monotonic() - self._held_at > LEASED / 4:
            self._hold(self._held)
        if time.monotonic() - self._looked > _PAUSE / 4:
            self._looked = time.monotonic()
            self._refuse_if_superseded()

    def _lacking(self) -> list[Checkpoint]:
        """Near checkpoints that the far rules keep, and the far store lacks, newest first."""
        there = {c.directory: c.candidate for c in listed(self._far)}
        here = {c.directory: c for c in listed(self._near) if c.found.checkpoint and not c.found.superseded}
        candidates = [*(c.candidate for d, c in here.items() if d not in there), *there.values()]
        wanted = decide(self._rules.keep or Keep(), candidates, {}).stays
        lacking = (here[d].found.checkpoint for d in sorted(here.keys() & (wanted.keys() - there), reverse=True))
        return [checkpoint for checkpoint in lacking if checkpoint]

    def _copy(self, checkpoint: Checkpoint) -> bool:
        """Copy its files, as far as they are not there, then its commit. Whether it is committed."""
        directory, content = checkpoint.directory, checkpoint.manifest
        whole = self._outbound.send(directory, content.files, content.objects.values(), all_here=not self._apart)
        if not whole:
            return False
        self._refuse_if_superseded()  # while it was sending
        key = f"{directory}/{COMMIT}"
        try:
            self._far.store.create(key, read_all(self._near.store, key, limit=MAX_BYTES))
        except KeyExists as e:
            raise RunConflict(f"{e}: another job has saved this step; nothing is sent") from e
        self._publish(directory)
        return True

    def _publish(self, directory: StepDir) -> None:
        made, keep = self._far.open(directory), self._rules.keep
        self._tell_all(self._far, published(self._far, made, Then(Retention(keep) if keep else None, noted=False)))

    def _tell_all(self, where: History, problems: list[str]) -> None:
        for problem in problems:
            self._tell(f"{where.store}: {problem}")

    # -- where other nodes have the rest -----------------------------------------------------------------------------

    def _attempts(self) -> tuple[list[Attempt], bool]:
        """Attempts that all ranks here have acked, and that are not committed, newest first; whether acks lack yet.

        All but the newest few are removed.
        """
        assert self._apart
        acked, lack = [], False
        ranks = set(self._apart["ranks"])
        for directory in self._near.unfinished():
            here = {entry.name for entry in self._near.store.list(str(directory))}
            for name in {attempt_of(name) for name in here} - {None}:
                attempt = Attempt(directory, str(name), self._apart["world_size"])
                there = acked_ranks(self._near.store, attempt) & ranks
                if _stands(self._near.store, attempt, there, here):
                    lack = lack or there != ranks
                    acked += [attempt] if there == ranks else []
        _let_go(self._near, [a.directory for a in acked[_UNCOMMITTED:]])
        return acked, lack

    def _copy_part(self, attempt: Attempt) -> bool:
        """Copy what this node has of an attempt, its acks last, and commit it if that was all. Whether it is."""
        assert self._apart
        near, far = self._near.store, self._far.store
        for rank in sorted(set(self._apart["ranks"]) - acked_ranks(far, attempt)):
            file, draft = acked_part(near, attempt, rank)
            objects = draft.objects.values() if draft else ()
            self._outbound.send(attempt.directory, [file], objects, all_here=True)
            key = attempt.key(ack_file(rank, attempt.id))
            write_all(far, key, read_all(near, key, limit=MAX_BYTES))
        if (made := committed_manifest(far, attempt)) is None:
            if acked_ranks(far, attempt) < set(range(attempt.world_size)):
                return False
            made = complete(far, attempt)
            commit(far, attempt, made)
            self._publish(attempt.directory)
        commit(near, attempt, made)
        for history in (self._near, self._far):
            remove_acks(history.store, attempt)
            _let_go(history, [d for d in history.directories() if d < attempt.directory])
        if self._rules.near:
            self._tell_all(self._near, retain(self._near, Retention(self._rules.near), noted=False)[1])
        return True


def _stands(store: Store, attempt: Attempt, ranks: Iterable[int], here: Collection[str]) -> bool:
    """Whether each of these ranks has acked a file that is here, and none gave the attempt up."""
    try:
        return all(read_ack(store, attempt, rank).get("file", [""])[0] in here for rank in ranks)
    except (KeyMissing, Corrupt, FormatError):
        return False  # nobody will commit it


def _let_go(history: History, directories: Iterable[StepDir]) -> None:
    """Remove saves that did not commit, for a newer one was sent instead; not those whose files a commit names."""
    if left := [directory for directory in directories if not is_committed(history.store, directory)]:
        contents = [found.checkpoint.manifest for found in history.committed() if found.checkpoint]
        for directory in set(left).difference(*map(owners, contents)):
            remove(history.store, directory)


def _launches(store: Store) -> int:
    """Number of a run's newest launch. A store may lack the records of those before it was the run's."""
    return max(launch_numbers(store), default=0)
