"""A checkpoint as one torch.save file, tensor by tensor: what torch.save would have written of the state dict."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from distckpt.errors import Unsupported
from distckpt.foreign.paths import tree_of
from distckpt.foreign.sink import Sink, lost, refuse_empty
from distckpt.foreign.torch_zip import TorchFile
from distckpt.format.box import Box
from distckpt.loading.stream import Stretch
from distckpt.statedict import insert

if TYPE_CHECKING:
    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint


def torch_sink(checkpoint: Checkpoint, name: str, room: int) -> Sink:
    """Plan one file: {"model": ..., "optim": ..., ...}, or the model alone where there is nothing else."""
    content = checkpoint.manifest
    refuse_empty(checkpoint)
    file = TorchFile()
    tensors = {f: file.tensor(i.dtype, i.shape, partial(_whole, f, i)) for f, i in sorted(content.tensors.items())}
    tree = tree_of(checkpoint)
    if tree.keys() == {"model"} and isinstance(tree["model"], dict):
        tree = tree["model"]
    try:
        output = file.output(name, insert(tree, tensors), checkpoint, room)
    except TypeError as e:
        raise Unsupported(f"{checkpoint.name}: a value has no place in a torch.save file: {e}") from e
    return Sink([output], lambda _: [], lost(checkpoint), "file")


def _whole(fqn: str, info: TensorInfo) -> list[Stretch | int]:
    return [Stretch.whole(fqn, Box.whole(info.shape), info.dtype)]
