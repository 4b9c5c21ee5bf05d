"""A torch.save file, written as a stream, tensor by tensor: what torch.save would have written of the state dict."""

from __future__ import annotations

import zlib
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint, Unsupported
from distckpt.foreign.archive import Record, end, placed
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
    records, position = placed(
        (
            *(Record.of(n, data) for n, data in small.items()),
            *(Record.streamed(f"data/{numbers[f]}", _nbytes(checkpoint, f)) for f in fqns),
        )
    )
    size = position + len(end(records, position))

    def write(store: Store) -> dict[str, Any]:
        store.write(name, _pieces(checkpoint, fqns, records, position, room), size=size)
        return {}

    return Sink([Output(name, size, write)], lambda _: [], notes, "file")


def _nbytes(checkpoint: Checkpoint, fqn: str) -> int:
    info = checkpoint.manifest.tensors[fqn]
    return prod(info.shape) * item_size(info.dtype)


def _pieces(
    checkpoint: Checkpoint, fqns: list[str], records: list[Record], stop: int, room: int
) -> Iterator[memoryview]:
    infos = [checkpoint.manifest.tensors[fqn] for fqn in fqns]
    wanted = (Stretch.whole(f, Box.whole(i.shape), i.dtype) for f, i in zip(fqns, infos, strict=True))
    pieces = stream(checkpoint, wanted, room)
    at = next(pieces, None)
    written, index = [], 0
    for record in records:
        yield memoryview(record.head())
        if record.content is not None:
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
    yield memoryview(end(written, stop))


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
