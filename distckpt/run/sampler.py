"""Which samples come next: one order of the data for every world size, and one count of where the job stands in it.

Rule 1  The order of an epoch is a function of (seed, epoch, size) alone: no world size, no rank, no library version.
Rule 2  The position counts samples that optimizer steps have consumed. What a loader has merely fetched counts for
        nothing: it is fetched again after a resume.
Rule 3  A global batch is the next `global_batch` samples of the order; rank r takes the r-th contiguous part of it.

So a job that is killed and resumed on any number of ranks sees each sample exactly once an epoch, the stated tail
aside.
"""

from __future__ import annotations

from operator import index
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distckpt.errors import Mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence, Sized

VERSION = 1
"""Of the order itself. A release that orders samples in another way has another number, and refuses to mix the two."""

_POSITION = ("seed", "epoch", "consumed", "dropped", "repeated")


class ElasticSampler:
    """Indices of this rank's samples, for `DataLoader(sampler=...)`; call `advance()` once after each optimizer step.

    `size` is the number of samples, or a data set that has a length. `global_batch` is the number of samples of one
    optimizer step over all ranks and accumulated micro-batches. `rank` and `world_size` are those of
    torch.distributed unless given; under tensor or pipeline parallelism give those of the data-parallel group.

    What is left of an epoch when no whole global batch is, is its tail. `tail="drop"` skips those samples and counts
    them in `dropped`; `tail="pad"` fills the batch with the first samples of the epoch's order and counts these in
    `repeated`. Either way the next epoch begins.

    ValueError for numbers that cannot work. Iterating is free of side effects: an iterator is a snapshot of the
    position when it was made, so loaders may prefetch, with workers or without.
    """

    def __init__(
        self,
        size: int | Sized,
        *,
        global_batch: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        tail: Literal["drop", "pad"] = "drop",
    ) -> None:
        self.size = len(size) if hasattr(size, "__len__") else index(size)
        self.global_batch = index(global_batch)
        self.seed = index(seed)
        self.shuffle = shuffle
        self.tail = tail
        self.rank, self.world_size = _place(rank, world_size)
        self.epoch = 0
        """Number of the current epoch, from 0."""
        self.consumed = 0
        """Samples of the current epoch that optimizer steps have consumed."""
        self.dropped = 0
        """Samples skipped at the ends of all epochs so far."""
        self.repeated = 0
        """Samples seen twice at the ends of all epochs so far."""
        self._order: tuple[tuple[int, int], np.ndarray[Any, Any]] | None = None
        self._check()

    def _check(self) -> None:
        if self.tail not in ("drop", "pad"):
            raise ValueError(f"tail is 'drop' or 'pad', not {self.tail!r}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in [0, 2**64), not {self.seed}")
        if self.size < 1 or self.global_batch < 1:
            raise ValueError(f"size ({self.size}) and global_batch ({self.global_batch}) must be positive")
        if self.tail == "drop" and self.size < self.global_batch:
            raise ValueError(
                f"the data set has {self.size} samples, fewer than one global batch of {self.global_batch}, and "
                f"tail='drop' would drop them all; use a smaller global_batch, or tail='pad'"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not among the {self.world_size} ranks")
        if self.global_batch % self.world_size:
            work = ", ".join(str(n) for n in range(1, self.global_batch + 1) if self.global_batch % n == 0)
            raise ValueError(
                f"global_batch {self.global_batch} cannot be divided among {self.world_size} ranks; "
                f"world sizes that work: {work}"
            )

    def __len__(self) -> int:
        """Samples that this rank has left in the current epoch, the tail included if it is padded."""
        return self._batches_left() * (self.global_batch // self.world_size)

    def __iter__(self) -> Iterator[int]:
        """Indices of this rank's samples of the rest of the epoch, as it stands at this call."""
        return self._indices(self._order_of(self.epoch), self.consumed, self._batches_left())

    def _indices(self, order: Sequence[int] | np.ndarray[Any, Any], start: int, batches: int) -> Iterator[int]:
        share = self.global_batch // self.world_size
        for batch in range(batches):
            first = start + batch * self.global_batch + self.rank * share
            if first + share <= self.size:
                part = order[first : first + share]
            else:  # the padded tail goes round to the beginning of the order
                part = [order[i % self.size] for i in range(first, first + share)]
            yield from map(int, part)

    def advance(self) -> None:
        """Count one global batch as consumed. Call once per optimizer step, on every rank."""
        self.consumed += self.global_batch
        self._roll_over()

    def state_dict(self) -> dict[str, int | str | bool]:
        """Everything that decides which samples come next; equal on every rank."""
        return {
            "version": VERSION,
            **{name: getattr(self, name) for name in _POSITION},
            "size": self.size,
            "global_batch": self.global_batch,
            "shuffle": self.shuffle,
            "tail": self.tail,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. The saved seed replaces this sampler's; global_batch and world size may differ.

        Mismatch, with nothing changed, if the position means something else here: another version, data set size,
        shuffle or tail. Iterators made before the call do not follow it.
        """
        self.check_state_dict(state)
        for name in _POSITION:
            setattr(self, name, state[name])
        self._roll_over()  # a larger global_batch than the saved one may find no whole batch left

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Mismatch, listing every problem, if a saved position does not fit this sampler."""
        if problems := self._problems(state):
            raise Mismatch(
                "the saved sampler position does not fit this sampler; " + "; ".join(problems) + "; give the sampler "
                "the data set and options it was saved with, or leave it out of the state to begin at the first epoch"
            )

    def _problems(self, saved: Mapping[str, Any]) -> list[str]:
        """Everything about a saved position that does not fit here."""
        if not isinstance(saved, dict):
            return [f"expected a dict, found {saved!r}"]
        here = self.state_dict()
        problems = [
            f"{name}: expected {here[name]!r}, found {saved.get(name)!r}"
            for name in ("version", "size", "shuffle", "tail")
            if here[name] != saved.get(name)
        ]
        most = {"seed": (1 << 64) - 1, "epoch": (1 << 32) - 1, "consumed": self.size - 1}
        for name in _POSITION:
            value = saved.get(name)
            if type(value) is not int or not 0 <= value <= most.get(name, value):
                limit = f" of at most {most[name]}" if name in most else ""
                problems.append(f"{name}: expected a count{limit}, found {value!r}")
        return problems

    def _batches_left(self) -> int:
        left = self.size - self.consumed
        return left // self.global_batch if self.tail == "drop" else -(-left // self.global_batch)

    def _roll_over(self) -> None:
        """Begin the next epoch if this one has no batch left."""
        if self._batches_left() > 0:
            return
        self.dropped += max(0, self.size - self.consumed)
        self.repeated += max(0, self.consumed - self.size)
        self.epoch += 1
        self.consumed = 0

    def _order_of(self, epoch: int) -> Sequence[int] | np.ndarray[Any, Any]:
        """Order of the samples in an epoch: 4 bytes a sample (8 from 2**31 samples on), about 5 s for 10**8."""
        if not self.shuffle:
            return range(self.size)
        if self._order is None or self._order[0] != (self.seed, epoch):
            # RandomState is NumPy's frozen stream: default_rng may change its shuffle in any release (NEP 19)
            words = np.array([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch], dtype=np.uint32)
            order = np.arange(self.size, dtype=np.int32 if self.size < 1 << 31 else np.int64)
            np.random.RandomState(words).shuffle(order)
            self._order = (self.seed, epoch), order
        return self._order[1]


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"give rank and world_size together, or neither; found rank {rank}, world_size {world_size}")
    if rank is None or world_size is None:
        from distckpt.comm import current

        here = current()
        return here.rank, here.world_size
    return rank, world_size
