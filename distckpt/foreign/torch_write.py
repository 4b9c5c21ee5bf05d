"""A torch.save file, written as a stream, tensor by tensor: what torch.save would have written of the state dict.

Every record of the zip says its size beforehand, and its CRC-32 after its content.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint, Unsupported
from distckpt.foreign.emit import pickled, tensor_over
from distckpt.foreign.sink import Output, Sink
from distckpt.format.box import Box
from distckpt.format.dtype import item_size
from distckpt.format.objects import TensorRef
from distckpt.load.stream import Stretch, stream
from distckpt.statedict import insert, is_optimizer_object, parameters_of, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distckpt.load.open import Checkpoint
    from distckpt.store.base import Store

_ALIGNMENT = 64
_DATE = 0x21  # 1 January 1980: the same content is the same bytes on every day
_STREAMED = 8  # sizes and sum stand after the content
_MANY = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class _Record:
    """An entry of the zip: `content` if it is small and known, else `size` bytes to come."""

    name: bytes
    size: int
    content: bytes | None = None
    start: int = 0
    crc: int = 0

    @property
    def wide(self) -> bool:
        """Whether its sizes take 8 bytes."""
        return self.size >= _MANY - (1 << 20)

    def head(self) -> bytes:
        """Local header, padded so that the content is aligned."""
        streamed = self.content is None
        extra = struct.pack("<HHQQ", 1, 16, 0, 0) if self.wide else b""
        padding = -(self.start + 30 + len(self.name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        known = (0, _MANY, _MANY) if self.wide else (0, 0, 0) if streamed else (self.crc, self.size, self.size)
        flags, version = _STREAMED * streamed, 45 if self.wide else 20
        fixed = struct.pack("<4s5H3I2H", b"PK\3\4", version, flags, 0, 0, _DATE, *known, len(self.name), len(extra))
        return fixed + self.name + extra

    def after(self, crc: int) -> bytes:
        """What follows streamed content."""
        return struct.pack("<4sI", b"PK\7\x08", crc) + struct.pack("<QQ" if self.wide else "<II", self.size, self.size)

    def entry(self) -> bytes:
        """Its entry in the directory at the end."""
        far = self.start >= _MANY
        wide = struct.pack("<QQ", self.size, self.size) if self.wide else b""
        wide += struct.pack("<Q", self.start) if far else b""
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        size, version = (_MANY if self.wide else self.size), 45 if wide else 20
        flags = _STREAMED * (self.content is None)
        fixed = (version, version, flags, 0, 0, _DATE, self.crc, size, size, len(self.name), len(extra))
        start = _MANY if far else self.start
        return struct.pack("<4s6H3I2H3H2I", b"PK\1\2", *fixed, 0, 0, 0, 0, start) + self.name + extra


def _end(records: list[_Record], start: int) -> bytes:
    directory = b"".join(record.entry() for record in records)
    count, length = len(records), len(directory)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, start + length, 1)
    few, near = min(count, 0xFFFF), min(start, _MANY)
    return directory + end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(length, _MANY), near, 0)


def torch_sink(checkpoint: Checkpoint, name: str, room: int) -> Sink:
    """Plan one file: {"model": ..., "optim": ..., ...}, or the model alone where there is nothing else."""
    content = checkpoint.manifest
    if not content.tensors and not content.objects:
        raise NotACheckpoint(f"{checkpoint.name}: has neither tensors nor values")
    notes = [f"{n}: each rank has its own; left out" for n in content.rank_objects]
    notes += [f"{n}: cannot be read safely; left out: {why}" for n, why in checkpoint.unreadable.items()]
    fqns = sorted(content.tensors)
    numbers = {fqn: i for i, fqn in enumerate(fqns)}
    tree = _tree(checkpoint)
    tensors = {fqn: tensor_over(str(numbers[fqn]), info.dtype, info.shape) for fqn, info in content.tensors.items()}
    try:
        pickle = pickled(insert(tree, tensors))
    except TypeError as e:
        raise Unsupported(f"{checkpoint.name}: a value has no place in a torch.save file: {e}") from e
    small = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    records: list[_Record] = []
    position = 0
    for record in (
        *(_Record(f"archive/{n}".encode(), len(data), data, crc=zlib.crc32(data)) for n, data in small.items()),
        *(_Record(f"archive/data/{numbers[f]}".encode(), _nbytes(checkpoint, f)) for f in fqns),
    ):
        placed = replace(record, start=position)
        records.append(placed)
        position += len(placed.head()) + placed.size + (len(placed.after(0)) if record.content is None else 0)
    size = position + len(_end(records, position))

    def write(store: Store) -> dict[str, Any]:
        store.write(name, _pieces(checkpoint, fqns, records, position, room), size=size)
        return {}

    return Sink([Output(name, size, write)], lambda _: [], notes, "file")


def _nbytes(checkpoint: Checkpoint, fqn: str) -> int:
    info = checkpoint.manifest.tensors[fqn]
    return prod(info.shape) * item_size(info.dtype)


def _pieces(
    checkpoint: Checkpoint, fqns: list[str], records: list[_Record], end: int, room: int
) -> Iterator[memoryview]:
    infos = [checkpoint.manifest.tensors[fqn] for fqn in fqns]
    wanted = (Stretch.whole(f, Box.whole(i.shape), i.dtype) for f, i in zip(fqns, infos, strict=True))
    pieces = stream(checkpoint, wanted, room)
    at = next(pieces, None)
    written, index = [], 0
    for record in records:
        yield memoryview(record.head())
        if record.content is not None:
            yield memoryview(record.content)
            written.append(record)
            continue
        crc = 0
        while at and at[0] == index:
            crc = zlib.crc32(at[1], crc)
            yield at[1]
            at = next(pieces, None)
        index += 1
        yield memoryview(record.after(crc))
        written.append(replace(record, crc=crc))
    yield memoryview(_end(written, end))


def _tree(checkpoint: Checkpoint) -> dict[str, Any]:
    """Nested state dict with a TensorRef for each tensor."""
    content = checkpoint.manifest
    values = {name: checkpoint.object(name) for name in content.objects}
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if is_optimizer_object(value):
            tree[name] = {"state": {p: dict(v) for p, v in value["values"].items()}, "param_groups": value["groups"]}
        elif not name.endswith(".extra_state"):
            tree[name] = value
    optimizers = {n: parameters_of(v["groups"]) for n, v in values.items() if is_optimizer_object(v)}
    for fqn in (*content.tensors, *content.aliases):
        reference = TensorRef(content.aliases.get(fqn, fqn))
        found = next((n for n in optimizers if fqn.startswith(n + ".")), None)
        at = state_of(fqn, found, optimizers[found]) if found else None
        lead, _, rest = fqn.partition(".")
        if found and at:
            tree[found]["state"].setdefault(at[0], {})[at[1]] = reference
        elif lead == "model" and not rest.startswith("extra_state."):
            tree.setdefault("model", {})[rest] = reference
    for owner, value in values.get("model.extra_state", {}).items():
        tree.setdefault("model", {})[f"{owner}._extra_state" if owner else "_extra_state"] = value
    return tree["model"] if tree.keys() == {"model"} else tree
