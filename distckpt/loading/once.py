"""Reads shared between ranks: a block that several need is read and verified by one, and its parts are sent.

What only one rank needs it reads as ever. The rest is read in rounds: each rank reads its units of a round, sends each
other rank the parts that it needs of them, and takes those that the others read for it. While a round's parts travel,
the next round's are being read.
"""

from __future__ import annotations

from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

from distckpt.comm import exchange, together
from distckpt.format.checksum import BLOCK
from distckpt.loading.deal import deal
from distckpt.loading.pattern import Need, plainest
from distckpt.loading.read import WINDOW, fill, read_blocks, runs_of
from distckpt.slabs import Slabs
from distckpt.state import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Future

    import torch
    from typing_extensions import Self

    from distckpt.comm import Comm
    from distckpt.loading.deal import Unit
    from distckpt.loading.open import Checkpoint
    from distckpt.loading.pattern import Pattern
    from distckpt.loading.read import Piece, Run


def read_once(comm: Comm, checkpoint: Checkpoint, runs: Sequence[Run]) -> None:
    """Fill the pieces of every rank's runs. Collective. Raises on every rank what fails on any."""
    found = [(run.file_index, plainest(piece.pattern), piece) for run in runs for piece in run.pieces]
    found.sort(key=lambda each: each[:2])
    mine = Need((file, pattern) for file, pattern, _ in found)
    told = exchange(comm, f"telling who needs what of {checkpoint.name}", mine.encode())
    needs = [Need.decode(said) for said in told]
    units = deal([need.stretches(BLOCK) for need in needs])
    rounds = _Rounds(comm, checkpoint, units, needs, [piece for _, _, piece in found])
    with rounds, ThreadPoolExecutor(checkpoint.store.pace.in_flight, "distckpt-read") as pool:
        rounds.begin(0, pool)
        alone = _alone(checkpoint, [(file, piece) for file, _, piece in found], units)
        together(comm, f"reading {checkpoint.name}", lambda: fill(checkpoint, alone))
        for number in range(max((u.round for u in units), default=-1) + 2):
            together(comm, f"reading {checkpoint.name}, round {number}", lambda n=number: rounds.turn(n, pool))  # type: ignore[misc]
            rounds.swap()


def _alone(checkpoint: Checkpoint, pieces: Sequence[tuple[int, Piece]], units: Sequence[Unit]) -> list[Run]:
    """Reads of what is not dealt out."""
    dealt: dict[int, list[tuple[int, int]]] = {}
    for unit in units:
        dealt.setdefault(unit.file, []).append((unit.first * BLOCK, unit.stop * BLOCK))
    left: dict[int, list[Piece]] = {}
    for file, piece in pieces:
        for low, high in _gaps(dealt.get(file, []), piece.start, piece.stop):
            left.setdefault(file, []).extend(piece.within(low, high))
    return [run for file, of_file in left.items() for run in runs_of(file, checkpoint.data_file(file), of_file, WINDOW)]


def _gaps(taken: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield what of [start, stop) lies outside these stretches, which are in order."""
    for i in range(max(0, bisect_left(taken, (start, 0)) - 1), len(taken)):
        low, high = taken[i]
        if low >= stop:
            break
        if low > start:
            yield start, low
        start = max(start, high)
    if start < stop:
        yield start, stop


class _Read(NamedTuple):
    """A unit that this rank reads: slab that begins with its blocks, and where in the file they begin."""

    unit: Unit
    blocks: Future[tuple[torch.Tensor, int]]


class _Message(NamedTuple):
    """What goes from one rank to another in a round: bytes in a slab, and (of what comes) the pieces that they are."""

    slab: torch.Tensor
    nbytes: int
    pieces: list[Piece]

    @property
    def memory(self) -> memoryview:
        """Its bytes."""
        return as_bytes(self.slab)[: self.nbytes]


class _Rounds:
    """This rank's side of the rounds. All is placed once its block ends."""

    def __init__(
        self, comm: Comm, checkpoint: Checkpoint, units: Sequence[Unit], needs: Sequence[Need], pieces: Sequence[Piece]
    ) -> None:
        self._comm, self._checkpoint, self._needs, self._pieces = comm, checkpoint, needs, pieces
        self._units: dict[int, list[Unit]] = {}
        for unit in units:
            self._units.setdefault(unit.round, []).append(unit)
        self._reads: list[_Read] = []
        self._outgoing: dict[int, _Message] = {}
        self._incoming: dict[int, _Message] = {}
        self._slabs, self._letters = (Slabs(piece.target.device for piece in pieces) for _ in range(2))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for slabs in (self._slabs, self._letters):
            slabs.arrived()

    def begin(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Begin this rank's reads of a round."""
        units = (u for u in self._units.get(number, []) if u.reader == self._comm.rank)
        self._reads = [_Read(unit, pool.submit(self._read, unit)) for unit in units]

    def _read(self, unit: Unit) -> tuple[torch.Tensor, int]:
        file = self._checkpoint.data_file(unit.file)
        return read_blocks(self._checkpoint, file, unit.first * BLOCK, unit.stop * BLOCK, self._slabs)

    def turn(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Place what came in the round before, finish this round's reads, and begin the next one's."""
        with self._letters.copying():
            for message in self._incoming.values():
                _take(message)
            for message in (*self._incoming.values(), *self._outgoing.values()):
                self._letters.give(message.slab)
        with self._slabs.copying():
            found = [(read.unit, *read.blocks.result()) for read in self._reads]
            self.begin(number + 1, pool)
            others = (rank for rank in range(self._comm.world_size) if rank != self._comm.rank)
            self._outgoing = {rank: message for rank in others if (message := self._gather(rank, found)).nbytes}
            self._incoming = self._expected(number)
            for unit, slab, start in found:
                for piece in self._parts(unit):
                    piece.place(slab, start)
                self._slabs.give(slab)

    def swap(self) -> None:
        """Send and receive the parts of this round."""
        outgoing = {rank: message.memory for rank, message in self._outgoing.items()}
        incoming = {rank: message.memory for rank, message in self._incoming.items()}
        self._comm.swap(f"sharing what was read of {self._checkpoint.name}", outgoing, incoming)

    def _gather(self, rank: int, found: Sequence[tuple[Unit, torch.Tensor, int]]) -> _Message:
        """Return what another rank needs of the units that were just read, one part after another."""
        parts = [(part, slab, start) for unit, slab, start in found for _, part in self._within(rank, unit)]
        nbytes = sum(part.nbytes for part, _, _ in parts)
        message = _Message(self._letters.take(nbytes), nbytes, [])
        at = 0
        for part, slab, start in parts:
            there = slab.as_strided(part.sizes, part.steps, part.start - start)
            message.slab[at : at + part.nbytes].view(part.sizes).copy_(there)
            at += part.nbytes
        return message

    def _expected(self, number: int) -> dict[int, _Message]:
        """Room for what other ranks send in a round."""
        pieces: dict[int, list[Piece]] = {}
        for unit in self._units.get(number, []):
            if unit.reader != self._comm.rank and (parts := list(self._parts(unit))):
                pieces.setdefault(unit.reader, []).extend(parts)
        found = {}
        for rank, of_rank in pieces.items():
            nbytes = sum(piece.pattern.nbytes for piece in of_rank)
            found[rank] = _Message(self._letters.take(nbytes), nbytes, of_rank)
        return found

    def _within(self, rank: int, unit: Unit) -> Iterator[tuple[int, Pattern]]:
        return self._needs[rank].within(unit.file, unit.first * BLOCK, unit.stop * BLOCK)

    def _parts(self, unit: Unit) -> Iterator[Piece]:
        """What of this rank's pieces lies in a unit."""
        for i in dict.fromkeys(i for i, _ in self._within(self._comm.rank, unit)):
            yield from self._pieces[i].within(unit.first * BLOCK, unit.stop * BLOCK)


def _take(message: _Message) -> None:
    """Fill pieces with what has come."""
    at = 0
    for piece in message.pieces:
        nbytes = piece.pattern.nbytes
        piece.take(message.slab[at : at + nbytes])
        at += nbytes
