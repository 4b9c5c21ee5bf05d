"""Full state dicts: the whole state of a sharded model on rank 0, or in one file. Sharded saves are the default.

What rank 0 gathers it must hold, and every other rank waits for it: a Checkpointer's save moves nothing between ranks.
Pieces are sent one at a time, so no rank holds more than one tensor beyond what was asked for.
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distckpt import comm as comms
from distckpt.adapters.module import ModuleAdapter
from distckpt.adapters.optimizer import OptimizerAdapter
from distckpt.adapters.slots import named_slots
from distckpt.adapters.subclasses import is_description
from distckpt.comm import together
from distckpt.errors import StateWarning, Unsupported
from distckpt.foreign.safetensors import STATE_DICT
from distckpt.format import objects
from distckpt.format.box import Box, Part, Run
from distckpt.format.datafile import DATA_ALIGNMENT
from distckpt.format.dtype import DTYPE_OF_TAG, item_size, stored_as
from distckpt.format.objects import TensorRef
from distckpt.saving.agree import agree
from distckpt.saving.divide import divide
from distckpt.saving.image import view_of
from distckpt.state import Shard, State, as_bytes, part_of, torch_dtype
from distckpt.statedict import insert, is_extra_state
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import nn
    from torch.optim import Optimizer

    from distckpt.comm import Comm
    from distckpt.format.box import Region
    from distckpt.format.partition import Partition
    from distckpt.saving.agree import Agreement
    from distckpt.saving.merge import Agreed

WINDOW = 16 << 20
"""Bytes sent at once."""


def full_state_dict(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    file: str | os.PathLike[str] | None = None,
    timeout: float = 600.0,
    comm: Comm | None = None,
) -> dict[str, Any]:
    """Gather the whole state, on the CPU, on rank 0: {"model": ..., "optim": ...}; {} on other ranks. Collective.

    model, optimizer: in any layout. The model's entry is what `load_state_dict` of the bare model takes; the
    optimizer's is {"state": {fqn: {name: tensor}}, "param_groups": [...]}, parameters named by fqn. It costs rank 0
    as much host memory as the state has bytes, and the job the time to send them to one rank.
    file: a safetensors file to stream it to, tensor by tensor, instead: {} everywhere; `Checkpointer.load(source=)`
    reads it. Without an optimizer its entries are named as in the bare model. timeout: seconds a wait lasts at most.
    Unsupported for optimizer states that exist on each rank for its own shard only.
    """
    own = comm is None
    comm = comm or comms.default(timeout)
    try:
        return _gather(comm, model, optimizer, Path(file) if file is not None else None)
    finally:
        if own:
            comm.close()


def _gather(comm: Comm, model: nn.Module, optimizer: Optimizer | None, file: Path | None) -> dict[str, Any]:
    parts: list[ModuleAdapter | OptimizerAdapter] = [ModuleAdapter(model, "model")]
    parts += [OptimizerAdapter(optimizer, lambda: named_slots(model), "optim")] if optimizer is not None else []
    state, agreed = agree(comm, lambda: State.merged(p.capture() for p in parts), step=0, generation=lambda: 0)
    agreed.objects.update(agreed.rank_objects)  # of what differs between ranks, rank 0 takes its own
    whole: _Whole | None = None

    def lay_out() -> None:
        nonlocal whole
        _refuse_own_states(agreed)
        whole = _Whole(comm, state, agreed)

    together(comm, "laying out the full state", lay_out)
    assert whole is not None
    gathered = _gathered(comm, whole, agreed, file)
    for note in agreed.notes if comm.rank == 0 else ():
        warnings.warn(f"full_state_dict: {note}; a full state dict has the first's", StateWarning, stacklevel=3)
    return gathered


def _gathered(comm: Comm, whole: _Whole, agreed: Agreement, file: Path | None) -> dict[str, Any]:
    if comm.rank == 0:
        where = f"streams {whole.nbytes / 1e9:.2f} GB to {file}" if file else f"holds {whole.nbytes / 1e9:.2f} GB"
        logging.getLogger("distckpt").warning(
            "full_state_dict: rank 0 gathers and %s; sharded saves gather nothing", where
        )
    result: dict[str, Any] = {}

    def run() -> None:
        with whole.sent_to_the_end():
            if comm.rank:
                return
            if file is not None:
                _write(file, whole, _tree(agreed, dict(whole.references())))
            else:
                result.update(_tree(agreed, dict(whole.tensors())))

    together(comm, "gathering the full state", run)
    return result


def _refuse_own_states(agreed: Agreement) -> None:
    """Unsupported for states that are no tensors of the parameter's shape: nobody could say what they are a part of."""
    if own := sorted(n for n in agreed.tensors if n.startswith("optim.@rank")):
        raise Unsupported(f"{own[0]}: is of one rank's shard only, and has no place in a full state dict")
    values = json.loads(agreed.objects["optim"])["values"] if "optim" in agreed.objects else {}
    for fqn, state in values.items():
        for name, value in state.items():
            if is_description(value):
                raise Unsupported(f"optim.{fqn}.{name}: a tensor subclass has no place in a full state dict")


class _Whole:
    """The tensors of a state, whole on rank 0, one after another: every rank goes through them in the same order."""

    def __init__(self, comm: Comm, state: State, agreed: Agreement) -> None:
        self._comm, self._agreed = comm, agreed.tensors
        self._partitions: dict[str, Partition] = divide(agreed.tensors)
        self._own = dict(_views(state, self._partitions, comm.rank))
        self.names = sorted(self._agreed, key=lambda n: (-item_size(self._agreed[n].dtype), n))
        self.nbytes = sum(nbytes(t) for t in self._agreed.values())
        self._left = iter(self.names)

    def references(self) -> Iterator[tuple[str, TensorRef]]:
        """(fqn, reference) of every tensor."""
        return ((name, TensorRef(name)) for name in self.names)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (fqn, whole tensor) on rank 0."""
        for name in self._left:
            made = None
            try:
                made = torch.empty(self._agreed[name].shape, dtype=torch_dtype(self._agreed[name].dtype))
            finally:
                self._move(name, made)
            yield name, made

    @contextmanager
    def sent_to_the_end(self) -> Iterator[None]:
        """Have this rank send all that it holds, and rank 0 take all that is sent, even once something has failed."""
        try:
            yield
        finally:
            for name in self._left:
                self._move(name, None)

    def info(self, name: str) -> Agreed:
        """What the ranks agreed on about a tensor."""
        return self._agreed[name]

    def _move(self, name: str, made: torch.Tensor | None) -> None:
        """Move one tensor's chunks to rank 0, into `made`."""
        info = self._agreed[name]
        dtype = torch_dtype(info.dtype)
        for rank, region in self._partitions[name].overlapping(Box.whole(info.shape)):
            if rank == self._comm.rank:
                view = self._own[name, region]
                if rank == 0 and made is not None:
                    _place(made, region, view.reshape(-1) if isinstance(region, Run) else view)
                elif rank:
                    data = as_bytes(view.resolve_conj().resolve_neg().cpu().contiguous())
                    for i in range(0, len(data), WINDOW):
                        self._comm.swap(f"gathering {name}", {0: data[i : i + WINDOW]}, {})
            elif self._comm.rank == 0:
                flat = torch.empty(region.numel, dtype=dtype)
                data = as_bytes(flat)
                for i in range(0, len(data), WINDOW):
                    self._comm.swap(f"gathering {name}", {}, {rank: data[i : i + WINDOW]})
                if made is not None:
                    _place(made, region, flat if isinstance(region, Run) else flat.view(region.sizes))


def _views(
    state: State, partitions: dict[str, Partition], rank: int
) -> Iterator[tuple[tuple[str, Region], torch.Tensor]]:
    for fqn, partition in partitions.items():
        for region in partition.of_file(rank):
            yield (fqn, region), view_of(state, fqn, region, rank)


def _place(made: torch.Tensor, region: Region, data: torch.Tensor) -> None:
    whole = Box.whole(tuple(made.shape))
    if isinstance(region, Run):
        made.view(-1)[region.start : region.stop].copy_(data)
    else:
        part_of(Shard(whole, made), Part(0, whole), region).copy_(data)


def nbytes(info: Agreed) -> int:
    """Bytes of a whole tensor."""
    return prod(info.shape) * item_size(info.dtype)


def _tree(agreed: Agreement, tensors: dict[str, Any]) -> dict[str, Any]:
    """Nested state dict of these tensors (or what stands for them), by fqn."""
    tensors |= {alias: tensors[fqn] for alias, fqn in agreed.aliases.items()}
    model = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    extra = objects.decode(agreed.objects.get("model.extra_state", b"{}"))
    for name in [n for n in model if n.startswith("extra_state.")]:
        del model[name]
    for owner, value in extra.items():
        model[f"{owner}._extra_state" if owner else "_extra_state"] = insert(value, tensors)
    tree: dict[str, Any] = {"model": model}
    if "optim" in agreed.objects:
        saved = objects.decode(agreed.objects["optim"])
        states: dict[str, dict[str, Any]] = {}
        for fqn in sorted((p for group in saved["groups"] for p in group["params"]), key=len, reverse=True):
            lead = f"optim.{fqn}."
            found = {n.removeprefix(lead): tensors.pop(n) for n in list(tensors) if n.startswith(lead)}
            found |= insert(saved["values"].get(fqn, {}), tensors | {lead + n: t for n, t in found.items()})
            if found:
                states[fqn] = found
        tree["optim"] = {"state": states, "param_groups": saved["groups"]}
    return tree


def _write(file: Path, whole: _Whole, tree: dict[str, Any]) -> None:
    """Write a safetensors file, durably and atomically, as its tensors arrive."""
    model_alone = "optim" not in tree and not any(is_extra_state(name) for name in tree["model"])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    if not model_alone:
        entries["__metadata__"][STATE_DICT] = objects.encode(tree, "the state dict").decode()
    position = 0
    for name in whole.names:
        info = whole.info(name)
        tag, _ = stored_as(info.dtype, info.shape)
        if DTYPE_OF_TAG.get(tag) != info.dtype:
            raise Unsupported(f"{name}: dtype {info.dtype} has no place in a safetensors file")
        stop = position + nbytes(info)
        known_as = name.removeprefix("model.") if model_alone else name
        entries[known_as] = {"dtype": tag, "shape": list(info.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8)
    header = struct.pack("<Q", len(text)) + text
    file.parent.mkdir(parents=True, exist_ok=True)
    pieces = (as_bytes(tensor) for _, tensor in whole.tensors())
    LocalStore(file.parent).write(file.name, _chain(memoryview(header), pieces), size=len(header) + position)


def _chain(first: memoryview, rest: Iterator[memoryview]) -> Iterator[memoryview]:
    yield first
    yield from rest
