"""What a path holds, and who reads it: the one place that tells the kinds of foreign files apart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, StoreError
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

_PICKLED = re.compile(r"pytorch_model(?:-([0-9]+)-of-([0-9]+))?\.bin")
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
        if any(n.endswith((SUFFIX, INDEX)) for n in names):
            return read_safetensors
        return _read_torch_files if any(_PICKLED.fullmatch(n) for n in names) else None
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


def _read_torch_files(path: Path) -> Directory:
    """Describe what transformers saved before safetensors: state dicts, of which each has a part of the model."""
    found = sorted(p for p in path.iterdir() if _PICKLED.fullmatch(p.name))
    parts = {int(m[1]): int(m[2]) for p in found if (m := _PICKLED.fullmatch(p.name)) and m[1]}
    if missing := set(range(1, max(parts.values(), default=0) + 1)) - parts.keys():
        raise Corrupt(f"{path}: of files 1 to {max(parts.values())}, {sorted(missing)[:10]} are gone")
    files = [PlainFile(p) for p in found]
    trees = [leaves(parse_any(file), index) for index, file in enumerate(files)]
    if not all(isinstance(tree, dict) for tree in trees):
        raise FormatError(f"{path}: a state dict is expected in each of {', '.join(p.name for p in found)}")
    has_sums = all(read_bytes(file, 0, len(ZIP)) == ZIP for file in files)
    return Directory(str(path), {k: v for tree in trees for k, v in tree.items()}, files, has_sums=has_sums)
