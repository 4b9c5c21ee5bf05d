"""A checkpoint as it is to be written: some of its parts, other names, another dtype, divided over other files.

Nothing is read to make one. Whatever is asked of its tensors is read from the checkpoint below it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, Unsupported
from distckpt.format.box import Box
from distckpt.format.dtype import ITEM_SIZE
from distckpt.format.layout import chunk_name
from distckpt.format.partition import Copies, Grid, Pieces, Split
from distckpt.loading.open import Checkpoint
from distckpt.loading.stream import Stretch, stream
from distckpt.statedict import is_optimizer_object, parameters_of, references, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distckpt.format.manifest import Manifest, TensorInfo
    from distckpt.format.partition import Partition
    from distckpt.loading.open import Computed

_FLOATS = {name for name in ITEM_SIZE if name.startswith(("float", "bfloat"))} - {"float8_e8m0fnu", "float4_e2m1fn_x2"}


_STRICT = ("model", "optim")
"""Parts that no copy leaves out unasked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What a copy changes. None or empty: nothing.

    only: leads of the names to keep. rename: (pattern, replacement) pairs, regular expressions applied in order to
    the names of the model's tensors and of the optimizer's parameters. dtype: of the model's floating-point tensors.
    files: how many files the tensors are divided over. step: what the checkpoint is called.
    """

    only: tuple[str, ...] | None = None
    rename: tuple[tuple[str, str], ...] = ()
    dtype: str | None = None
    files: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _FLOATS:
            raise Unsupported(f"dtype {self.dtype!r}: one of {', '.join(sorted(_FLOATS))} is expected")
        if self.files is not None and self.files < 1:
            raise ValueError(f"world size {self.files}: at least 1 is expected")
        if isinstance(self.only, str):
            raise TypeError(f"only={self.only!r}: a tuple of parts is expected, such as ({self.only!r},)")
        for pattern, replacement in self.rename:
            try:
                re.sub(f"(?:{pattern})?", replacement, "")
            except re.error as e:  # noqa: PERF203  which of them it is is told
                raise ValueError(f"rename: {pattern!r} to {replacement!r} is no regular expression: {e}") from e

    def keeps(self, name: str) -> bool:
        """Whether a tensor or an object of this name is kept."""
        return self.only is None or any(name == lead or name.startswith(lead + ".") for lead in self.only)

    def renamed(self, fqn: str) -> str:
        """Fqn of a parameter, without its lead."""
        for pattern, replacement in self.rename:
            fqn = re.sub(pattern, replacement, fqn)
        return fqn


class Over(Checkpoint):
    """A checkpoint over another one, whose tensors are called otherwise there; what it holds is told by `content`."""

    def __init__(self, source: Checkpoint, content: Manifest, saved: Mapping[str, str]) -> None:
        super().__init__(source.store, source.directory, content)
        self._source, self._saved = source, saved
        self.name, self.foreign, self.notes, self.sources = source.name, source.foreign, source.notes, source.sources

    @property
    def base(self) -> Checkpoint:
        """See Checkpoint.base."""
        return self._source.base

    def saved_name(self, fqn: str) -> str:
        """See Checkpoint.saved_name."""
        return self._source.saved_name(self._saved[fqn])

    def computed(self, fqn: str) -> Computed | None:
        """See Checkpoint.computed."""
        return self._source.computed(self._saved[fqn])

    @property
    def bytes_read(self) -> int:
        """See Checkpoint.bytes_read."""
        return self._source.bytes_read

    def home(self, file: int) -> int:
        """See Checkpoint.home."""
        return self._source.home(file)


class View(Over):
    """A checkpoint after a Change. order: names, by group, of an optimizer's parameters that it has by position."""

    def __init__(self, source: Checkpoint, change: Change, order: Sequence[Sequence[str]] = ()) -> None:
        self._source, self._change, self._order = source, change, order
        content = source.manifest
        if odd := next((n for n in source.unreadable if change.keeps(n) and n.partition(".")[0] in _STRICT), None):
            raise Unsupported(f"{odd}: cannot be read safely: {source.unreadable[odd]}. only= copies the other parts")
        objects = {n: o for n, o in content.objects.items() if change.keeps(n)}
        self._parameters = {
            n: parameters_of(value["groups"]) for n in objects if is_optimizer_object(value := source.object(n))
        }
        self._positions = {
            at: name for n in self._parameters for at, name in self._ordered(source.object(n)["groups"]).items()
        }
        self._inside = {fqn for n in objects for fqn in references(source.object(n))}
        self._saved = self._named(n for n in content.tensors if change.keeps(n))
        self._aliases = {
            self._live(alias): self._live(fqn)
            for alias, fqn in content.aliases.items()
            if change.keeps(alias) and change.keeps(fqn)
        }
        if change.only and not self._saved and not objects:
            raise Mismatch(f"only={change.only!r}: {source.name} has no such part; it has {_leads(source)}")
        changed = replace(
            content,
            step=content.step if change.step is None else change.step,
            tensors=self._divided(),
            objects=objects,
            rank_objects={n: p for n, p in content.rank_objects.items() if change.keeps(n)},
            aliases=self._aliases,
        )
        super().__init__(source, changed, self._saved)
        self.unreadable = {n: why for n, why in source.unreadable.items() if change.keeps(n)}

    # -- names -----------------------------------------------------------------------------------------------------

    def _live(self, fqn: str) -> str:
        """Name here of a saved tensor."""
        for name, parameters in self._parameters.items():
            if fqn.startswith(name + ".") and (found := state_of(fqn, name, parameters)):
                return f"{name}.{self._parameter(found[0])}.{found[1]}"
        lead, dot, rest = fqn.partition(".")
        return f"{lead}.{self._change.renamed(rest)}" if dot and lead == "model" and fqn not in self._inside else fqn

    def _ordered(self, groups: list[dict[str, Any]]) -> dict[Any, str]:
        """Names of parameters by position. Mismatch if the order has other groups."""
        positions = [group["params"] for group in groups]
        if not self._order or any(isinstance(p, str) for of_group in positions for p in of_group):
            return {}
        if [*map(len, positions)] != [*map(len, self._order)]:
            raise Mismatch(
                f"order= has groups of {[*map(len, self._order)]} names, {self._source.name} of "
                f"{[*map(len, positions)]} parameters"
            )
        return {p: n for ps, names in zip(positions, self._order, strict=True) for p, n in zip(ps, names, strict=True)}

    def _parameter(self, parameter: Any) -> Any:
        parameter = self._positions.get(parameter, parameter)
        return self._change.renamed(parameter) if isinstance(parameter, str) else parameter

    def _named(self, fqns: Iterator[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for fqn in fqns:
            if (live := self._live(fqn)) in found:
                raise Mismatch(f"rename gives {found[live]} and {fqn} the same name, {live}")
            found[live] = fqn
        return found

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _divided(self) -> dict[str, TensorInfo]:
        infos = {live: self._cast(live, self._source.manifest.tensors[saved]) for live, saved in self._saved.items()}
        if self._change.files is None:
            return {live: replace(i, partition=self._at_home(i.partition)) for live, i in infos.items()}
        wanted = {live: i for live, i in infos.items() if not isinstance(i.partition, Copies)}
        partitions = _dealt(wanted, self._change.files)
        return {live: replace(i, partition=partitions.get(live, i.partition)) for live, i in infos.items()}

    def _at_home(self, partition: Partition) -> Partition:
        """Partition over files as they are written: what several virtual files of the source hold goes into one."""
        if not isinstance(partition, Pieces):
            return partition
        pieces = tuple((self._source.home(file), region) for file, region in partition.pieces)
        return partition if pieces == partition.pieces else replace(partition, pieces=pieces)

    def _cast(self, live: str, info: TensorInfo) -> TensorInfo:
        wanted = self._change.dtype
        if wanted is None or info.dtype not in _FLOATS or not live.startswith("model.") or live in self._inside:
            return info
        return replace(info, dtype=wanted)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, each counted once."""
        return sum(prod(i.shape) * ITEM_SIZE[i.dtype] for i in self.manifest.tensors.values())

    # -- what a Checkpoint answers ---------------------------------------------------------------------------------

    def home(self, file: int) -> int:
        """See Checkpoint.home: its partitions say so themselves."""
        return file

    def object(self, name: str) -> Any:
        """See Checkpoint.object: an optimizer's parameters are called as here."""
        value = self._source.object(name)
        if name == "deepspeed" and self._change.rename:
            return self._engines(value)
        if name not in self._parameters:
            return value
        groups = [{**g, "params": [self._parameter(p) for p in g["params"]]} for g in value["groups"]]
        return {**value, "groups": groups, "values": {self._parameter(p): v for p, v in value["values"].items()}}

    def _engines(self, value: Any) -> Any:
        """What is said of DeepSpeed engines: their frozen parameters are called as here."""
        engines = value.get("engines") if isinstance(value, dict) else None
        if not isinstance(engines, dict):
            return value
        made = dict(engines)
        for key, engine in engines.items():
            match engine:
                case {"module": {"frozen": [*names]}}:
                    frozen = [self._parameter(name) for name in names]
                    made[key] = {**engine, "module": {**engine["module"], "frozen": frozen}}
        return {**value, "engines": made}

    def rank_objects(self, rank: int) -> dict[str, Any]:
        """See Checkpoint.rank_objects."""
        return {n: v for n, v in self._source.rank_objects(rank).items() if self._change.keeps(n)}

    def read_all(self) -> None:
        """Read every tensor, verified where it has checksums. Corrupt."""
        wanted = [Stretch.whole(fqn, Box.whole(i.shape), i.dtype) for fqn, i in self.manifest.tensors.items()]
        for _ in stream(self, wanted):
            pass

    def verify_all(self) -> None:
        """Check what reading does not check, of all that is kept. Corrupt."""
        wanted: dict[Checkpoint, list[tuple[int, str]]] = {}
        for fqn in self._saved:
            made = self.computed(fqn)
            for of, name in made.reads if made else ((self, fqn),):
                wanted.setdefault(of.base, []).extend(_chunks(of.base, of.saved_name(name)))
        for base, chunks in wanted.items():
            base.verify(chunks)


def _dealt(infos: Mapping[str, TensorInfo], files: int) -> dict[str, Partition]:
    """Partition over `files` files of about the same bytes. Whole tensors that lie beside each other stay together, as
    every cut costs its reader parts of blocks; only one that is most of a file's share is cut.
    """  # noqa: D205
    sizes = {fqn: prod(i.shape) * ITEM_SIZE[i.dtype] for fqn, i in infos.items()}
    total = sum(sizes.values())
    found: dict[str, Partition] = {}
    for fqn, info in infos.items():
        shape = info.shape
        longest = max(range(len(shape)), key=lambda d: shape[d], default=None)
        if files > 1 and longest is not None and 2 * files * sizes[fqn] > total and shape[longest] >= files:
            splits = tuple((Split(files, 1),) if d == longest else () for d in range(len(shape)))
            found[fqn] = Grid(shape, splits, 0)
    rest = sum(sizes[fqn] for fqn in infos if fqn not in found)
    position = 0
    for fqn in sorted(infos.keys() - found.keys(), key=lambda n: (-ITEM_SIZE[infos[n].dtype], not _of_model(n), n)):
        shape = infos[fqn].shape
        middle = position + sizes[fqn] // 2
        found[fqn] = Grid(shape, ((),) * len(shape), min(files - 1, middle * files // max(1, rest)))
        position += sizes[fqn]
    return found


def _of_model(fqn: str) -> bool:
    return fqn.startswith("model.")


def _chunks(checkpoint: Checkpoint, fqn: str) -> Iterator[tuple[int, str]]:
    info = checkpoint.manifest.tensors[fqn]
    for file, region in info.partition.overlapping(Box.whole(info.shape)):
        yield file, chunk_name(fqn, region, info.shape)


def _leads(source: Checkpoint) -> str:
    found: Mapping[str, None] = dict.fromkeys(
        n.partition(".")[0] for n in (*source.manifest.tensors, *source.manifest.objects)
    )
    return ", ".join(found)
