"""The writer process: takes staged images, and writes, acks, commits and publishes them while training goes on.

One for each rank, in a process session of its own: it finishes what was staged even if the training process is killed,
and then ends. It imports neither torch nor numpy. It is told by messages on a socket, each a JSON object:

    arena   {arena, nbytes} and a descriptor: memory that images are staged in from now on
    begin   {job, store, directory, attempt, world_size, rank, then}: an attempt that this rank has agreed to, in the
            run at `store` (Store.address); `then` is what follows its commit, on rank 0 (publish.Then)
    staged  {job, arena, header, covered, size, told}: its image lies in [0, covered) of the arena, and after it at
            `told` what else is to be written. It answers {job, notes, seconds} once that is done (on rank 0:
            committed), or {job, error: [class, message]}
    replicate {near, far, rules}: copy what is committed near to the far store (run/replicate.py), from now on
    commit  {job}: the training process has written its part itself (rank 0). forget {job}: so it has (other ranks)
    give-up {job, error}: the training process failed to stage it
    end     {}: nothing more comes, for all is well: nothing is to be held (see run/held.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.errors import DistckptError, RanksMissing, StoreError, failure_text
from distckpt.format import manifest
from distckpt.format.layout import StepDir
from distckpt.loading.open import Checkpoint
from distckpt.run.held import hold
from distckpt.run.history import History
from distckpt.run.publish import Then, publish
from distckpt.run.replicate import Replicator
from distckpt.saving.arena import Arena
from distckpt.saving.commit import Attempt, commit_when_acked, remove_acks, write_refusal
from distckpt.saving.part import Part, Summed, write_part
from distckpt.signing import algorithm
from distckpt.store.base import FOR_GOOD
from distckpt.store.local import LocalStore
from distckpt.store.open import reopened
from distckpt.system import process_file, readable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from distckpt.format.manifest import Manifest
    from distckpt.store.base import Store

MOST_MESSAGE = 1 << 16
NOT_OURS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals for the training process, which says what becomes of the writer. SLURM sends them to all of a job's."""
_MOST_TEXT = 4000
_MOST_NOTE, _MOST_NOTES = 500, 8
"""Most characters, and notes, in a message: each character may be as many as 12 bytes there."""
_NICE = 5
_SHARE = 0.8
"""Of the timeout: how long the writer waits for acks, or goes on replicating after all is written. Training processes
wait for each other, and for it, somewhat longer: so they hear from it what went wrong."""


def main(arguments: list[str]) -> None:
    """Serve until the training process closes the socket or is gone, and then finish."""
    descriptor, trainer, timeout, seconds = arguments
    for number in NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_OURS)  # it was started with them blocked
    os.nice(_NICE)
    with socket.socket(fileno=int(descriptor)) as line:
        writer = _Writer(line, int(trainer), float(timeout))
        writer.serve()
    if writer.newest and not writer.told_to_end:
        hold(*writer.newest, float(seconds))


class _Begun(NamedTuple):
    """A job, and the run that it is for."""

    history: History
    part: Part
    then: Then
    at: float

    @property
    def store(self) -> Store:
        return self.history.store


class _Writer:
    def __init__(self, line: socket.socket, trainer: int, timeout: float) -> None:
        self._line, self._timeout = line, timeout
        self._history: History | None = None
        self._arenas: dict[int, Arena] = {}
        self._begun: dict[int, _Begun] = {}
        self._trainer = trainer
        self._replicator: Replicator | None = None
        self.told_to_end = False
        self.newest: tuple[Path, str, Arena, int] | None = None
        """Run and key of the data file that was written last, and where in memory its first so many bytes lie."""

    def serve(self) -> None:
        """Do what messages say, one after another."""
        for message, descriptors in self._messages():
            match message["do"]:
                case "arena":
                    if old := self._arenas.pop(message["arena"], None):
                        self.newest = None if self.newest and self.newest[2] is old else self.newest
                        old.close()
                    self._arenas[message["arena"]] = Arena(message["nbytes"], descriptors[0])
                case "begin":
                    self._begun[message["job"]] = self._begin(message)
                case "staged":
                    self._answer(message["job"], self._done(self._finish, self._begun.pop(message["job"]), message))
                case "commit":
                    self._answer(message["job"], self._done(self._commit, self._begun.pop(message["job"])))
                case "forget":
                    del self._begun[message["job"]]
                case "replicate":
                    if self._replicator:
                        self._replicator.again()
                    else:
                        self._replicator = Replicator(message, self._warn)
                case "end":
                    self.told_to_end = True
                case "give-up":
                    kind, text = message["error"]
                    self._refuse(self._begun.pop(message["job"]), RanksMissing(f"{kind}: {text}"))
                    self._answer(message["job"], {"error": [kind, text]})
            if self._replicator:
                self._replicator.give_way(saving=bool(self._begun))
        for begun in self._begun.values():
            self._refuse(begun, RanksMissing("the training process ended before it had staged its state"))
        if self._replicator:
            self._replicator.give_way(saving=False)
            self._replicator.finish(_SHARE * self._timeout)

    def _messages(self) -> Any:
        """Messages and their descriptors, until the training process closes its end or is gone.

        It is watched itself, too: processes that it has forked may hold its end open for longer.
        """
        with contextlib.ExitStack() as stack:
            watched: list[int] = [self._line.fileno()]
            patience = None
            try:
                watched.append(process_file(self._trainer))
                stack.callback(os.close, watched[-1])
            except ProcessLookupError:
                patience = 0.0  # it is gone: what it has sent is all there is
            except OSError:
                pass  # a system without: then only the socket tells of its end
            while True:
                if self._line.fileno() not in readable(watched, patience):
                    return
                try:
                    data, descriptors, _, _ = socket.recv_fds(self._line, MOST_MESSAGE, 1)
                except ConnectionError:
                    return
                if not data:
                    return
                yield json.loads(data), descriptors

    def _begin(self, message: Mapping[str, Any]) -> _Begun:
        directory = StepDir.parse(message["directory"])
        assert directory is not None
        history = self._history
        if history is None or history.store.address != message["store"]:
            history = self._history = History(reopened(message["store"]))  # of one run: the next needs none of it
        attempt = Attempt(directory, message["attempt"], message["world_size"])
        return _Begun(history, Part(attempt, message["rank"]), Then.from_json(message["then"]), time.monotonic())

    def _done(self, work: Callable[..., None], *arguments: Any) -> dict[str, Any]:
        started = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work(*arguments)
        except Exception as e:  # noqa: BLE001  the training process raises it, at its next call
            return {"error": brief(e)}
        return {
            "notes": [str(w.message)[:_MOST_NOTE] for w in caught[:_MOST_NOTES]],
            "seconds": time.monotonic() - started,
        }

    def _finish(self, begun: _Begun, message: Mapping[str, Any]) -> None:
        """Write this rank's part, and on rank 0 commit."""
        view = self._arenas[message["arena"]].view
        start, stop = message["told"]
        told = json.loads(bytes(view[start:stop]))
        objects = {name: text.encode() for name, text in told["objects"].items()}
        draft = manifest.from_json(told["draft"]) if told["draft"] else None
        part = Part(begun.part.attempt, begun.part.rank, objects, draft)
        header = view[: message["header"]]
        content = Summed(header, [view[: message["covered"]]], FOR_GOOD, algorithm())
        draft = write_part(begun.store, part, content, len(header), message["size"])
        if isinstance(begun.store, LocalStore):
            key = part.attempt.key(part.name)
            self.newest = begun.store.root, key, self._arenas[message["arena"]], message["covered"]
        if part.rank == 0 or begun.then.apart:
            self._commit(begun, draft)

    def _commit(self, begun: _Begun, draft: Manifest | None = None) -> None:
        """Wait for the other ranks' acks, commit, and do what follows."""
        attempt = begun.part.attempt
        if begun.then.apart:
            if self._replicator:
                self._replicator.wake(attempt.directory)
            return
        made = commit_when_acked(begun.store, attempt, draft, timeout=_SHARE * self._timeout)
        remove_acks(begun.store, attempt)
        seconds = time.monotonic() - begun.at
        publish(begun.history, Checkpoint(begun.store, attempt.directory, made), begun.then, seconds)
        if self._replicator:
            self._replicator.wake(attempt.directory)

    def _refuse(self, begun: _Begun, error: Exception) -> None:
        with contextlib.suppress(StoreError):  # those who wait for this rank find out by their own timeout
            write_refusal(begun.store, begun.part.attempt, begun.part.rank, error)

    def _answer(self, job: int, said: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the training process is gone: what is staged is finished all the same
            self._line.send(json.dumps({"job": job, **said}).encode())

    def _warn(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._line.send(json.dumps({"warn": text[:_MOST_TEXT]}).encode())


def brief(error: BaseException) -> list[str]:
    """Class and text of an error, as a message has them."""
    kind = type(error).__name__ if isinstance(error, DistckptError) else "StoreError"
    return [kind, failure_text(error)[:_MOST_TEXT]]


if __name__ == "__main__":
    main(sys.argv[1:])
