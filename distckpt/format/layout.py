"""Every name on disk: keys below a run directory, and names of chunks inside a data file.

The one place that makes such a name, takes one apart, or decides whether a key may be used at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from distckpt.errors import FormatError
from distckpt.format.box import Region, Run

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMIT = "commit.json"
REGISTRY = "meta.json"
EVENTS = "events.jsonl"
LAUNCHES = "launches"
LEASES = "leases"
NODE = "node.json"
ACK = "ack-"
OBJECTS_CHUNK = "__objects__"
CHECKSUMS_CHUNK = "__checksums__"

_KEY_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,254}")
_KEY = re.compile(f"{_KEY_PART.pattern}(?:/{_KEY_PART.pattern})*")
_STEP_DIR = re.compile(r"step-([0-9]{8,})(?:\.([1-9][0-9]*))?")
MOST_LAUNCHES = 999_999_999
_LAUNCH = re.compile(r"([0-9]{4,9})\.json")
_ATTEMPT_FILE = re.compile(
    r"(?P<stem>[A-Za-z0-9_][A-Za-z0-9_.-]*)\.(?P<attempt>[0-9a-f]{12})\.(?P<ext>safetensors|json)"
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_ACK = re.compile(ACK + r"([0-9]{5,})")
_SLICE = re.compile(r"\[(?:flat )?[0-9]+:[0-9]+(?:,[0-9]+:[0-9]+)*\]\Z")


def check_key(key: str) -> str:
    """Return the key itself. FormatError unless each part is a plain name: nothing hidden, absolute, or leading out."""
    if not _KEY.fullmatch(key):
        raise FormatError(f"not a key: {key!r}; each part must match {_KEY_PART.pattern}")
    return key


def is_name(text: str) -> bool:
    """Whether a user's name (of a model in a dict, of an extra value) can stand in fqns and file names.

    That of an ack cannot: the object's file would be taken for one, and removed with the others.
    """
    return _NAME.fullmatch(text) is not None and not _ACK.fullmatch(text)


@dataclass(frozen=True, slots=True, order=True)
class StepDir:
    """Directory of one checkpoint: its step, and which generation of it (1 unless the step was saved again)."""

    step: int
    generation: int = 1

    def __str__(self) -> str:
        return f"step-{self.step:08d}" + (f".{self.generation}" if self.generation > 1 else "")

    @classmethod
    def parse(cls, name: str) -> StepDir | None:
        """Step directory with exactly this name, else None (`step-100.tmp` is none)."""
        match = _STEP_DIR.fullmatch(name)
        found = cls(int(match[1]), int(match[2] or 1)) if match else None
        return found if str(found) == name else None


def data_file(rank: int, attempt: str) -> str:
    """Name of the data file that a rank writes."""
    return f"rank-{rank:05d}.{attempt}.safetensors"


def object_file(name: str, attempt: str) -> str:
    """Name of the file of a rank-independent object."""
    return f"{name}.{attempt}.json"


def ack_file(rank: int, attempt: str) -> str:
    """Name of the file in which a rank says what it finished, or why it failed."""
    return f"{ACK}{rank:05d}.{attempt}.json"


def attempt_of(name: str) -> str | None:
    """Attempt id in the name of a file of a step directory."""
    match = _ATTEMPT_FILE.fullmatch(name)
    return match["attempt"] if match else None


def ack_rank(name: str, attempt: str) -> int | None:
    """Rank whose ack of this attempt the file is."""
    match = _ATTEMPT_FILE.fullmatch(name)
    ack = _ACK.fullmatch(match["stem"]) if match and match["attempt"] == attempt else None
    rank = int(ack[1]) if ack else None
    return rank if rank is not None and ack_file(rank, attempt) == name else None


def launch_file(number: int) -> str:
    """Key of a launch's record."""
    return f"{LAUNCHES}/{number:04d}.json"


def beat_file(number: int) -> str:
    """Key of the heartbeat of a launch."""
    return f"{LAUNCHES}/{number:04d}.beat.json"


def launch_number(name: str) -> int | None:
    """Number of the launch whose record has this name (without its directory)."""
    match = _LAUNCH.fullmatch(name)
    number = int(match[1]) if match else None
    return number if number is not None and launch_file(number) == f"{LAUNCHES}/{name}" else None


def lease_file(directory: StepDir, nonce: str) -> str:
    """Key of a reader's lease on a checkpoint."""
    return f"{LEASES}/{directory}.{nonce}.json"


def lease_of(name: str) -> StepDir | None:
    """Step directory that the lease of this name (without its directory) is on."""
    match = _ATTEMPT_FILE.fullmatch(name)
    return StepDir.parse(match["stem"]) if match else None


def pointer_file(name: str) -> str:
    """Key of a pointer (`last`, `best`)."""
    return f"{name}.json"


def epoch_link(epoch: int) -> str:
    """Name of the symlink to the newest checkpoint of an epoch."""
    return f"epoch-{epoch:04d}"


def is_epoch_link(name: str) -> bool:
    """Whether a symlink of this name is such a one."""
    return re.fullmatch(r"epoch-[0-9]{4,}", name) is not None


def chunk_name(fqn: str, region: Region, shape: Sequence[int]) -> str:
    """Name of a chunk in a data file: the fqn, and its slice where it is not the whole tensor.

    A backslash goes before an fqn that begins with `__` or a backslash, and after one that ends like a slice or
    with a backslash: so a name has one meaning.
    """
    return escaped(fqn) + slice_name(region, shape)


def escaped(fqn: str) -> str:
    """Fqn as a chunk's name begins: what stands for the whole tensor."""
    before = "\\" if fqn.startswith(("__", "\\")) else ""
    after = "\\" if fqn.endswith("\\") or (fqn.endswith("]") and _SLICE.search(fqn)) else ""
    return before + fqn + after


def slice_name(region: Region, shape: Sequence[int]) -> str:
    """End of a chunk's name: which slice of the tensor it is; empty for the whole."""
    if region.numel == prod(shape):
        return ""
    if isinstance(region, Run):
        return f"[flat {region.start}:{region.stop}]"
    return f"[{','.join(f'{a}:{a + n}' for a, n in zip(region.offsets, region.sizes, strict=True))}]"


def fqn_of(name: str) -> str:
    """Fqn in the name of a chunk: the inverse of `chunk_name`."""
    return _SLICE.sub("", name).removesuffix("\\").removeprefix("\\")
