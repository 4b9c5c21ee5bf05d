"""distckpt and its peers, each with a durable save and a load in place of the same tensors.

A peer that cannot be imported, or does not run, gets a row that says why not. `save` leaves the bytes on the disk: a
program that does not call fsync itself is helped by `sync`, inside the timer.
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from distckpt import Checkpointer
from distckpt.state import as_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.ranks import World
    from benchmarks.workload import Sharded

_AT_ONCE = 1024  # buffers that one system call takes
_PAGE = 4096
_PIECE = 8 << 20
_IN_FLIGHT = 4


class Peer:
    """A program at work on some tensors. Every method is collective; `save` makes the folder's content."""

    name = ""

    def __init__(self, world: World, tensors: Sharded, home: Path) -> None:
        self.world, self.tensors, self.home = world, tensors, home
        self.start()

    def start(self) -> None:
        """Import and make what a job makes once."""

    def save(self, folder: Path) -> None:
        """Save, durably."""
        raise NotImplementedError

    def open(self, folder: Path) -> None:
        """Make what a job that has just started makes before it loads. Not timed."""

    def load(self, folder: Path) -> None:
        """Load into the tensors, in place."""
        raise NotImplementedError

    def settle(self) -> None:
        """Put what was loaded into the tensors, where the raw limit leaves it elsewhere. Not timed."""

    def close(self) -> None:
        """Give back what start() made."""


class Distckpt(Peer):
    """This project. `home` is the run, a folder one of its steps."""

    name = "distckpt"

    def run(self) -> Any:
        """Root of the run."""
        return self.home

    def start(self) -> None:
        self._state = self.tensors.state()
        self._saver, self._loader = Checkpointer(self.run()), Checkpointer(self.run())

    def save(self, folder: Path) -> None:
        self._saver.save(step_of(folder), self._state, wait=True)

    def open(self, folder: Path) -> None:  # noqa: ARG002
        self._loader.close()
        self._loader = Checkpointer(self.run())

    def load(self, folder: Path) -> None:
        self._loader.load(self._state, step=step_of(folder))

    def close(self) -> None:
        self._saver.close()
        self._loader.close()


class TorchSave(Peer):
    """torch.save and torch.load, a file a rank."""

    name = "torch.save"

    def save(self, folder: Path) -> None:
        path = own_file(folder, self.world, "pt")
        torch.save(self.tensors.local, path)
        sync([path])

    def load(self, folder: Path) -> None:
        _copy(torch.load(own_file(folder, self.world, "pt"), weights_only=True), self.tensors)


class Safetensors(Peer):
    """safetensors, a file a rank, copied into the targets. It has no checksums."""

    name = "safetensors"

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        path = own_file(folder, self.world, "safetensors")
        save_file(self.tensors.local, path)
        sync([path])

    def load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        _copy(load_file(own_file(folder, self.world, "safetensors")), self.tensors)


class Dcp(Peer):
    """torch.distributed.checkpoint, with one thread."""

    name = "DCP"
    threads = 1

    def save(self, folder: Path) -> None:
        dcp_save(dict(self.tensors.whole), storage_writer=FileSystemWriter(folder, thread_count=self.threads))
        sync([folder])

    def load(self, folder: Path) -> None:
        dcp_load(dict(self.tensors.whole), checkpoint_id=folder)


class Dcp2(Dcp):
    """torch.distributed.checkpoint, with two threads."""

    name = "DCP, 2 threads"
    threads = 2


class TorchCheckpointing(Peer):
    """meta-pytorch/torch_checkpointing, saving synchronously. It calls no fsync.

    Its resharder gathers through CUDA, wherever the tensors are: on a machine without a GPU it does without.
    """

    name = "torch_checkpointing"

    def start(self) -> None:
        import torch_checkpointing as package
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        reshards = self.world.device.type == "cuda"
        items = {"model": package.ItemSpec(resharder=DefaultResharder() if reshards else None)}
        # by default it writes unaligned memory with O_DIRECT, which ext4 refuses
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        config = package.CheckpointManager.Config(items=items, save=self.how(), storage_config=storage)
        self._manager: Any = package.CheckpointManager(config)
        self._state = {"model": dict(self.tensors.whole if reshards else self.tensors.local)}

    def how(self) -> Any:
        """Configuration of its saver."""
        from torch_checkpointing import SyncCheckpointSaverConfig

        return SyncCheckpointSaverConfig()

    def save(self, folder: Path) -> None:
        self._manager.save(str(folder), self._state)
        sync_shares(folder, self.world)

    def load(self, folder: Path) -> None:
        self._manager.load(str(folder), into=self._state, strict=True)

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(Peer):
    """torchsnapshot (its nightly of 2024, the last one). It calls no fsync."""

    name = "torchsnapshot"

    def start(self) -> None:
        from torchsnapshot import Snapshot, StateDict

        self._snapshot, self._state = Snapshot, {"model": StateDict(**self.tensors.local)}

    def save(self, folder: Path) -> None:
        self._snapshot.take(str(folder), self._state)
        sync_shares(folder, self.world)

    def load(self, folder: Path) -> None:
        self._snapshot(str(folder)).restore(self._state)
        _copy(dict(self._state["model"]), self.tensors)


class ByteCheckpoint(Peer):
    """ByteCheckpoint, which says that it wants torch 2.5 or older."""

    name = "ByteCheckpoint"

    def start(self) -> None:
        import bytecheckpoint

        from benchmarks.workload import Holder

        self._module, self._package = Holder(self.tensors.whole), bytecheckpoint.FSDP2Checkpointer

    def save(self, folder: Path) -> None:
        self._package.save(str(folder), {"model": self._module})
        sync_shares(folder, self.world)

    def load(self, folder: Path) -> None:
        self._package.load(str(folder), {"model": self._module})


class Raw(Peer):
    """The limit: the same bytes of host memory by pwritev and preadv, a file a rank. No names, no sums, no commit."""

    name = "raw, buffered"

    def start(self) -> None:
        self._memory = [as_bytes(t.cpu()) for t in self.tensors.local.values()]

    def save(self, folder: Path) -> None:
        with _opened(own_file(folder, self.world, "raw"), os.O_WRONLY | os.O_CREAT) as descriptor:
            self._move(os.pwritev, descriptor)
            os.fsync(descriptor)
        sync([folder])

    def load(self, folder: Path) -> None:
        with _opened(own_file(folder, self.world, "raw"), os.O_RDONLY) as descriptor:
            self._move(os.preadv, descriptor)

    def settle(self) -> None:
        for view, t in zip(self._memory, self.tensors.local.values(), strict=True):
            t.copy_(torch.frombuffer(view, dtype=t.dtype).view(t.shape))

    def _move(self, call: Any, descriptor: int) -> None:
        position = 0
        for i in range(0, len(self._memory), _AT_ONCE):
            position += _all(call, descriptor, self._memory[i : i + _AT_ONCE], position)


class RawDirect(Raw):
    """The limit past the page cache: O_DIRECT, pieces of 8 MiB, four in flight, of aligned memory."""

    name = "raw, O_DIRECT"

    def start(self) -> None:
        sizes = [t.numel() * t.element_size() for t in self.tensors.local.values()]
        self._size = -(-sum(sizes) // _PAGE) * _PAGE
        self._whole = memoryview(mmap(-1, self._size))
        starts = itertools.accumulate(sizes, initial=0)
        self._memory = [self._whole[at : at + size] for at, size in zip(starts, sizes, strict=False)]
        for view, t in zip(self._memory, self.tensors.local.values(), strict=True):
            view[:] = as_bytes(t.cpu())

    def save(self, folder: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_DIRECT
        with _opened(own_file(folder, self.world, "raw"), flags) as descriptor:
            os.posix_fallocate(descriptor, 0, self._size)
            self._move(os.pwritev, descriptor)
            os.fsync(descriptor)
        sync([folder])

    def load(self, folder: Path) -> None:
        with _opened(own_file(folder, self.world, "raw"), os.O_RDONLY | os.O_DIRECT) as descriptor:
            self._move(os.preadv, descriptor)

    def _move(self, call: Any, descriptor: int) -> None:
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            starts = range(0, self._size, _PIECE)
            list(pool.map(lambda at: _all(call, descriptor, [self._whole[at : at + _PIECE]], at), starts))


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _all(call: Any, descriptor: int, buffers: list[memoryview], position: int) -> int:
    """Move every byte of some buffers by pwritev or preadv; returns how many."""
    wanted = sum(map(len, buffers))
    done: int = call(descriptor, buffers, position)
    while done < wanted:
        rest, skip = [], done
        for buffer in buffers:
            rest += [buffer[skip:]] if skip < len(buffer) else []
            skip = max(0, skip - len(buffer))
        more = call(descriptor, rest, position + done)
        if not more:
            raise EOFError(f"file ends at byte {position + done}, {position + wanted} were expected")
        done += more
    return done


def own_file(folder: Path, world: World, ending: str) -> Path:
    """File of this rank in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"rank-{world.rank}.{ending}"


def step_of(folder: Path) -> int:
    """Step that a folder is named after."""
    return int(folder.name.removeprefix("step-"))


def _copy(found: dict[str, torch.Tensor], tensors: Sharded) -> None:
    for name, t in tensors.local.items():
        t.copy_(found[name])


def sync(paths: list[Path]) -> None:
    """Make files and the directories that they stand in durable."""
    for path in dict.fromkeys([*paths, *(p.parent for p in paths)]):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def sync_shares(folder: Path, world: World) -> None:
    """Make every file below a folder durable, each rank its share of them."""
    world.barrier()
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    sync([*files[world.rank :: world.size], folder])


SYNC = (Distckpt, TorchSave, Dcp, Dcp2, TorchCheckpointing, Safetensors, TorchSnapshot, ByteCheckpoint, Raw, RawDirect)
"""Every peer of a save and a load that are waited for."""
