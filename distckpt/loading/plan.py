"""Which chunks fill which shards, decided before a byte moves. Pure: takes and returns values.

Strict in both directions: each target is filled whole, from a tensor of the same shape and the same (or losslessly
widened) dtype, and nothing saved is left over; or one error lists every problem.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from distckpt.errors import Mismatch
from distckpt.format.dtype import widens
from distckpt.format.layout import escaped, slice_name
from distckpt.format.partition import Copies
from distckpt.state import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from distckpt.format.box import Region, Shape
    from distckpt.format.manifest import TensorInfo
    from distckpt.format.partition import Partition
    from distckpt.state import GlobalTensor, Saved, Shard, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a load is to be done.

    strict: missing and unexpected names are errors; else they are reported. only: leads of the names to load
    (`("model",)`), all others being neither missing nor unexpected. cast: narrow dtypes too. rename: what to make of
    a saved fqn, without its lead. per_rank: object name -> "first", for per-rank objects at another world size.
    verify: check what reading does not (other tools' files), before anything moves. foreign: the source is another
    tool's: strict about its models and optimizers only. complete: yet all that the state has must be there.
    """

    strict: bool = True
    foreign: bool = False
    verify: bool = False
    complete: bool = False
    only: tuple[str, ...] | None = None
    cast: bool = False
    rename: Callable[[str], str] | None = None
    per_rank: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.only is not None and (
            isinstance(self.only, str) or not self.only or not all(isinstance(lead, str) for lead in self.only)
        ):
            raise ValueError(f"only={self.only!r}: a tuple of the names to load, such as ('model',)")
        if wrong := {name: choice for name, choice in self.per_rank.items() if choice != "first"}:
            raise ValueError(f"per_rank={wrong!r}: 'first' is the only choice there is")

    def wants(self, name: str) -> bool:
        """Whether a name (of a tensor or an object) is to be loaded."""
        return self.only is None or _of(self.only, name)

    def strict_about(self, name: str) -> bool:
        """Whether it is an error if nobody takes this name, or (but see `complete`) it is missing."""
        return self.strict and (not self.foreign or _of(("model", "optim"), name))

    def needs(self, name: str) -> bool:
        """Whether it is an error if the checkpoint lacks this name."""
        return self.strict if self.complete else self.strict_about(name)

    def renamed(self, name: str) -> str:
        """Live name of a saved tensor: its lead (`model.`, `optim.`, `grad.`) stays, the rest is renamed."""
        lead, dot, rest = name.partition(".")
        return lead + dot + self.rename(rest) if self.rename and rest else name


class Item(NamedTuple):
    """One chunk that fills part of one shard."""

    fqn: str
    file: int
    name: str
    region: Region
    shape: Shape
    dtype: torch.dtype
    shard: Shard


@dataclass(slots=True)
class Plan:
    """Items to read, and what to report."""

    items: list[Item] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    cast: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan(
    saved: Saved,
    saved_names: dict[str, str],
    aliases: dict[str, str],
    targets: State,
    options: Options,
    *,
    unreadable: Mapping[str, str] | None = None,
) -> Plan:
    """Plan the load of `targets` from `saved`; `saved_names` gives each live name its name in the checkpoint.

    `aliases` are the checkpoint's, in live names; `unreadable`: what it has and cannot give, and why. Mismatch, listing
    every problem. What is unexpected is a problem only once no rank takes it (`refuse_unexpected`), or beside others.
    """
    made, used, cuts = Plan(), set[str](), Cuts()
    problems = [text for lead, text in targets.problems.items() if options.wants(lead)]
    for fqn, target in targets.tensors.items():
        if not options.wants(fqn):
            continue
        source = aliases.get(fqn, fqn)
        info = saved.tensors.get(source)
        if info is None:
            made.missing.append(fqn)
            continue
        used.add(source)
        fault, cast = _fit(info, target, options)
        if fault:
            problems.append(f"{fqn}: {fault}")
            continue
        if cast:
            made.cast[fqn] = cast
        made.loaded.append(fqn)
        if isinstance(info.partition, Copies):
            made.notes += _copies_note(fqn, info.partition, saved)
        own = _own_copy(info, saved)
        for shard in target.shards:
            if shard.region.numel:
                made.items += items_of(fqn, saved_names[source], info, shard, own, cuts=cuts)
    made.unexpected = sorted(
        n for n in saved.tensors if n not in used and options.wants(n) and not _of(targets.problems, n)
    )
    _compare_objects(made, saved, targets, options)
    known = [*saved.tensors, *saved.objects, *aliases, *targets.tensors, *targets.objects]
    problems += [
        f"only={lead!r}: neither the checkpoint nor the state has such a part"
        for lead in options.only or ()
        if not any(_of((lead,), name) for name in known)
    ]
    for fqn in made.missing:
        if why := [text for name, text in (unreadable or {}).items() if _of((name,), fqn)]:
            problems.append(f"{fqn}: cannot be read: {why[0]}")
        elif options.needs(fqn):
            problems.append(f"{fqn}: missing from the checkpoint")
    if problems:
        problems += [_unexpected(fqn, targets) for fqn in made.unexpected if options.strict_about(fqn)]
        raise Mismatch(listed(_MISFIT, problems))
    return made


_MISFIT = "the checkpoint does not fit the state; nothing was changed"


def refuse_unexpected(names: Iterable[str], targets: State) -> None:
    """Mismatch if there is a saved name that no rank's state takes."""
    if problems := [_unexpected(fqn, targets) for fqn in names]:
        raise Mismatch(listed(_MISFIT, problems))


def _compare_objects(made: Plan, saved: Saved, targets: State, options: Options) -> None:
    """Objects count like tensors; a target's object that may be missing has the value False."""
    wanted = {name: needed for name, needed in targets.objects.items() if options.wants(name)}
    made.missing += [name for name, needed in wanted.items() if needed and name not in saved.objects]
    made.unexpected += [name for name in saved.objects if name not in wanted and not _of(targets.problems, name)]


def _of(leads: Iterable[str], name: str) -> bool:
    """Whether a name is one of these leads, or below one."""
    return any(name == lead or name.startswith(lead + ".") for lead in leads)


def _unexpected(fqn: str, targets: State) -> str:
    if fqn in targets.aliases:
        return f"{fqn}: saved with values of its own, but tied to {targets.aliases[fqn]} here"
    return f"{fqn}: in the checkpoint, but not in the state (only=..., strict=False or rename= would help)"


def _fit(info: TensorInfo, target: GlobalTensor, options: Options) -> tuple[str, str]:
    """(what is wrong, else "", and how the dtype is cast, else "")."""
    if info.shape != target.shape:
        return f"saved with shape {list(info.shape)}, the state has {list(target.shape)}", ""
    if info.dtype == target.dtype:
        return "", ""
    how = f"{info.dtype} -> {target.dtype}"
    if widens(info.dtype, target.dtype):
        return "", how + " (lossless)"
    if options.cast:
        return "", how
    return f"saved as {info.dtype}, the state has {target.dtype}: a narrowing cast, made only with cast=True", ""


def _copies_note(fqn: str, partition: Copies, saved: Saved) -> list[str]:
    if not saved.resharded and partition.copy_of(saved.rank) is not None:
        return []
    return [
        f"{fqn}: differed between the {saved.world_size} ranks that saved it; every rank takes rank {partition.first}'s"
    ]


class Cuts:
    """Which chunks hold a region: worked out once for all tensors that are alike, which most are."""

    def __init__(self) -> None:
        self._known: dict[tuple[Partition, Region], list[tuple[int, Region, str]]] = {}

    def of(self, info: TensorInfo, region: Region) -> list[tuple[int, Region, str]]:
        """(file, chunk, slice at the end of its name) of every chunk with an element of the region."""
        key = (info.partition, region)
        if (found := self._known.get(key)) is None:
            chunks = info.partition.overlapping(region)
            found = self._known[key] = [(file, chunk, slice_name(chunk, info.shape)) for file, chunk in chunks]
        return found


def _own_copy(info: TensorInfo, saved: Saved) -> int | None:
    """File in which this very rank saved the tensor, where each rank saved its own."""
    if isinstance(info.partition, Copies) and not saved.resharded:
        return info.partition.copy_of(saved.rank)
    return None


def items_of(
    fqn: str, saved_name: str, info: TensorInfo, shard: Shard, own: int | None = None, *, cuts: Cuts | None = None
) -> Iterator[Item]:
    """Yield the chunks that fill a shard; of a tensor that each rank saved its own of, the one in file `own`."""
    dtype, name = torch_dtype(info.dtype), escaped(saved_name)
    for file, region, part in (cuts or Cuts()).of(info, shard.region):
        yield Item(fqn, file if own is None else own, name + part, region, info.shape, dtype, shard)


def listed(what: str, problems: list[str]) -> str:
    """Message that lists problems, the first 50 of them."""
    more = [f"  and {len(problems) - 50} more"] if len(problems) > 50 else []
    return "\n".join([f"{what}:", *(f"  {p}" for p in problems[:50]), *more])
