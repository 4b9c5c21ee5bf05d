"""The files of a DeepSpeed tag, parsed: all of one save, none missing, or one error that says what is wrong.

mp_rank_00_model_states.pt                  stages 0 to 2: the model, and in what order its parameters lie where
zero_pp_rank_D_mp_rank_00_model_states.pt   stage 3: the same, of data-parallel rank D
zero_pp_rank_D_mp_rank_00_optim_states.pt   flat buffers of data-parallel rank D ("pp" notwithstanding)
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.files import PlainFile, read_bytes
from distckpt.foreign.legacyfile import parse_any
from distckpt.foreign.located import Located
from distckpt.foreign.pickles import DEEPSPEED
from distckpt.foreign.torchfile import ZIP
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_OTHERS = {
    re.compile(r"layer_.*expert_.*states\.pt"): "a mixture of experts",
    re.compile(r"layer_[0-9]+-model_.*states\.pt"): "a pipeline module",
}


class TagFiles:
    """Files by index: `sources`, and what each holds in `trees`. `models` and `ranks` are indices, by rank."""

    def __init__(self, folder: Path, *, universal: bool = False) -> None:
        self.folder = folder
        self.sources: list[PlainFile] = []
        self.trees: list[dict[Any, Any]] = []
        self.homes: list[int] = []
        self.has_sums = True
        names = sorted(p.name for p in folder.iterdir())
        for pattern, what in _OTHERS.items():
            if found := next((n for n in names if pattern.fullmatch(n)), None):
                raise Unsupported(f"{folder / found}: a tag of {what} cannot be read; load it with DeepSpeed itself")
        models = {(int(m[2]), int(m[1] or 0)): n for n in names if (m := MODEL.fullmatch(n))}
        optimizers = {(int(m[2]), int(m[1])): n for n in names if (m := _OPTIMIZER.fullmatch(n))}
        if not models:
            raise NotACheckpoint(f"{folder}: has no *_model_states.pt: a save that did not finish")
        if len({mp for mp, _ in models}) > 1:
            raise Unsupported(f"{folder}: of {len(models)} model-parallel ranks, whose parts carry no common names")
        self.models = [self.open(models[key], key[1]) for key in sorted(models)]
        self.ranks = [] if universal else [self.open(optimizers[key], key[1]) for key in sorted(optimizers)]
        self.model = self.trees[self.models[0]]
        self.partitioned = any(m[1] for n in names if (m := MODEL.fullmatch(n)))
        """Whether the model itself is shared out over the ranks (stage 3)."""
        self._check_models([dp for _, dp in sorted(models)])
        if not universal:
            self._check_optimizers([dp for _, dp in sorted(optimizers)])

    def open(self, name: str, home: int = 0) -> int:
        """Index of a file, which is parsed. Corrupt where it is damaged."""
        file = PlainFile(self.folder / name)
        try:
            tree = parse_any(file, DEEPSPEED)
        except (Corrupt, FormatError) as e:
            raise Corrupt(f"{e}: a save that did not finish, or a damaged file") from e
        self.has_sums &= read_bytes(file, 0, min(file.size, len(ZIP))) == ZIP
        self.sources.append(file)
        self.trees.append(tree if isinstance(tree, dict) else {"": tree})
        self.homes.append(home)
        return len(self.sources) - 1

    def name(self, file: int) -> str:
        """What messages call a file."""
        return self.sources[file].name

    def optimizer(self, file: int) -> dict[str, Any]:
        """What an optimizer file holds."""
        return self.dict_of(self.trees[file], "optimizer_state_dict", file)

    def dict_of(self, tree: Mapping[str, Any], name: str, file: int) -> dict[str, Any]:
        """Entry of this name, a dict. FormatError for anything else."""
        found = tree.get(name)
        if not isinstance(found, dict):
            raise FormatError(f"{self.name(file)}: {name} is {shown(found)}, not what DeepSpeed saves")
        return found

    def number(self, file: int, value: Any) -> Any:
        """A plain number as it is; that of a tensor of one element, as (dtype, bytes) where it has no Python form."""
        if not isinstance(value, Located) or value.shape not in {(), (1,)}:
            return value
        data = read_bytes(self.sources[file], value.start, value.nbytes)
        return struct.unpack("<" + _FORMS[value.dtype], data)[0] if value.dtype in _FORMS else (value.dtype, data)

    # -- one save, and all of it --------------------------------------------------------------------------------

    def _same(self, what: str, files: list[int], told: Callable[[int], Any]) -> Any:
        """What every file says. FormatError, with two that differ."""
        values = [told(file) for file in files]
        for file, value in zip(files, values, strict=True):
            if value != values[0]:
                raise FormatError(
                    f"{self.folder}: files of different saves: {what} is {shown(values[0])} in "
                    f"{self.sources[files[0]].name}, {shown(value)} in {self.sources[file].name}"
                )
        return values[0]

    def _check_models(self, ranks: list[int]) -> None:
        for name in ("global_steps", "dp_world_size", "ds_version", "param_shapes", "frozen_param_shapes"):
            self._same(name, self.models, lambda file, name=name: self.trees[file].get(name))  # type: ignore[misc]
        count = self.model.get("dp_world_size")
        if self.partitioned and type(count) is int:
            self._complete("model", ranks, count)

    def _check_optimizers(self, ranks: list[int]) -> None:
        if not ranks:
            if self.model.get("param_shapes"):
                raise NotACheckpoint(
                    f"{self.folder}: all its *_optim_states.pt are missing: a save that did not finish"
                )
            return
        count = self._same("partition_count", self.ranks, lambda file: self.optimizer(file).get("partition_count"))
        counts = count if isinstance(count, list) else [count]
        if not counts or not all(type(n) is int and n > 0 for n in counts):
            raise FormatError(f"{self.name(self.ranks[0])}: partition_count is {shown(count)}")
        if len(set(counts)) > 1:
            raise Unsupported(f"{self.folder}: groups over {sorted(set(counts))} ranks (a mixture of experts)")
        self._complete("optimizer", ranks, counts[0])
        if self.model.get("dp_world_size", counts[0]) != counts[0]:
            raise FormatError(
                f"{self.folder}: files of different saves: the model was saved by {self.model['dp_world_size']} "
                f"data-parallel ranks, the optimizer by {counts[0]}"
            )
        stage3 = "fp32_flat_groups" in self.optimizer(self.ranks[0])
        if stage3 != self.partitioned:
            raise FormatError(
                f"{self.folder}: files of different saves: the model is {'' if self.partitioned else 'not '}one of "
                f"stage 3, the optimizer is{'' if stage3 else ' not'}"
            )
        self._same("zero_stage", self.ranks, lambda file: self.optimizer(file).get("zero_stage"))
        self._same("ds_version", [self.models[0], *self.ranks], lambda file: self.trees[file].get("ds_version"))
        self._same("the optimizer's step", self.ranks, self._steps)

    def _complete(self, what: str, ranks: list[int], count: int) -> None:
        if missing := sorted(set(range(count)) - set(ranks)):
            raise NotACheckpoint(
                f"{self.folder}: the {what} files of data-parallel ranks {missing[:10]} are missing, of {count}: a "
                "save that did not finish, or was copied in part"
            )
        if more := [rank for rank in ranks if rank >= count]:
            raise FormatError(f"{self.folder}: files of different saves: {what} files of ranks {more[:10]}, of {count}")

    def _steps(self, file: int) -> Any:
        states = self.optimizer(file).get("base_optimizer_state", self.optimizer(file).get("optimizer_state_dict"))
        states = states.get("state") if isinstance(states, dict) else None
        if not isinstance(states, dict):
            return None
        return {p: self.number(file, s["step"]) for p, s in states.items() if isinstance(s, dict) and "step" in s}


_FORMS = {"float32": "f", "float64": "d", "int64": "q", "int32": "i"}
