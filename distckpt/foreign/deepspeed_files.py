"""The files of a DeepSpeed tag, parsed, by what they are of: see deepspeed_checks for what must be there.

mp_rank_MM_model_states.pt                  stages 0 to 2: the model, and in what order its parameters lie where
zero_pp_rank_D_mp_rank_00_model_states.pt   stage 3: the same, of data-parallel rank D
zero_pp_rank_D_mp_rank_MM_optim_states.pt   flat buffers of data-parallel rank D ("pp" notwithstanding)

of a pipeline, MM is its stage, and the model file has no weights:
layer_NN-model_states.pt                    a layer by its place in the whole pipeline

of a mixture of experts (deepspeed.moe.layer.MoE):
layer_L_expert_E_mp_rank_00_model_states.pt expert E of the L-th such layer; the model file has the rest
expp_rank_E_mp_rank_00_optim_states.pt      stage 0: the optimizer of expert-parallel rank E
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.files import PlainFile, read_bytes
from distckpt.foreign.legacyfile import parse_any
from distckpt.foreign.located import Located
from distckpt.foreign.pickles import DEEPSPEED
from distckpt.foreign.torchfile import ZIP
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_LAYER = re.compile(r"layer_([0-9]+)(?:-model_([0-9]+))?-model_states\.pt")
_EXPERT = re.compile(r"layer_([0-9]+)_expert_([0-9]+)_mp_rank_([0-9]+)_model_states\.pt")
_OF_EXPERTS = re.compile(r"expp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_OLD_EXPERT = re.compile(r"expert_[0-9]+_mp_rank_[0-9]+_model_states\.pt")


@dataclass(frozen=True, slots=True)
class Stage:
    """Files of one stage of a pipeline, or of all there is: `models` and `ranks` are data-parallel rank -> index."""

    files: TagFiles
    number: int
    models: dict[int, int]
    ranks: dict[int, int]

    @property
    def first(self) -> int:
        """Index of the first model file."""
        return next(iter(self.models.values()))

    @property
    def model(self) -> dict[Any, Any]:
        """What the first model file holds."""
        return self.files.trees[self.first]

    @property
    def optimizers(self) -> list[dict[str, Any]]:
        """What the optimizer files hold, by rank."""
        return [self.files.optimizer(file) for file in self.ranks.values()]


class TagFiles:
    """Files by index: `sources`, and what each holds in `trees`.

    stages: of a pipeline; else one. layers: of a pipeline, number -> file. experts: (layer, expert) -> file.
    of_experts: expert-parallel rank -> file of its optimizer.
    """

    def __init__(self, folder: Path, *, universal: bool = False) -> None:
        self.folder = folder
        self.sources: list[PlainFile] = []
        self.trees: list[dict[Any, Any]] = []
        self.homes: list[int] = []
        self.has_sums = True
        names = sorted(p.name for p in folder.iterdir())
        models = _numbered(names, MODEL)
        optimizers = {} if universal else _numbered(names, _OPTIMIZER)
        if not models:
            raise NotACheckpoint(f"{folder}: has no *_model_states.pt: a save that did not finish")
        self._refuse(names)
        self.partitioned = any(m[1] for n in names if (m := MODEL.fullmatch(n)))
        """Whether the model itself is shared out over the ranks (stage 3)."""
        width = 1 + max(dp for _, dp in (*models, *optimizers))
        self.stages = [
            Stage(self, mp, *(self._of_stage(kind, mp, width) for kind in (models, optimizers)))
            for mp in sorted({mp for mp, _ in models})
        ]
        self.layers = {number: self.open(n) for (_, number), n in sorted(_numbered(names, _LAYER, (2, 1)).items())}
        self.experts = {key: self.open(n) for key, n in sorted(_numbered(names, _EXPERT, (1, 2)).items())}
        self.of_experts = {rank: self.open(n) for (_, rank), n in sorted(_numbered(names, _OF_EXPERTS).items())}
        self.model = self.stages[0].model

    def _of_stage(self, found: Mapping[tuple[int, int], str], stage: int, width: int) -> dict[int, int]:
        return {dp: self.open(found[mp, dp], mp * width + dp) for mp, dp in sorted(found) if mp == stage}

    def _refuse(self, names: Sequence[str]) -> None:
        """Unsupported for what parts under one name, or other names, stand for."""
        for pattern, part in ((_LAYER, 2), (_EXPERT, 3), (_OF_EXPERTS, 2)):
            found = [n for n in names if (m := pattern.fullmatch(n)) and int(m[part] or 0)]
            if sliced := next(iter(found), None):
                raise Unsupported(f"{self.folder / sliced}: {TENSOR_PARALLEL}")
        if old := next((n for n in names if _OLD_EXPERT.fullmatch(n)), None):
            raise Unsupported(
                f"{self.folder / old}: experts as DeepSpeed saved them before it counted their layers: load them with "
                "DeepSpeed itself, and save again"
            )

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

    def tensors(self, file: int, tree: Any) -> Iterator[tuple[str, Located]]:
        """Tensors by name of a module's state dict. FormatError for anything else."""
        if not isinstance(tree, dict):
            raise FormatError(f"{self.name(file)}: its module is {shown(tree)}, not what DeepSpeed saves")
        return ((str(name), value) for name, value in tree.items() if isinstance(value, Located))


def _numbered(
    names: Sequence[str], pattern: re.Pattern[str], parts: tuple[int, int] = (2, 1)
) -> dict[tuple[int, int], str]:
    """Names that match, by two of the numbers in them."""
    first, second = parts
    return {(int(m[first] or 0), int(m[second] or 0)): n for n in names if (m := pattern.fullmatch(n))}


TENSOR_PARALLEL = (
    "a tag of tensor parallelism, whose ranks hold different parts of a tensor under one name: convert it with "
    "DeepSpeed's ds_to_universal, and read that"
)
_FORMS = {"float32": "f", "float64": "d", "int64": "q", "int32": "i"}
