"""State: fqn -> shards, plus objects. The only bridge between torch and the format.

An adapter turns live objects into a State and takes one back; after that no code asks which backend a piece came from.
A Layout says, in values equal on every rank, who holds which region of a tensor: `held`, a partition over ranks in
place of files, and `replicas`, the cuts along which ranks hold the same.

Invariant: a shard's tensor has exactly the elements of its region, in the region's row-major order (any strides).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from distckpt.errors import Unsupported
from distckpt.format.box import Box, Part, Region, Run, Shape
from distckpt.format.checksum import crc_of
from distckpt.format.dtype import ITEM_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from distckpt.format.manifest import TensorInfo
    from distckpt.format.partition import FlatEven, Grid, Pieces, Split


@dataclass(frozen=True, slots=True)
class Layout:
    """Who holds what of one tensor: a partition over ranks, each cell held alike along `replicas`."""

    held: Grid | FlatEven
    replicas: tuple[Split, ...] = ()


@dataclass(frozen=True, slots=True)
class Everywhere:
    """Each rank that has the tensor at all holds the whole of it."""


@dataclass(frozen=True, slots=True)
class Listed:
    """An irregular layout: a list of (rank, region), each element once."""

    pieces: Pieces


@dataclass(frozen=True, slots=True)
class Shard:
    """A region of a global tensor in this rank's memory."""

    region: Region
    tensor: torch.Tensor


@dataclass(frozen=True, slots=True)
class GlobalTensor:
    """One global tensor as this rank sees it: shape, torch dtype name, layout, and the shards it holds.

    `trusted`: replicas are equal by construction (parameters, optimizer state). Of others equality is checked.
    `frozen`: a parameter that is not trained.
    """

    shape: Shape
    dtype: str
    layout: Layout | Everywhere | Listed
    shards: tuple[Shard, ...]
    trusted: bool = True
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class RankObject:
    """A value that each rank has its own of, and what another world size means for it (manifest.ON_RESHARD)."""

    value: Any
    on_reshard: str = "refuse"


@dataclass(frozen=True, slots=True)
class JoinedObject:
    """A value of which each rank may know a part: dicts are joined by key, and lists under the key `joins`.

    Where ranks contradict each other each keeps its own, and `on_reshard` says what another world size means for it.
    """

    value: Any
    joins: str = ""
    on_reshard: str = "refuse"


@dataclass(frozen=True, slots=True)
class State:
    """What is saved, or what a load fills: tensors by fqn, aliases (other names of tied tensors), objects by name."""

    tensors: dict[str, GlobalTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Of targets: why the part with this lead cannot take what was saved."""

    @staticmethod
    def merged(states: Iterable[State]) -> State:
        """One state of several. Unsupported if two hold the same name."""
        whole = State()
        for state in states:
            for mine, new in (
                (whole.tensors, state.tensors),
                (whole.aliases, state.aliases),
                (whole.objects, state.objects),
            ):
                if taken := mine.keys() & new.keys():
                    raise Unsupported(f"two parts of the state have the same name: {min(taken)}")
                mine.update(new)  # type: ignore[arg-type]
        return whole


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint offers a state that is about to be loaded.

    `objects` holds this rank's view: shared objects, and of per-rank ones the value of rank `rank % saved world size`;
    `of_rank(name, rank)` reads another rank's.
    """

    tensors: Mapping[str, TensorInfo]
    objects: Mapping[str, Any]
    world_size: int
    rank: int
    target_world_size: int
    of_rank: Callable[[str, int], Any]
    rename: Callable[[str], str] = lambda fqn: fqn
    """What the caller of the load makes of a saved fqn (without its lead: `model.`, `optim.`)."""
    per_rank: Mapping[str, str] = field(default_factory=dict)
    """What the caller chose for per-rank objects at another world size: name -> "first"."""

    @property
    def resharded(self) -> bool:
        """Whether it was saved on another number of ranks."""
        return self.world_size != self.target_world_size


class Stateful(Protocol):
    """What a checkpoint is taken of and loaded into: a TrainState, or one adapter of it."""

    def capture(self) -> State:
        """What to save: views of live memory. No copies, no collectives, nothing that disturbs training."""
        ...

    def targets(self, saved: Saved) -> State:
        """Memory that a load fills, and the names of the objects it takes (True: needed, False: may be missing).

        What is made lazily is made now, but nothing live changes before `restore`. Mismatch where the checkpoint's
        objects do not fit.
        """
        ...

    def restore(self, saved: Saved) -> list[str]:
        """Take over objects and made memory, once the tensors are filled. Returns notes for the report."""
        ...


def dtype_name(tensor: torch.Tensor, fqn: str) -> str:
    """Name of a tensor's dtype as the format has it. Unsupported, with the fqn, for one that it has not."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ITEM_SIZE:
        raise Unsupported(f"{fqn}: dtype {name} cannot be stored")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """Dtype of this name. Unsupported if this torch has none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Unsupported(f"dtype {name} is not known to torch {torch.__version__}")
    return found


def part_of(shard: Shard, part: Part, box: Box) -> torch.Tensor:
    """View of the elements of `box`, a box inside `part` of the shard's region. No copy."""
    if isinstance(shard.region, Box):
        view = shard.tensor
    else:
        view = shard.tensor[part.start : part.start + part.box.numel].view(part.box.sizes)
    if box == part.box:
        return view
    for dim, (start, size) in enumerate(zip(box.relative_to(part.box).offsets, box.sizes, strict=True)):
        view = view.narrow(dim, start, size)
    return view


def cut(shard: Shard, region: Region) -> torch.Tensor | None:
    """View of `region` where it lies inside a shard of the same kind (box in box, run in run), else None."""
    if region == shard.region:
        return shard.tensor
    if isinstance(shard.region, Box) and isinstance(region, Box):
        return part_of(shard, Part(0, shard.region), region) if region.intersect(shard.region) == region else None
    if isinstance(shard.region, Run) and isinstance(region, Run):
        low = region.start - shard.region.start
        return shard.tensor[low : low + region.numel] if low >= 0 and region.stop <= shard.region.stop else None
    return None


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Memory of a contiguous CPU tensor, writable, as bytes. No copy."""
    if not tensor.numel():
        return memoryview(bytearray())
    tensor = tensor.detach()
    if not tensor.ndim or tensor.stride(-1) != 1:  # view() takes neither, though a dimension of size 1 may have any
        tensor = tensor.as_strided((tensor.numel(),), (1,))
    data: Any = tensor.view(torch.uint8).numpy()
    return memoryview(data).cast("B")


def content_of(tensor: torch.Tensor) -> int:
    """CRC-32C of a tensor's elements, in row-major order."""
    return crc_of([as_bytes(tensor.detach().resolve_conj().resolve_neg().cpu().contiguous())])


def is_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether `as_bytes` gives the tensor's own memory: a contiguous CPU tensor, no lazy conjugate or negative."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def check_material(tensor: torch.Tensor, fqn: str) -> None:
    """Unsupported for a tensor without memory."""
    if tensor.is_meta:
        raise Unsupported(f"{fqn}: is on the meta device; materialise it first (to_empty, then initialise or load)")


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_EVERYWHERE = Everywhere()


def plain(tensor: torch.Tensor, fqn: str, *, trusted: bool) -> GlobalTensor:
    """Return an ordinary tensor as the whole of a global one, the same on each rank that has it."""
    if tensor.layout is not torch.strided or type(tensor) not in _PLAIN:
        raise Unsupported(
            f"{fqn}: a {type(tensor).__module__}.{type(tensor).__qualname__} of layout {tensor.layout} cannot be saved"
        )
    check_material(tensor, fqn)
    shape = tuple(tensor.shape)
    shards = (Shard(Box.whole(shape), tensor.detach()),)
    return GlobalTensor(shape, dtype_name(tensor, fqn), _EVERYWHERE, shards, trusted)
