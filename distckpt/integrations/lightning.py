"""PyTorch Lightning: a CheckpointIO that writes and reads our format in the place of `torch.save` files.

Lightning collects what is to be saved on rank 0, and gives it to the plugin there alone: so each checkpoint is that of
one process, whatever the strategy. A strategy that saves shards (FSDP, ModelParallel) asks no plugin.
"""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distckpt.comm import SoloComm
from distckpt.errors import NotACheckpoint, Unsupported
from distckpt.run import direct
from distckpt.run.place import place
from distckpt.run.retention import remove
from distckpt.run.source import open_source
from distckpt.signing import refuse_unsigned
from distckpt.state import torch_dtype
from distckpt.statedict import insert, nested
from distckpt.store.local import LocalStore
from distckpt.store.open import is_uri

try:
    from lightning_fabric.plugins import CheckpointIO, TorchCheckpointIO
except ImportError as e:
    raise ImportError(f"this needs PyTorch Lightning: pip install 'distckpt[lightning]' ({e})") from e

if TYPE_CHECKING:
    import os

_REST = "lightning"
"""Object of all that is neither weights nor optimizers."""


class DistckptIO(CheckpointIO):  # type: ignore[misc]
    """What `Trainer(plugins=[DistckptIO()])`, and Fabric, save and load by.

    ModelCheckpoint, `trainer.save_checkpoint` and `ckpt_path=` stay as they are; each path becomes a directory of its
    own with one checkpoint, whole or not there, every byte summed: `distckpt ls`, `verify` and `diff` read it. Weights
    are `model.<fqn>`, so that `Checkpointer.load(TrainState(model=...), source=path, only=("model",))` does, too. A
    path that is a file, of torch.save, is loaded by Lightning, without running code from it unless told to; saved to,
    it becomes a directory once that is whole.

    Give `AsyncCheckpointIO(DistckptIO())` of Lightning for saves that training does not wait for. timeout: seconds that
    a save may wait for its writer.
    """

    def __init__(self, *, timeout: float = 600.0) -> None:
        self._timeout = timeout

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """See CheckpointIO.save_checkpoint."""
        if storage_options is not None:
            raise Unsupported("storage_options: an object store is set up by its environment (docs/object-stores.md)")
        with closing(SoloComm(self._timeout)) as alone:
            counts: dict[str, Any] = {name: checkpoint[name] for name in ("global_step", "epoch") if name in checkpoint}
            if is_uri(path) or not Path(path).is_file():
                direct.save(path, _named(checkpoint), metrics=counts, comm=alone)
                return
            beside = Path(path).with_name(f".{Path(path).name}.distckpt")  # the file stays until this is whole
            direct.save(beside, _named(checkpoint), metrics=counts, comm=alone)
        Path(path).unlink()
        beside.rename(path)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,  # noqa: ARG002  Lightning moves what it loads
        weights_only: bool | None = None,  # noqa: FBT001
    ) -> dict[str, Any]:
        """See CheckpointIO.load_checkpoint. Tensors are on the CPU. NotACheckpoint (a FileNotFoundError)."""
        if not is_uri(path) and Path(path).is_file():
            refuse_unsigned(str(path))
            found: dict[str, Any] = TorchCheckpointIO().load_checkpoint(path, weights_only=weights_only is not False)
            return found
        source = open_source(path)
        content = source.manifest
        made = {fqn: torch.empty(info.shape, dtype=torch_dtype(info.dtype)) for fqn, info in content.tensors.items()}
        into = insert(nested(content.tensors, content.aliases, {n: source.object(n) for n in content.objects}), made)
        with closing(SoloComm(self._timeout)) as alone:
            direct.load(path, into, comm=alone)
        return _as_lightning_has_it(into, path)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """See CheckpointIO.remove_checkpoint. Idempotent."""
        if not is_uri(path) and (Path(path).is_symlink() or Path(path).is_file()):
            Path(path).unlink()  # `last.ckpt`, of save_last="link"; or what torch.save wrote before this plugin
            return
        history = place(path).history
        for directory in history.directories():
            remove(history.store, directory)
        if isinstance(history.store, LocalStore):
            shutil.rmtree(history.store.root, ignore_errors=not history.store.root.exists())
        else:
            for entry in history.store.list(""):
                if entry.size is not None:
                    history.store.delete(entry.name)


def _named(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What Lightning gave, its weights and optimizers under our names."""
    rest = dict(checkpoint)
    named: dict[str, Any] = {}
    if "state_dict" in rest:
        named["model"] = rest.pop("state_dict")
    if "optimizer_states" in rest:
        named["optim"] = {str(i): state for i, state in enumerate(rest.pop("optimizer_states"))}
    return named | {_REST: rest}


def _as_lightning_has_it(named: dict[str, Any], path: object) -> dict[str, Any]:
    """What `_named` was given."""
    if _REST not in named:
        raise NotACheckpoint(f"{path}: not one of Lightning's: it holds {', '.join(sorted(named)[:8])}")
    found: dict[str, Any] = dict(named[_REST])
    if "model" in named:
        found["state_dict"] = named["model"]
    if "optim" in named:
        found["optimizer_states"] = [named["optim"][str(i)] for i in range(len(named["optim"]))]
    return found
