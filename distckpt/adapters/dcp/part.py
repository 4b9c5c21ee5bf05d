"""What one rank writes of a dcp.save, and what it tells the coordinator of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.planner import WriteItemType

from distckpt.adapters import tensors
from distckpt.errors import Unsupported
from distckpt.format import objects
from distckpt.format.box import Box
from distckpt.format.checksum import crc_of, digest
from distckpt.format.datafile import Chunk, build, pack
from distckpt.format.layout import chunk_name, data_file
from distckpt.format.manifest import FileInfo
from distckpt.saving.image import MODEL_LEAD
from distckpt.saving.ring import content
from distckpt.signing import algorithm
from distckpt.state import as_bytes, plain
from distckpt.statedict import extract, is_extra_state

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

    from distckpt.format.box import Shape
    from distckpt.saving.commit import Attempt
    from distckpt.store.base import Store

_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the coordinator tells a rank, along with its plan: which attempt this is, and the rank in it.

    names: canonical name of each tensor that has another than in the state dict. models: leads of the models.
    """

    rank: int
    attempt: Attempt
    names: Mapping[str, str]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank tells the coordinator, along with its WriteResults.

    chunks: of tensors by canonical name: shape, dtype, boxes. values: encoded, by name in the state dict: those that
    DCP gave this rank to write. sums: a digest of every plain tensor and value that this rank holds, to be compared
    with other ranks'. ties: canonical names of tensors that are others of a model under a second name.
    """

    rank: int
    attempt: str
    file: FileInfo
    chunks: Mapping[str, tuple[Shape, str, tuple[Box, ...]]]
    values: Mapping[str, bytes]
    sums: Mapping[str, str]
    ties: Mapping[str, str]


def write(store: Store, ticket: Ticket, plan: SavePlan, planner: SavePlanner) -> Part:
    """Write this rank's data file, durably."""
    own = _Own(ticket, _state_dict(planner))
    own.take_values({item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO})
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            own.take_chunk(item, planner)
    if ticket.attempt.world_size > 1:
        own.sum_tensors()
    image = build(pack(_chunks(own)), b"{}", algorithm())
    name = data_file(ticket.rank, ticket.attempt.id)
    with content(image, [own.pieces[segment.name][1] for segment in image.segments]) as data:
        store.write(ticket.attempt.key(name), data, size=image.size, stable=data.stable)
    file = FileInfo(name, image.size, len(image.header), data.digest)
    chunks = {fqn: (shape, dtype, tuple(boxes)) for fqn, (shape, dtype, boxes) in own.chunks.items()}
    return Part(ticket.rank, ticket.attempt.id, file, chunks, own.values, own.sums, own.ties)


def _chunks(own: _Own) -> Iterator[Chunk]:
    for name, (fqn, tensor) in own.pieces.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        yield Chunk(name, dtype, tuple(tensor.shape), not fqn.startswith(MODEL_LEAD))


def _state_dict(planner: SavePlanner) -> dict[str, Any]:
    found = getattr(planner, "state_dict", None)
    if not isinstance(found, dict):
        raise Unsupported(
            f"a {type(planner).__qualname__} without a `state_dict`: values are not taken from pickles, so the planner "
            "must have them by name, as DefaultSavePlanner has"
        )
    return found


@dataclass(slots=True)
class _Own:
    """What this rank writes and tells, as it is put together. `pieces`: chunk of the file -> (fqn, tensor)."""

    ticket: Ticket
    state_dict: Mapping[str, Any]
    pieces: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    chunks: dict[str, tuple[Shape, str, list[Box]]] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.ties = tensors.ties(self._model(lead + ".") for lead in self.ticket.models)

    def _model(self, lead: str) -> dict[str, torch.Tensor]:
        return {
            fqn: value
            for fqn, value in self.state_dict.items()
            if fqn.startswith(lead) and isinstance(value, torch.Tensor) and not is_extra_state(fqn)
        }

    def take_values(self, given: set[str]) -> None:
        """Encode every value that is no tensor. Those that this rank was given it sends, and writes their tensors."""
        for fqn, value in self.state_dict.items():
            if isinstance(value, torch.Tensor):
                continue
            rest, found = extract(value, fqn, tensors.kind_of)
            encoded = objects.encode(rest, fqn)
            inner = {name: tensors.as_torch(tensor, name).detach() for name, tensor in found.items()}
            for name, tensor in inner.items():
                plain(tensor, name, trusted=False)
                if fqn in given:
                    self._add(name, tuple(tensor.shape), Box.whole(tensor.shape), tensor)
            self.sums[fqn] = digest(encoded, *(_crc(tensor) for tensor in inner.values()))
            if fqn in given:
                self.values[fqn] = encoded

    def take_chunk(self, item: WriteItem, planner: SavePlanner) -> None:
        """Take a tensor's chunk that this rank was given. Unsupported where it is not as DCP's plan says."""
        data = item.tensor_data
        assert data is not None
        name = self.ticket.names.get(item.index.fqn, item.index.fqn)
        if name in self.ties:
            return
        found = planner.resolve_data(item)
        assert isinstance(found, torch.Tensor)
        plain(found, name, trusted=False)
        box = Box(tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        if tuple(found.shape) != box.sizes:
            raise Unsupported(
                f"{name}: DCP takes this rank's part to be {box.sizes} at {box.offsets} of {tuple(data.size)}, and it "
                f"has {tuple(found.shape)}: it computes the layout of this placement wrong. distckpt.save has it right"
            )
        self._add(name, tuple(data.size), box, found.detach())

    def _add(self, name: str, shape: Shape, box: Box, tensor: torch.Tensor) -> None:
        boxes = self.chunks.setdefault(name, (shape, str(tensor.dtype).removeprefix("torch."), []))[2]
        if box.numel:
            self.pieces[chunk_name(name, box, shape)] = (name, tensor)
            boxes.append(box)

    def sum_tensors(self) -> None:
        """Sum every plain tensor: DCP takes one rank's for all."""
        for fqn, value in self.state_dict.items():
            if type(value) in _PLAIN:
                self.sums[fqn] = _crc(value).hex()


def _crc(tensor: torch.Tensor) -> bytes:
    memory = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return crc_of([as_bytes(memory)]).to_bytes(4, "little")
