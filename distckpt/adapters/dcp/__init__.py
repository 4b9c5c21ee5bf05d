"""The drop-in for torch.distributed.checkpoint: a StorageWriter and a StorageReader. See docs/dcp.md."""

from distckpt.adapters.dcp.reader import StorageReader
from distckpt.adapters.dcp.writer import StorageWriter

__all__ = ["StorageReader", "StorageWriter"]
