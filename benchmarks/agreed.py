"""What simulated ranks agree on, and what that costs one of them.

Of each class of ranks that hold the same, the first runs the real `agree` on a thread, and speaks for its class; so
does the second, as which all the others answer. What rank 0 received is kept; then it does its part again, alone and
timed, with every rank's answer as a value of its own, as torch.distributed gives them.
"""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distckpt.comm_threads import ThreadComm
from distckpt.saving.agree import MERGED, agree

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.simulated import Model, Sharding
    from distckpt.saving.agree import Agreement
    from distckpt.state import State

_PATIENCE = 120.0
_MOST_RECEIVED = 1 << 30


class TooMuch(Exception):
    """A collective that no rank could take part in."""


@dataclass(slots=True)
class Seated:
    """A rank of many: those that do not run answer as one that does. `received`: what collectives brought it.

    Only who holds the baton computes: what one has worked out of the descriptions, the others find made.
    """

    inner: ThreadComm
    rank: int
    world_size: int
    timeout: float
    seats: list[int]
    baton: threading.Lock
    sent: int = 0
    received: list[tuple[int, bytes]] = field(default_factory=list)

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:
        """See Comm.all_gather."""
        self.sent += len(payload)
        if (received := len(payload) * self.world_size) > _MOST_RECEIVED:
            raise TooMuch(f"{what}: each rank would receive {received / 1e9:.0f} GB")
        with _laid_down(self.baton):
            said = self.inner.all_gather(what, payload)
        replies = [said[seat] for seat in self.seats]
        if self.rank == 0:
            self.received.append((len(payload), b"".join(replies)))
        return replies

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:
        """See Comm.broadcast. Only the first rank of a class speaks, and that one runs."""
        self.sent += len(buffer) if self.rank == source else 0
        with _laid_down(self.baton):
            self.inner.broadcast(what, buffer, self.seats[source])
        self.received.append((len(buffer), bytes(buffer)))

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """See Comm.swap. Nothing is sent to plan."""
        raise NotImplementedError(what)

    def close(self) -> None:
        """See Comm.close."""


@dataclass(slots=True)
class Again:
    """Rank 0 once more, with what it received."""

    received: list[tuple[int, bytes]]
    world_size: int
    timeout: float = _PATIENCE
    rank: int = 0

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:  # noqa: ARG002
        """See Comm.all_gather."""
        length, data = self.received.pop(0)
        return [data[i : i + length] for i in range(0, len(data), length)]

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:  # noqa: ARG002
        """See Comm.broadcast."""
        buffer[:] = self.received.pop(0)[1]

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """See Comm.swap. Nothing is sent to plan."""
        raise NotImplementedError(what)

    def close(self) -> None:
        """See Comm.close."""


def agreement_of(model: Model, sharding: Sharding, repeats: int) -> tuple[Agreement, float, int]:
    """(what all ranks agree on, CPU milliseconds of rank 0 the first time, bytes that it hands to collectives)."""
    n = sharding.world_size
    classes = [sharding.class_of(rank) for rank in range(n)]
    pairs = [_first_two(classes, c) for c in range(sharding.classes)]
    running = sorted({rank for pair in pairs for rank in pair})
    seat_of = {rank: seat for seat, rank in enumerate(running)}
    seats = [seat_of.get(rank, seat_of[pairs[c][1]]) for rank, c in enumerate(classes)]
    baton = threading.Lock()
    comms = [
        Seated(inner, rank, n, inner.timeout, seats, baton)
        for rank, inner in zip(running, ThreadComm.group(len(running), _PATIENCE), strict=True)
    ]
    with ThreadPoolExecutor(len(running)) as pool:
        futures = [pool.submit(_in_turn, comm, sharding.state(model, classes[comm.rank])) for comm in comms]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        agreement = next(future.result() for future in sorted(done, key=futures.index))
    state = sharding.state(model, classes[0])
    times = [_timed(Again(list(comms[0].received), n), state) for _ in range(repeats)]
    return agreement, statistics.median(times), comms[0].sent


@contextmanager
def _laid_down(baton: threading.Lock) -> Iterator[None]:
    """Let others compute while this rank waits for them."""
    baton.release()
    try:
        yield
    finally:
        baton.acquire()


def _in_turn(comm: Seated, state: State) -> Agreement:
    with comm.baton:
        return _run(comm, state)


def _run(comm: Seated | Again, state: State) -> Agreement:
    return agree(comm, lambda: state, step=1, generation=lambda: 1)[1]


def _timed(comm: Again, state: State) -> float:
    MERGED.clear()
    started = time.thread_time()
    _run(comm, state)
    return (time.thread_time() - started) * 1e3


def _first_two(classes: list[int], of_class: int) -> tuple[int, int]:
    """Its first rank and its second; the first twice if it is alone."""
    first = classes.index(of_class)
    return first, next((r for r in range(first + 1, len(classes)) if classes[r] == of_class), first)
