"""The model in a DeepSpeed tag: its tensors by name, from one file, from layers of a pipeline, or from experts' files.

A layer's file has the names within the layer. Those of the whole are a layer's place in the pipeline
(`3.up.weight`), or, of one that is used at several places, its key (`tied_modules.words.weight`): told by what the
optimizer's files know, for the layer's own file does not say. A use of a tied layer with a `forward_fn` has no file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import isfinite, prod
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.deepspeed_experts import Experts
from distckpt.foreign.files import read_bytes
from distckpt.format.dtype import item_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.foreign.deepspeed_files import TagFiles
    from distckpt.foreign.described import Tensor
    from distckpt.foreign.located import Located
    from distckpt.format.box import Shape

_TIED = "tied_modules."


@dataclass(slots=True)
class Weights:
    """Tensors of the model by name: file, and where in it. buffers: names of those that are no parameters."""

    found: dict[str, tuple[int, Located]]
    buffers: set[str]
    experts: Experts = field(default_factory=lambda: Experts({}))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes by name."""
        return {name: located.shape for name, (_, located) in self.found.items()}


def weights_of(files: TagFiles, known: Mapping[str, Shape | None], hinted: Iterable[str] = ()) -> Weights:
    """All tensors of the model.

    known: what is trained, as far as the optimizer's files say: names, shapes. hinted: names that it may have, too.
    """
    buffers = {str(name) for stage in files.stages for name in stage.model.get("buffer_names") or ()}
    if files.layers:
        sure = {**dict.fromkeys(buffers), **known}
        found = _layers(files, {**dict.fromkeys(hinted), **sure})
        _check_whole(files, sure, found)
        return Weights(found, buffers)
    first = files.stages[0].first
    found = {name: (first, t) for name, t in files.tensors(first, files.model.get("module"))}
    of_experts = [
        (name, file, t) for file in files.experts.values() for name, t in files.tensors(file, files.trees[file])
    ]
    config = files.model.get("ds_config")
    config = config if isinstance(config, dict) else {}
    data_first = bool(config.get("use_data_before_expert_parallelism"))
    experts = Experts.of_names((name for name, _, _ in of_experts), data_first=data_first)
    if files.experts and config.get("sequence_parallel_size", 1) not in {1, None}:
        raise Unsupported(f"{files.folder}: experts under sequence parallelism: load it with DeepSpeed itself")
    found |= {name: (file, t) for name, file, t in of_experts}
    alike = {experts.alike(name) for name in buffers}
    return Weights(found, {name for name in found if experts.alike(name) in alike}, experts)


def _layers(files: TagFiles, known: Mapping[str, Shape | None]) -> dict[str, tuple[int, Located]]:
    """Tensors of a pipeline's layers, under the names that the whole has for them."""
    tied: dict[str, dict[str, Shape | None]] = {}
    for name, shape in known.items():
        if name.startswith(_TIED):
            key, _, rest = name.removeprefix(_TIED).partition(".")
            tied.setdefault(key, {})[rest] = shape
    found: dict[str, tuple[int, Located]] = {}
    for number, file in files.layers.items():
        own = dict(files.tensors(file, files.trees[file]))
        keys = [key for key, members in tied.items() if _is_like(own, members)]
        if not keys or any(f"{number}.{name}" in known for name in own):
            found |= {f"{number}.{name}": (file, t) for name, t in own.items()}
            continue
        if len(keys) > 1 and own.keys() - tied[keys[0]].keys():
            raise Unsupported(
                f"{files.name(file)}: is that of one of the tied layers {keys}, which are alike: which one is not said"
            )
        if len(keys) == 1:
            found = {f"{_TIED}{keys[0]}.{name}": (file, t) for name, t in own.items()} | found
    return found


def _is_like(own: Mapping[str, Located], members: Mapping[str, Shape | None]) -> bool:
    """Whether a layer has all that a tied layer is known to have."""
    return all(name in own and shape in {None, own[name].shape} for name, shape in members.items())


def _check_whole(files: TagFiles, known: Mapping[str, Shape | None], found: Mapping[str, tuple[int, Located]]) -> None:
    """NotACheckpoint, FormatError unless each layer's file is there, with all that the optimizer's files know of."""
    for name in known:
        number = name.partition(".")[0]
        if name in found or not number.isdigit():
            continue
        if int(number) not in files.layers:
            raise NotACheckpoint(
                f"{files.folder}: layer_{int(number):02d}-model_states.pt, which has {name}, is missing: a save that "
                "did not finish, or was copied in part"
            )
        raise FormatError(
            f"{files.folder}: files of different saves: the optimizer knows {name}, which is not in "
            f"{files.name(files.layers[int(number)])}"
        )


# -- files that carry no step ----------------------------------------------------------------------------------------

_LOOKED_AT = 64  # elements
_FORMS = {"float32": "f", "float16": "e"}


def check_rounded(files: TagFiles, weights: Weights, masters: Mapping[str, Tensor]) -> None:
    """FormatError where a layer's or an expert's file has other weights than the masters, rounded: of another save.

    Such a file says no step. Looked at is the beginning of its smallest trained tensor.
    """
    smallest: dict[int, str] = {}
    parted = {*files.layers.values(), *files.experts.values()}
    for name, (file, located) in weights.found.items():
        if file in parted and name in masters and 0 not in located.shape:
            best = smallest.setdefault(file, name)
            if located.nbytes < weights.found[best][1].nbytes:
                smallest[file] = name
    for file, name in smallest.items():
        chunk, located = masters[name].chunks[0], weights.found[name][1]
        master = chunk.locate()
        numel = min(prod(master.shape), _LOOKED_AT)
        if master.dtype != "float32" or {master.strides, located.strides} != {None}:
            continue
        wanted = _beginning(files, chunk.file, master, numel)
        found = _beginning(files, file, located, numel)
        if any(not is_rounded(b, a, located.dtype) for a, b in zip(wanted, found, strict=True)):
            raise FormatError(
                f"{files.folder}: files of different saves: {name} in {files.name(file)} is not what the optimizer in "
                f"{files.name(chunk.file)} has, rounded"
            )


def _beginning(files: TagFiles, file: int, located: Located, numel: int) -> list[bytes]:
    size = item_size(located.dtype)
    data = read_bytes(files.sources[file], located.start, numel * size)
    return [data[at : at + size] for at in range(0, len(data), size)]


def is_rounded(low: bytes, master: bytes, dtype: str) -> bool:
    """Whether `low` is an fp32 number in another precision, rounded to the nearest; anything goes for what has none."""
    (value,) = struct.unpack("<f", master)
    if not isfinite(value) or dtype not in {"float32", "bfloat16", "float16"}:
        return True
    if dtype == "bfloat16":
        (bits,) = struct.unpack("<I", master)
        return low == struct.pack("<I", bits + 0x7FFF + (bits >> 16 & 1))[2:]
    try:
        return low == struct.pack("<" + _FORMS[dtype], value)
    except OverflowError:  # beyond what fp16 holds
        return True
