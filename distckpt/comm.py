"""Ranks talking. Few verbs above few primitives, so that no collective stands bare anywhere else.

`Comm.all_gather` moves a small fixed-size message, `swap` bulk from rank to rank; `together` runs a
function on every rank and lets every rank learn every failure; `exchange` moves messages of any length, for the
exceptions. Every wait ends: RanksMissing names who did not answer. A comm that failed once stays failed: its ranks no
longer agree on where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distckpt import __version__
from distckpt.errors import (
    DistckptError,
    Mismatch,
    OutOfStep,
    RankFailed,
    RanksMissing,
    StateWarning,
    by_name,
    failure_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MESSAGE = 120
"""Bytes of the message of `together`: what the rank is at (a digest), a status byte, a length byte, the payload."""
_PLACE = 4
MAX_PAYLOAD = MESSAGE - _PLACE - 2


class Comm(Protocol):
    """Ranks 0 to world_size - 1, each calling the same things in the same order."""

    rank: int
    world_size: int
    timeout: float
    """Seconds that any one wait lasts at most."""

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:
        """Every rank's payload, by rank. Payloads have the same length on all ranks. RanksMissing, saying `what`."""
        ...

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:
        """Fill every rank's buffer with that of `source`. Buffers have the same length. RanksMissing, saying `what`."""
        ...

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """Send to, and receive from, several ranks at once: rank -> bytes, at least one. RanksMissing.

        A rank that receives knows how much. Returns once what is sent may change.
        """
        ...

    def close(self) -> None:
        """Give back what the comm holds. Not collective."""
        ...


def together(comm: Comm, what: str, fn: Callable[[], bytes | None]) -> list[bytes]:
    """Run `fn` on every rank; return every rank's result (at most MAX_PAYLOAD bytes), by rank.

    If it raised on any rank, every rank raises: the ranks' own error class where they agree on one, else RankFailed,
    with each rank and its cause in the message. One all-gather of MESSAGE bytes when all is well.
    """
    failure: Exception | None = None
    payload = b""
    try:
        payload = fn() or b""
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"{what}: a result of {len(payload)} bytes; at most {MAX_PAYLOAD} travel")
    except Exception as e:  # noqa: BLE001  every failure must reach every rank; it is raised again below
        failure = e
    if comm.world_size == 1:
        if failure:
            raise failure
        return [payload]
    message = bytes([failure is not None, len(payload) if not failure else 0]) + (b"" if failure else payload)
    try:
        replies, distinct = _meet(comm, what, message)
    except (RanksMissing, OutOfStep) as e:
        if failure is None:
            raise
        raise type(e)(f"{e}. Before that, rank {comm.rank} had failed: {failure_text(failure)}") from failure
    if not any(reply[_PLACE] for reply in distinct):
        payloads = {reply: reply[_PLACE + 2 : _PLACE + 2 + reply[_PLACE + 1]] for reply in distinct}
        return [payloads[reply] for reply in replies]
    text = json.dumps([type(failure).__name__, str(failure) or repr(failure)] if failure else None)
    causes = {
        rank: cause
        for rank, reply in enumerate(exchange(comm, what, text.encode()))
        if (cause := json.loads(reply)) is not None
    }
    raise failure_of(what, causes, comm.world_size) from failure


def failure_of(what: str, causes: dict[int, tuple[str, str]], world_size: int) -> DistckptError:
    """One error for what happened on several ranks: `causes` is rank -> (class name, message)."""
    kinds = {by_name(kind) for kind, _ in causes.values()}
    ranks_of: dict[str, list[int]] = {}
    for rank, (kind, text) in sorted(causes.items()):
        ranks_of.setdefault(text if by_name(kind) is not RankFailed else f"{kind}: {text}", []).append(rank)
    lines = [f"{ranks_text(ranks, world_size)}: {text}" for text, ranks in ranks_of.items()]
    error = kinds.pop() if len(kinds) == 1 else RankFailed
    return error(f"{what} failed on " + ("; on ".join(lines)))


def ranks_text(ranks: Sequence[int], world_size: int) -> str:
    """Ranks as a message names them."""
    if len(ranks) == world_size:
        return "every rank"
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def exchange(comm: Comm, what: str, data: bytes) -> list[bytes]:
    """Every rank's bytes, of any length, by rank; for what is rare. Few that have something each send it to all."""
    said, distinct = _meet(comm, what, len(data).to_bytes(8, "little"))
    told = {reply: int.from_bytes(reply[_PLACE : _PLACE + 8], "little") for reply in distinct}
    lengths = [told[reply] for reply in said]
    speakers = [rank for rank, length in enumerate(lengths) if length]
    if len(speakers) > max(1, comm.world_size // 4):
        replies = comm.all_gather(what, data.ljust(max(1, *lengths), b"\0"))
        return [reply[:n] for reply, n in zip(replies, lengths, strict=True)]
    found = [b""] * comm.world_size
    for rank in speakers:
        buffer = bytearray(data if rank == comm.rank else lengths[rank])
        comm.broadcast(what, memoryview(buffer), rank)
        found[rank] = bytes(buffer)
    return found


def _meet(comm: Comm, what: str, body: bytes) -> tuple[list[bytes], set[bytes]]:
    """Every rank's message (its body from _PLACE on), by rank; and the few different ones, however many ranks.

    OutOfStep on every rank unless all are at the same point; Mismatch unless they run the same version of distckpt.

    All messages that begin an exchange have the same length: so ranks that went different ways find out here, and not
    by taking each other's bytes for something else.
    """
    here = f"{__version__} {what}".encode()
    place = hashlib.blake2b(here, digest_size=_PLACE).digest()
    replies = comm.all_gather(what, (place + body).ljust(MESSAGE, b"\0"))
    distinct = set(replies)
    if all(reply[:_PLACE] == place for reply in distinct):
        return replies, distinct
    versions: dict[str, list[int]] = {}
    at: dict[str, list[int]] = {}
    for rank, said in enumerate(comm.all_gather("telling where each rank is", here[:MESSAGE].ljust(MESSAGE, b"\0"))):
        version, _, text = said.rstrip(b"\0").decode(errors="replace").partition(" ")
        versions.setdefault(version, []).append(rank)
        at.setdefault(text, []).append(rank)
    if len(versions) > 1:
        told = "; ".join(f"{ranks_text(ranks, comm.world_size)}: {version}" for version, ranks in versions.items())
        raise Mismatch(f"ranks run different versions of distckpt ({told}): install the same one for all of them")
    told = "; ".join(f"{ranks_text(ranks, comm.world_size)}: {text}" for text, ranks in at.items())
    raise OutOfStep(
        f"ranks are not at the same point ({told}): every rank must call the same methods of Checkpointer, with the "
        "same options, in the same order; restart the job if one of them was interrupted in the middle of a call"
    )


class SoloComm:
    """One process."""

    rank = 0
    world_size = 1

    def __init__(self, timeout: float = 600.0) -> None:
        self.timeout = timeout

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:  # noqa: ARG002
        """See Comm.all_gather."""
        return [payload]

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:
        """See Comm.broadcast."""

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """See Comm.swap. There is nobody to send to."""
        if outgoing or incoming:
            raise NotImplementedError(what)

    def close(self) -> None:
        """See Comm.close."""


class TorchComm:
    """torch.distributed, on a gloo group of its own, whatever backend trains.

    When a collective fails, each survivor signs in at the rendezvous store; who has not signed in is missing.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        from datetime import timedelta

        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store, _world

        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.timeout = timeout
        self._patience = timedelta(seconds=timeout)
        name = _world.group_count  # that of the group to be made: equal on every rank
        # a clone: set_timeout reaches through a prefix to the store that NCCL and others wait at
        shared: Any = PrefixStore(f"distckpt/{name}", _get_default_store())
        self._store = shared.clone()
        self._store.set_timeout(timedelta(seconds=min(timeout, 10.0)))
        self._broken: str | None = None
        self._closed = False
        self._group: Any = None
        self._do("making a process group", self._join)

    def _join(self) -> None:
        import torch.distributed as dist

        self._group = dist.new_group(backend="gloo", timeout=self._patience)

    def all_gather(self, what: str, payload: bytes) -> list[bytes]:
        """See Comm.all_gather."""
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        replies = torch.empty(self.world_size * len(mine), dtype=torch.uint8)
        self._do(what, lambda: self._wait(dist.all_gather_single(replies, mine, group=self._group, async_op=True)))
        data = replies.numpy().tobytes()
        return [data[i : i + len(mine)] for i in range(0, len(data), len(mine))]

    def broadcast(self, what: str, buffer: memoryview, source: int) -> None:
        """See Comm.broadcast."""
        import torch
        import torch.distributed as dist

        tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        self._do(what, lambda: self._wait(dist.broadcast(tensor, source, group=self._group, async_op=True)))

    def swap(self, what: str, outgoing: Mapping[int, memoryview], incoming: Mapping[int, memoryview]) -> None:
        """See Comm.swap."""
        import torch
        import torch.distributed as dist

        def move() -> None:
            group = self._group
            works = [dist.irecv(torch.frombuffer(b, dtype=torch.uint8), r, group=group) for r, b in incoming.items()]
            works += [dist.isend(torch.frombuffer(b, dtype=torch.uint8), r, group=group) for r, b in outgoing.items()]
            for work in works:
                self._finish(work)

        self._do(what, move)

    def _do(self, what: str, operation: Callable[[], Any]) -> None:
        """Do an operation of torch.distributed. RanksMissing names who did not take part."""
        if self._closed:
            raise RanksMissing(f"{what}: the Checkpointer was closed, and talks to no other ranks; ask before that")
        if self._broken:
            raise RanksMissing(f"{what}: ranks were lost earlier ({self._broken}); restart the job")
        try:
            operation()
        except RuntimeError as e:
            self._broken = f"{what}: {self._who_is_missing()}"
            raise RanksMissing(self._broken) from e

    def _finish(self, work: Any) -> None:
        """Wait for a transfer: gloo does not tell of one, before the wait, that it is completed."""
        work.wait(self._patience)

    def _wait(self, work: Any) -> None:
        """Wait for a collective; give up when it times out or another rank has found it broken."""
        started = time.monotonic()
        pause, looked = 1e-5, started
        while not work.is_completed():
            time.sleep(pause)
            pause = min(pause * 1.5, 2e-3)
            now = time.monotonic()
            if now - started > self.timeout:
                raise RuntimeError("timed out")
            if now - looked > 0.25:  # gloo tells only a dead rank's neighbours; the others hear of it here
                looked = now
                if self._store.check(["broken"]):
                    raise RuntimeError("another rank found the collective broken")
        work.wait()

    def _who_is_missing(self) -> str:
        """Sign in, wait a while for the others to, and name those who did not."""
        try:
            self._store.set("broken", "1")  # once for all rounds: a rank may have got through the one that broke here
            self._store.set(str(self.rank), "1")
            missing = [r for r in range(self.world_size) if r != self.rank]
            deadline = time.monotonic() + min(self.timeout, 3.0)
            while missing and time.monotonic() < deadline:
                time.sleep(0.05)
                missing = [r for r in missing if not self._store.check([str(r)])]
        except RuntimeError as e:
            return f"the rendezvous store, which lives on rank 0 or in the launcher, is gone ({e})"
        if not missing:
            return "every rank answered in the end, but the collective broke; the network may be at fault"
        return f"{ranks_text(missing, self.world_size)} did not answer: dead, or busy with something else"

    def close(self) -> None:
        """See Comm.close. A broken group is left to the process's end: destroying it could wait for the dead."""
        import torch.distributed as dist

        if not (self._broken or self._closed) and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._closed = True


class Place(NamedTuple):
    """Where this process stands among the ranks."""

    rank: int
    world_size: int


def current() -> Place:
    """Rank and world size of torch.distributed where it is initialised, else (0, 1). No collective."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place(0, 1)


def default(timeout: float) -> Comm:
    """Comm of this job. Collective where torch.distributed is initialised: every rank makes it at the same point."""
    if current().world_size > 1:
        return TorchComm(timeout)
    told = os.environ.get("WORLD_SIZE", "1")
    if told.isdigit() and int(told) > 1:
        warnings.warn(
            f"WORLD_SIZE={told}, but torch.distributed is not initialised: each process saves a run of its own. Call "
            "init_process_group() first",
            StateWarning,
            stacklevel=4,
        )
    return SoloComm(timeout)
