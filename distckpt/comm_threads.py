"""Ranks as threads of one process: for tests of logic, and for what is simulated. See comm.Comm."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distckpt.comm import ranks_text
from distckpt.errors import RanksMissing

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class _Round:
    """One collective among threads."""

    what: str
    payloads: dict[int, bytes] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class ThreadComm:
    """Ranks as threads of one process, for tests of logic."""

    def __init__(self, rank: int, rounds: ThreadRounds, timeout: float) -> None:
        self.rank, self.world_size, self.timeout = rank, rounds.world_size, timeout
        self._rounds, self._number = rounds, 0

    @staticmethod
    def group(world_size: int, timeout: float = 10.0) -> list[ThreadComm]:
        """Comms of `world_size` ranks, one for each thread."""
        rounds = ThreadRounds(world_size)
        return [ThreadComm(rank, rounds, timeout) for rank in range(world_size)]

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:
        """See Comm.all_gather."""
        self._number += 1
        now = self._rounds.join(self._number, what, self.rank, payload)
        if not now.done.wait(self.timeout):
            missing = [r for r in range(self.world_size) if r not in now.payloads]
            raise RanksMissing(
                f"{what}: {ranks_text(missing, self.world_size)} did not answer within {self.timeout:g} s"
            )
        return [now.payloads[r] for r in range(self.world_size)]

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:
        """See Comm.broadcast."""
        buffer[:] = self.all_gather(what, bytes(buffer))[source]

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """See Comm.swap."""
        for rank, data in outgoing.items():
            self._rounds.mailbox(self.rank, rank).put(bytes(data))
        for rank, buffer in incoming.items():
            buffer[:] = self._received(what, rank)

    def _received(self, what: str, source: int) -> bytes:
        try:
            return self._rounds.mailbox(source, self.rank).get(timeout=self.timeout)
        except queue.Empty:
            raise RanksMissing(f"{what}: rank {source} sent nothing within {self.timeout:g} s") from None

    def close(self) -> None:
        """See Comm.close."""


class ThreadRounds:
    """What the threads of one ThreadComm group share. A round in which they ask for different things is an error."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._rounds: dict[int, _Round] = {}
        self._mailboxes: dict[tuple[int, int], queue.Queue[bytes]] = {}
        self._lock = threading.Lock()

    def mailbox(self, source: int, to: int) -> queue.Queue[bytes]:
        """What one rank has sent to another."""
        with self._lock:
            return self._mailboxes.setdefault((source, to), queue.Queue())

    def join(self, number: int, what: str, rank: int, payload: bytes) -> _Round:
        """Give a rank's payload to its n-th round."""
        with self._lock:
            now = self._rounds.setdefault(number, _Round(what))
            if now.what != what or any(len(p) != len(payload) for p in now.payloads.values()):
                raise RuntimeError(f"rank {rank} is at {what!r} ({len(payload)} bytes), others at {now.what!r}")
            now.payloads[rank] = payload
            if len(now.payloads) == self.world_size:
                now.done.set()
            return now
