"""The manifest: the content of `commit.json`. Frozen values, their codec, and `decode`, which believes nothing.

The file is one JSON object whose last member is `digest`, over every byte before it. Its existence is the commit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.errors import FormatError, NewerFormat, Unsupported, Untrusted
from distckpt.format import objects, partition
from distckpt.format.checksum import SHA256, algorithm_of
from distckpt.format.datafile import MAX_HEADER
from distckpt.format.dtype import item_size
from distckpt.format.layout import StepDir, check_key
from distckpt.format.sealed import seal, unseal
from distckpt.format.text import shown
from distckpt.garbage import uncollected

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.format.partition import Partition

FORMAT_VERSION = 1
MAX_BYTES = 1 << 30
"""Longest commit.json or file of an object, in bytes, that is read."""
MAX_DIMS = 64
"""Most dimensions of a tensor: what torch knows."""

ON_RESHARD = ("derive", "refuse", "first")
"""What a per-rank object may say of another world size: derive a new value, refuse, or take the first rank's."""

_FILE_ENTRY = [str, int, int, str]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One global tensor: shape, torch dtype name, and how it is divided over the data files."""

    shape: tuple[int, ...]
    dtype: str
    partition: Partition

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * item_size(self.dtype)


class FileInfo(NamedTuple):
    """One data file: its name in the step directory (or key in the run), bytes, bytes of its header, digest."""

    name: str
    size: int
    header: int
    digest: str


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The file of one rank-independent object: name in the step directory, bytes, digest of its content."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that a checkpoint is. `files[r]` is what rank r wrote; files of earlier steps follow those."""

    step: int
    generation: int
    launch: int
    attempt: str
    date: str
    world_size: int
    tensors: Mapping[str, TensorInfo]
    files: tuple[FileInfo, ...]
    objects: Mapping[str, ObjectInfo] = field(default_factory=dict)
    rank_objects: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    writer: Mapping[str, str] = field(default_factory=dict)
    keep: str = ""
    """Why it is to be kept whatever the rules, by whoever saved it."""
    signature: str = ""
    """Of the commit that it was read from, as far as it has one; no part of what is signed."""

    @property
    def is_strong(self) -> bool:
        """Whether all that it names is summed so that nobody can forge it."""
        digests = [*(f.digest for f in self.files), *(o.digest for o in self.objects.values())]
        return all(algorithm_of(digest) is SHA256 for digest in digests)

    @property
    def own_bytes(self) -> int:
        """Bytes of its own data files, without those of earlier checkpoints that it names."""
        return sum(f.size for f in self.files if "/" not in f.name)


def owners(manifest: Manifest) -> frozenset[StepDir]:
    """Checkpoints whose data files it names besides its own."""
    found = (StepDir.parse(f.name.partition("/")[0]) for f in manifest.files if "/" in f.name)
    return frozenset(owner for owner in found if owner)


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Members of commit.json but its digest."""
    return {
        "format": FORMAT_VERSION,
        "step": manifest.step,
        "generation": manifest.generation,
        "launch": manifest.launch,
        "attempt": manifest.attempt,
        "date": manifest.date,
        "world_size": manifest.world_size,
        "writer": dict(manifest.writer),
        "metrics": {name: objects.tag(value, f"metrics.{name}") for name, value in manifest.metrics.items()},
        "tensors": {
            fqn: [list(t.shape), t.dtype, t.partition.to_json()] for fqn, t in sorted(manifest.tensors.items())
        },
        "aliases": dict(sorted(manifest.aliases.items())),
        "objects": {name: [o.name, o.size, o.digest] for name, o in sorted(manifest.objects.items())},
        "rank_objects": dict(sorted(manifest.rank_objects.items())),
        "files": [[f.name, f.size, f.header, f.digest] for f in manifest.files],
        **({"keep": manifest.keep} if manifest.keep else {}),
    }


def encode(manifest: Manifest, sign: Callable[[bytes], str] | None = None) -> bytes:
    """Content of commit.json. sign: see `seal`; FormatError if what is below is summed as what is not signed."""
    if sign and not manifest.is_strong:
        raise FormatError(f"to be signed, every file of step {manifest.step} must have {SHA256.name} sums")
    return seal(to_json(manifest), sign)


@uncollected()
def decode(data: bytes, trusted: Callable[[bytes, str], None] | None) -> Manifest:
    """Manifest in the content of a commit.json.

    trusted: see `unseal`; raises Untrusted. Corrupt where its digest does not hold, NewerFormat for a later version,
    FormatError for anything malformed.
    """
    body = unseal(data, trusted)
    manifest = replace(from_json(body), signature=str(body.get("signature", "")))
    check(manifest)
    if trusted and not manifest.is_strong:
        raise Untrusted(f"it is signed, but not every file has {SHA256.name} sums")
    return manifest


def from_json(body: Any) -> Manifest:
    """Manifest with these members, each well-formed; that they fit each other is for `check`.

    NewerFormat for a later version, before anything else is looked at; FormatError.
    """
    version = body.get("format") if isinstance(body, dict) else None
    if type(version) is not int or version < 1:
        raise FormatError(f"format version {version!r} is not a positive integer")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"format version {version}; this distckpt reads up to {FORMAT_VERSION}. Install a newer distckpt."
        )
    try:
        return _from_json(body)
    except Unsupported as e:
        raise FormatError(str(e)) from e


def _from_json(body: dict[str, Any]) -> Manifest:
    match body:
        case {
            "step": int(step),
            "generation": int(generation),
            "launch": int(launch),
            "attempt": str(attempt),
            "date": str(date),
            "world_size": int(world_size),
            "writer": dict(writer),
            "metrics": dict(metrics),
            "tensors": dict(tensors),
            "aliases": dict(aliases),
            "objects": dict(shared),
            "rank_objects": dict(rank_objects),
            "files": [*files],
        }:
            return Manifest(
                step,
                generation,
                launch,
                attempt,
                date,
                world_size,
                _tensors(tensors),
                tuple(map(_file, files)),
                {name: _object(name, item) for name, item in shared.items()},
                rank_objects,
                aliases,
                {name: objects.untag(value) for name, value in metrics.items()},
                writer,
                str(body.get("keep", "")),
            )
    raise FormatError(f"members are missing or of the wrong type; it has {shown(sorted(body))}")


def _tensors(items: dict[str, Any]) -> dict[str, TensorInfo]:
    """Tensors by fqn. Those that are alike share one value: most are, and it is worked out and checked once."""
    found: dict[str, TensorInfo] = {}
    known: dict[str, TensorInfo] = {}
    for fqn, item in items.items():
        said = repr(item)
        if said not in known:
            known[said] = _tensor(fqn, item)
        found[fqn] = known[said]
    return found


def _tensor(fqn: str, item: Any) -> TensorInfo:
    match item:
        case [[*shape], str(dtype), dict(divided)] if len(shape) <= MAX_DIMS and all(
            type(n) is int and n >= 0 for n in shape
        ):
            item_size(dtype)
            return TensorInfo(tuple(shape), dtype, partition.from_json(divided, tuple(shape)))
    raise FormatError(f"tensor {fqn!r} is malformed: {shown(item)}")


def _file(item: Any) -> FileInfo:
    if type(item) is list and [*map(type, item)] == _FILE_ENTRY:  # a pattern of types takes ten times as long
        name, size, header, sums = item
        if 8 < header <= size and header <= 8 + MAX_HEADER and algorithm_of(sums):
            return FileInfo(check_key(name), size, header, sums)
    raise FormatError(f"file entry is malformed: {shown(item)}")


def _object(name: str, item: Any) -> ObjectInfo:
    match item:
        case [str(file), int(size), str(sums)] if 0 <= size <= MAX_BYTES and algorithm_of(sums) and "/" not in file:
            return ObjectInfo(check_key(file), size, sums)
    raise FormatError(f"object {name!r} is malformed: {shown(item)}")


def check(manifest: Manifest) -> None:
    """FormatError unless the members fit each other."""
    m = manifest
    if m.step < 0 or m.generation < 1 or m.launch < 0 or not 1 <= m.world_size <= len(m.files):
        raise FormatError(
            f"step {m.step}, generation {m.generation}, launch {m.launch}, world size {m.world_size} "
            f"with {len(m.files)} files: out of range"
        )
    nbytes = 0
    count = Counter(map(id, m.tensors.values()))
    for fqn, tensor in {id(t): (fqn, t) for fqn, t in m.tensors.items()}.values():
        if tensor.partition.last_file >= len(m.files):
            raise FormatError(f"tensor {fqn!r} names file {tensor.partition.last_file} of a table of {len(m.files)}")
        tensor.partition.check()
        nbytes += count[id(tensor)] * tensor.nbytes
    if nbytes > (room := sum(f.size for f in m.files)):
        raise FormatError(
            f"tensors of more than {shown(nbytes)} bytes in data files of {room}"
        )  # a load would make them
    for alias, fqn in m.aliases.items():
        if type(fqn) is not str or alias in m.tensors or fqn not in m.tensors:
            raise FormatError(f"alias {alias!r} of {fqn!r}: the first must not be a tensor, the second must")
    if not all(type(version) is str for version in m.writer.values()):
        raise FormatError(f"writer must map names to versions: {shown(m.writer)}")
    for name, policy in m.rank_objects.items():
        if policy not in ON_RESHARD:
            raise FormatError(f"per-rank object {name!r}: policy {policy!r} is none of {', '.join(ON_RESHARD)}")
