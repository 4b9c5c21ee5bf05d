"""Safetensors: one file, a Hugging Face directory, or what DCP's HuggingFaceStorageWriter leaves. Weights only.

A file has no checksums. What DCP writes rank by rank says where in its tensor each entry begins, and nowhere how large
the tensor is: it reaches as far as its entries do.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, KeyMissing, NotACheckpoint
from distckpt.foreign.described import Chunk, Directory, Tensor
from distckpt.foreign.files import PlainFile, inside, read_bytes
from distckpt.foreign.located import Located
from distckpt.format import objects
from distckpt.format.box import Box, Shape
from distckpt.format.datafile import MAX_HEADER
from distckpt.format.dtype import DTYPE_OF_TAG
from distckpt.format.layout import CHECKSUMS_CHUNK
from distckpt.format.manifest import MAX_DIMS
from distckpt.format.text import read_json, shown
from distckpt.statedict import insert

if TYPE_CHECKING:
    from pathlib import Path

STATE_DICT = "distckpt.state_dict"
"""Entry of a file's metadata that full_state_dict writes: the nested state dict, a TensorRef for each tensor, as tagged
JSON."""
SUFFIX = ".safetensors"
INDEX = ".safetensors.index.json"

_DTYPES = DTYPE_OF_TAG | {
    "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_SHARDED = re.compile(r"(?:shard-[0-9]+-)?model-([0-9]+)-of-([0-9]+)\.safetensors")
_LENGTH = struct.Struct("<Q")


def read_safetensors(path: Path) -> Directory:
    """Describe one file, or a directory of them. Corrupt for a shard that is gone, with its tensors."""
    if path.is_file():
        return _described(str(path), [path])
    indexes = sorted(p for p in path.iterdir() if p.name.endswith(INDEX))
    if len(indexes) > 1:
        raise FormatError(
            f"{path}: {', '.join(p.name for p in indexes)}: which one is meant? Give one file, or move one"
        )
    if indexes:
        return _indexed(path, indexes[0])
    found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIX))
    _refuse_missing(path, found)
    return _described(str(path), found)


def _indexed(folder: Path, index: Path) -> Directory:
    content = read_json(read_bytes(file := PlainFile(index), 0, min(file.size, MAX_HEADER)))
    match content:
        case {"weight_map": dict(shards)} if shards and all(type(s) is str for s in shards.values()):
            pass
        case _:
            raise FormatError(f"{index}: has no weight_map of tensors to files")
    holds: dict[str, list[str]] = {}
    for name, shard in shards.items():
        holds.setdefault(shard, []).append(name)
    paths = {shard: inside(folder, shard, str(index)) for shard in sorted(holds)}
    for shard, path in paths.items():
        if not path.is_file():
            raise Corrupt(f"{path}: is gone; {index.name} says that it holds {_some(holds[shard])}")
    found = _described(str(folder), list(paths.values()))
    if lacking := sorted(shards.keys() - found.tree["model"].keys()):
        raise Corrupt(f"{shards[lacking[0]]}: does not hold {_some(lacking)}, though {index.name} says so")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _refuse_missing(folder: Path, found: list[Path]) -> None:
    """Corrupt if names of the form `model-I-of-N` show that others are gone."""
    parts = {int(m[1]): int(m[2]) for p in found if (m := _SHARDED.fullmatch(p.name))}
    if missing := set(range(1, max(parts.values(), default=0) + 1)) - parts.keys():
        raise Corrupt(f"{folder}: of model files 1 to {max(parts.values())}, {sorted(missing)[:10]} are gone")
    if not found:
        raise NotACheckpoint(f"{folder}: no {SUFFIX} file")


def _described(name: str, paths: list[Path]) -> Directory:
    files = [PlainFile(path) for path in paths]
    chunks: dict[str, list[tuple[Chunk, str]]] = {}
    for index, file in enumerate(files):
        entries, offsets, nested = _header(file)
        for tensor, located in entries.items():
            if tensor in chunks and not offsets:
                other = files[chunks[tensor][0][0].file].name
                raise FormatError(f"{tensor}: is in {other} and in {file.name}, and neither says which part of it")
            at = offsets.get(tensor, (0,) * len(located.shape)) if offsets else (0,) * len(located.shape)
            if len(at) != len(located.shape):
                raise FormatError(f"{file.name}: {tensor}: shape {located.shape} at {at}")
            chunk = Chunk(index, Box(at, located.shape), located.start, lambda located=located: located)  # type: ignore[misc]
            chunks.setdefault(tensor, []).append((chunk, located.dtype))
    tree: dict[str, Any] = {tensor: _whole(tensor, parts) for tensor, parts in chunks.items()}
    if nested is not None and len(files) == 1:
        try:
            return Directory(name, insert(nested, tree), files, has_sums=False)
        except KeyError as e:
            raise FormatError(f"{name}: its state dict refers to tensor {e}, which it has not") from e
    return Directory(name, {"model": tree}, files, has_sums=False)


def _whole(name: str, parts: list[tuple[Chunk, str]]) -> Tensor:
    boxes = [chunk.box for chunk, _ in parts if isinstance(chunk.box, Box)]
    dtypes = {dtype for _, dtype in parts}
    if len(dtypes) > 1 or len({len(box.sizes) for box in boxes}) > 1:
        raise FormatError(f"{name}: its parts differ in dtype or number of dimensions")
    shape = tuple(
        max(a + n for a, n in dim) for dim in zip(*(zip(b.offsets, b.sizes, strict=True) for b in boxes), strict=True)
    )
    return Tensor(dtypes.pop(), shape, tuple(chunk for chunk, _ in {c.box: (c, d) for c, d in parts}.values()))


def _header(file: PlainFile) -> tuple[dict[str, Located], dict[str, Shape], dict[str, Any] | None]:
    """(tensors of a file, where each begins in its whole as DCP says, its nested state dict). FormatError, Corrupt."""
    try:
        (length,) = _LENGTH.unpack(read_bytes(file, 0, _LENGTH.size))
        if length > min(MAX_HEADER, file.size - _LENGTH.size):
            raise FormatError(f"a header of {length} bytes in a file of {file.size}")
        raw = read_json(read_bytes(file, _LENGTH.size, length))
        if not isinstance(raw, dict):
            raise FormatError("the header is no JSON object")
        if CHECKSUMS_CHUNK in raw:
            raise FormatError("a data file of a distckpt checkpoint: give the run's directory, or that of its step")
        notes = raw.pop("__metadata__", {})
        entries = {name: _entry(name, item, _LENGTH.size + length) for name, item in raw.items()}
        notes = notes if isinstance(notes, dict) else {}
        offsets = _offsets(notes.get("DCP_SHARDING_INFO"))
        nested = objects.decode(str(notes[STATE_DICT]).encode()) if STATE_DICT in notes else None
        if not isinstance(nested, dict | None):
            raise FormatError("its nested state dict is none")
    except (FormatError, KeyMissing) as e:
        raise type(e)(f"{file.name}: not a safetensors file: {e}") from e
    except EOFError as e:
        raise Corrupt(f"{file.name}: cut short: {e}") from e
    for name, entry in entries.items():
        if entry.start + entry.nbytes > file.size:
            raise Corrupt(
                f"{file.name}: has {file.size} bytes; {name} is at {entry.start} to {entry.start + entry.nbytes}: the "
                "file was cut short"
            )
    return entries, offsets, nested


def _entry(name: str, item: Any, start: int) -> Located:
    match item:
        case {"dtype": str(tag), "shape": [*shape], "data_offsets": [int(first), int(last)]} if (
            tag in _DTYPES and len(shape) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in shape) and first >= 0
        ):
            found = Located(_DTYPES[tag], tuple(shape), None, start + first)
            if found.nbytes == last - first:
                return found
    raise FormatError(f"entry {name!r} is malformed, or of a dtype that is not known: {shown(item)}")


def _offsets(text: Any) -> dict[str, Shape]:
    """Tensor -> where its entry begins, of DCP_SHARDING_INFO."""
    if text is None:
        return {}
    info = read_json(str(text).encode())
    try:
        found = {name: tuple(entry["saved_offsets"]) for name, entry in info.items()}
    except (AttributeError, KeyError, TypeError) as e:
        raise FormatError(f"DCP_SHARDING_INFO is malformed: {shown(info)}") from e
    if not all(type(n) is int and n >= 0 for at in found.values() for n in at):
        raise FormatError(f"DCP_SHARDING_INFO has offsets that are none: {shown(info)}")
    return found
