"""A checkpoint as one torch.save file, tensor by tensor: what torch.save would have written of the state dict."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from distckpt.errors import NotACheckpoint, Unsupported
from distckpt.foreign.sink import Sink
from distckpt.foreign.torch_zip import TorchFile
from distckpt.format.box import Box
from distckpt.format.objects import TensorRef
from distckpt.loading.stream import Stretch
from distckpt.statedict import insert, is_optimizer_object, parameters_of, state_of

if TYPE_CHECKING:
    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint


def torch_sink(checkpoint: Checkpoint, name: str, room: int) -> Sink:
    """Plan one file: {"model": ..., "optim": ..., ...}, or the model alone where there is nothing else."""
    content = checkpoint.manifest
    if not content.tensors and not content.objects:
        raise NotACheckpoint(f"{checkpoint.name}: has neither tensors nor values")
    notes = [f"{n}: each rank has its own; left out" for n in content.rank_objects]
    notes += [f"{n}: cannot be read safely; left out: {why}" for n, why in checkpoint.unreadable.items()]
    file = TorchFile()
    tensors = {f: file.tensor(i.dtype, i.shape, partial(_whole, f, i)) for f, i in sorted(content.tensors.items())}
    try:
        output = file.output(name, insert(_tree(checkpoint), tensors), checkpoint, room)
    except TypeError as e:
        raise Unsupported(f"{checkpoint.name}: a value has no place in a torch.save file: {e}") from e
    return Sink([output], lambda _: [], notes, "file")


def _whole(fqn: str, info: TensorInfo) -> list[Stretch | int]:
    return [Stretch.whole(fqn, Box.whole(info.shape), info.dtype)]


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
