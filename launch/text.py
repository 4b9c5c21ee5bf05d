"""Real text that every machine with Python has: the sources of its standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator


class Windows(Dataset[Tensor]):
    """A text, as windows of `seq` inputs and their targets. `digest` tells texts apart.

    Sample i is int64[seq + 1]: bytes i * seq to (i + 1) * seq, both included, so that each byte is predicted once.
    """

    def __init__(self, text: bytearray, seq: int) -> None:
        self.seq = seq
        self.digest = hashlib.sha256(text).hexdigest()
        self._bytes = torch.frombuffer(text, dtype=torch.uint8)
        if len(self) < 1:
            raise ValueError(f"{len(text)} bytes of text hold no window of {seq} + 1 bytes")

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.seq

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._bytes[i * self.seq : (i + 1) * self.seq + 1].long()


class StdlibText(Windows):
    """The first `nbytes` bytes of the standard library's .py files.

    The files come in the order of their paths, so one Python release gives one text.
    """

    def __init__(self, nbytes: int, seq: int) -> None:
        super().__init__(_read(nbytes), seq)


def _read(nbytes: int) -> bytearray:
    root = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for path in _sources(root):
        text += path.read_bytes()
        if len(text) >= nbytes:
            return text[:nbytes]
    raise ValueError(f"{root} holds only {len(text)} bytes of Python sources; {nbytes} were asked for")


def _sources(directory: Path) -> Iterator[Path]:
    """Python files below a directory, in the order of their names on every machine."""
    for path in sorted(directory.iterdir()):
        # site-packages lies inside the standard library, and holds what somebody installed
        if path.is_dir() and path.name != "site-packages":
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path
