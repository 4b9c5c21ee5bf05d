"""What a path holds, and who reads it: the one place that tells the kinds of foreign files apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import DistckptError, FormatError, StoreError
from distckpt.foreign.dcp import is_dcp, read_dcp
from distckpt.foreign.deepspeed import is_deepspeed, read_deepspeed
from distckpt.foreign.described import Directory, describe, leaves
from distckpt.foreign.files import PlainFile, read_bytes
from distckpt.foreign.legacyfile import parse_any
from distckpt.foreign.located import Undecodable
from distckpt.foreign.peft import is_peft, read_peft
from distckpt.foreign.safetensors import INDEX, SUFFIX, read_safetensors
from distckpt.foreign.torchfile import LEGACY, ZIP

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from distckpt.foreign.described import Described

KINDS = (
    "a DCP directory, a DeepSpeed tag, a torch.save file, safetensors (a file, or a directory with or without index), "
    "or an adapter of PEFT"
)

_TORCH_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".tar"}


def open_foreign(
    path: str | os.PathLike[str],
    names: Mapping[str, str] | None = None,
    order: Sequence[Sequence[str]] | None = None,
    like: Mapping[Any, Any] | None = None,
    *,
    rest: str | None = None,
) -> Described | None:
    """Describe what another tool saved at `path`; None where there is nothing of a kind that is read.

    names: entry of the state dict -> lead, where the entries are not called model, optimizer and so on. order: names of
    the optimizer's parameters by group, for a DeepSpeed tag that has them by position. like: the state dict that is to
    be loaded, whose entries are called what they are called there. rest: lead for the entries that
    are of no part of the training state. FormatError, Corrupt, NotACheckpoint, Unsupported for what is of a known kind
    and cannot be read.
    """
    path = Path(path)
    try:
        reader = _reader(path)
        if reader is read_deepspeed:
            found: Directory | None = read_deepspeed(path, order)
        else:
            found = reader(path) if reader else None
    except OSError as e:
        if isinstance(e, DistckptError):
            raise
        raise StoreError(f"cannot look at {path}: {e.strerror or e}") from e
    return describe(found, names, like, rest) if found else None


def holds_foreign(path: Path) -> bool:
    """Whether a path holds something of a kind that is read, by the names of its files. StoreError."""
    return _reader(path) is not None


def _reader(path: Path) -> Callable[[Path], Directory] | None:
    """Who reads a path."""
    try:
        return _reader_of(path)
    except OSError as e:
        if isinstance(e, DistckptError):
            raise
        raise StoreError(f"cannot look at {path}: {e.strerror or e}") from e


def _reader_of(path: Path) -> Callable[[Path], Directory] | None:
    if path.is_dir():
        if is_dcp(path):
            return read_dcp
        if is_deepspeed(path):
            return read_deepspeed
        names = [p.name for p in path.iterdir()]
        if is_peft(names):
            return read_peft
        return read_safetensors if any(n.endswith((SUFFIX, INDEX)) for n in names) else None
    if not path.is_file():
        return None
    if path.name.endswith(SUFFIX):
        return read_safetensors
    file = PlainFile(path)
    head = read_bytes(file, 0, min(file.size, 64))
    return _read_torch_file if path.suffix in _TORCH_SUFFIXES or head.startswith((ZIP, *LEGACY)) else None


def _read_torch_file(path: Path) -> Directory:
    """Describe what torch.save wrote: a state dict, or a dict of them and of plain values."""
    file = PlainFile(path)
    tree: Any = leaves(parse_any(file), 0)
    if not isinstance(tree, dict):
        what = tree.why if isinstance(tree, Undecodable) else f"{file.name}: holds a {type(tree).__name__}"
        raise FormatError(f"{what}; a state dict, or a dict of them, is expected")
    return Directory(file.name, dict(tree), [file], has_sums=read_bytes(file, 0, len(ZIP)) == ZIP)
