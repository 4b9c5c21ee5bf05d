"""Saves to an object store and loads from it: distckpt, what DCP has for it, and plain multipart requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.peers import Distckpt, Peer
from benchmarks.peers_async import AsyncDistckpt
from distckpt.state import as_bytes
from distckpt.store.object import IN_FLIGHT, PART, ObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.object_server import Served

_PIECE = 1 << 20


class OnObjects(Peer):
    """A program that saves in a bucket, under the names that its folders would have."""

    served: ClassVar[Served]

    def at(self, folder: Path) -> str:
        """URI for a folder, which stays empty."""
        return f"{self.served.uri}/{folder.parent.name}/{folder.name}"

    def remove(self, folder: Path) -> None:  # noqa: ARG002
        """Remove what was saved last. Not timed."""
        self.served.ask("clear")


def on(served: Served, kinds: tuple[type[Peer], ...]) -> tuple[type[Peer], ...]:
    """These programs, at work on that server."""
    return tuple(type(kind.__name__, (kind,), {"served": served}) for kind in kinds)


class ObjectDistckpt(OnObjects, Distckpt):
    """This project, straight to the object store: a save that is waited for, by the training process."""

    name = Distckpt.name

    def run(self) -> Any:
        return ObjectStore(f"{self.served.uri}/{self.home.name}", self.served.options)


class WriterDistckpt(ObjectDistckpt, AsyncDistckpt):
    """Likewise, by the writer process, from its arena. The save ends when it is committed."""

    name = "distckpt, writer process"


class SlowDistckpt(WriterDistckpt):
    """Likewise, by way of the proxy."""

    name = Distckpt.name

    def run(self) -> Any:
        return ObjectStore(f"{self.served.uri}/{self.home.name}", self.served.slow)


class DcpOnObjects(OnObjects):
    """torch.distributed.checkpoint, with a writer and a reader of its own for each call."""

    def writer(self, folder: Path) -> Any:
        """What it writes by."""
        raise NotImplementedError

    def reader(self, folder: Path) -> Any:
        """What it reads by."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        with _told():
            dcp_save(dict(self.tensors.whole), storage_writer=self.writer(folder))

    def load(self, folder: Path) -> None:
        with _told():
            dcp_load(dict(self.tensors.whole), storage_reader=self.reader(folder))


@contextmanager
def _told() -> Iterator[None]:
    """DCP's error is no Exception, and as long as every rank's traceback: the first rank's cause says enough."""
    try:
        yield
    except CheckpointException as e:
        rank, (cause, _) = min(e.failures.items())
        raise RuntimeError(f"rank {rank}: {cause}") from e


class S3fsDcp(DcpOnObjects):
    """DCP with torch's own writer and reader for fsspec, over s3fs."""

    name = "s3fs, DCP"

    def start(self) -> None:
        import s3fs  # noqa: F401  torch's error would not say what is missing
        from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

        self._writer, self._reader = FsspecWriter, FsspecReader
        options = self.served.options
        self._how: dict[str, Any] = {
            "key": options["access_key_id"],
            "secret": options["secret_access_key"],
            "endpoint_url": options["endpoint"],
        }

    def writer(self, folder: Path) -> Any:
        return self._writer(self.at(folder), **self._how)

    def reader(self, folder: Path) -> Any:
        return self._reader(self.at(folder), **self._how)


class S3ConnectorDcp(DcpOnObjects):
    """DCP with Amazon's s3torchconnector."""

    name = "s3torchconnector, DCP"

    def start(self) -> None:
        from s3torchconnector import S3ClientConfig
        from s3torchconnector.dcp import S3StorageReader, S3StorageWriter

        self._writer, self._reader = S3StorageWriter, S3StorageReader
        self._how: dict[str, Any] = {"s3client_config": S3ClientConfig(force_path_style=True)}

    def writer(self, folder: Path) -> Any:
        return self._writer(self.served.options["region"], self.at(folder), **self._how)

    def reader(self, folder: Path) -> Any:
        return self._reader(self.served.options["region"], self.at(folder), **self._how)


class RawObstore(OnObjects):
    """The limit: obstore's own multipart upload of the same memory, and ranged gets, as many in flight as ours.

    No names, no sums, no commit; what is loaded stays in the memory that it came in.
    """

    name = "raw, obstore"

    def start(self) -> None:
        import obstore.store

        options: Any = {"config": self.served.options, "client_options": {"allow_http": True}}
        self._store: Any = obstore.store.from_url(self.served.uri, **options)
        self._memory = [as_bytes(t.cpu()) for t in self.tensors.local.values()]
        self._found: list[Any] = []

    def _key(self, folder: Path) -> str:
        return f"{self.home.name}/{folder.name}/rank-{self.world.rank}"

    def _pieces(self) -> Iterator[memoryview]:
        for memory in self._memory:
            for low in range(0, len(memory), _PIECE):
                yield memory[low : low + _PIECE]

    def save(self, folder: Path) -> None:
        how = {"use_multipart": True, "chunk_size": PART, "max_concurrency": IN_FLIGHT}
        self._store.put(self._key(folder), self._pieces(), **how)

    def load(self, folder: Path) -> None:
        key, size = self._key(folder), sum(map(len, self._memory))
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            ranges = [(low, min(size, low + PART)) for low in range(0, size, PART)]
            self._found = list(pool.map(lambda r: self._store.get_range(key, start=r[0], end=r[1]), ranges))

    def settle(self) -> None:
        data, at = torch.frombuffer(bytearray(b"".join(self._found)), dtype=torch.uint8), 0
        for t in self.tensors.local.values():
            size = t.numel() * t.element_size()
            t.copy_(data[at : at + size].view(t.dtype).view(t.shape))
            at += size
        self._found = []


OBJECTS = (ObjectDistckpt, WriterDistckpt, S3fsDcp, S3ConnectorDcp, RawObstore)
