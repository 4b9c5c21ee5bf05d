"""A DeepSpeed tag, described: ZeRO 0 to 3 and BF16_Optimizer, without DeepSpeed.

The optimizer files hold flat buffers without names; the model file says in which order which parameters lie in them. So
each parameter is a list of flat runs, one a data-parallel rank:

    stages 1, 2, BF16_Optimizer    per group, parameters one after another, cut evenly: rank r has [r P, (r + 1) P)
    stage 3                        each parameter alone, ceil(n / ranks) elements a rank, its groups one after another
    stage 0                        whole tensors; the optimizer names them by position

What a parameter is in the checkpoint is its fp32 master. Frozen ones and buffers are as the model has them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.described import Chunk, Directory, Tensor, whole
from distckpt.foreign.files import PlainFile, inside, read_bytes
from distckpt.foreign.located import Located
from distckpt.foreign.torchfile import LEGACY, parse, refuse_legacy
from distckpt.format.box import Run, Shape
from distckpt.format.dtype import item_size
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LATEST = "latest"
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_([0-9]+)_mp_rank_([0-9]+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_([0-9]+)_)?mp_rank_([0-9]+)_model_states\.pt")
_OTHERS = {
    re.compile(r"layer_[0-9]+-model_.*states\.pt"): "a pipeline module",
    re.compile(r"layer_.*expert_.*states\.pt"): "a mixture of experts",
}
_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "data_sampler",
    "random_ltd",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "universal_checkpoint_info",
    "sparse_tensor_module_names",
}
"""Entries of a model file that are no values of the training state."""
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def is_deepspeed(folder: Path) -> bool:
    """Whether a directory is a tag, or one that has a `latest` which names one."""
    return (folder / LATEST).is_file() or any(_MODEL.fullmatch(p.name) for p in folder.iterdir())


def read_deepspeed(folder: Path) -> Directory:
    """Describe a tag, or the one that `latest` names. NotACheckpoint, FormatError, Corrupt, Unsupported."""
    if (folder / LATEST).is_file():
        file = PlainFile(folder / LATEST)
        tag = read_bytes(file, 0, min(file.size, 4096)).decode(errors="replace").strip()
        folder = inside(folder, tag, f"{folder / LATEST}")
        if not folder.is_dir():
            raise NotACheckpoint(f"{folder}: does not exist, though {file.name} names it")
    return _Tag(folder).describe()


class _Tag:
    """The files of a tag, parsed. `_ranks`: the optimizer files' contents, by data-parallel rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sources: list[PlainFile] = []
        self._trees: list[Any] = []
        names = sorted(p.name for p in folder.iterdir())
        for pattern, what in _OTHERS.items():
            if found := next((n for n in names if pattern.fullmatch(n)), None):
                raise Unsupported(
                    f"{folder / found}: a tag of {what} cannot be read yet; load it with DeepSpeed itself"
                )
        models = {(int(m[2]), int(m[1] or 0)): n for n in names if (m := _MODEL.fullmatch(n))}
        optimizers = {(int(m[2]), int(m[1])): n for n in names if (m := _OPTIMIZER.fullmatch(n))}
        if not models:
            raise NotACheckpoint(f"{folder}: has no *_model_states.pt: a save that did not finish")
        if len({mp for mp, _ in models}) > 1:
            raise Unsupported(f"{folder}: of {len(models)} model-parallel ranks, whose parts carry no common names")
        self._models = [self._open(models[key]) for key in sorted(models)]
        self._ranks = [self._open(optimizers[key]) for key in sorted(optimizers)]
        self._check_complete([dp for _, dp in sorted(models)], [dp for _, dp in sorted(optimizers)])

    def _open(self, name: str) -> int:
        """Index of a file that has been parsed. Corrupt where it is damaged."""
        file = PlainFile(self._folder / name)
        if read_bytes(file, 0, min(file.size, 2)).startswith(LEGACY):
            refuse_legacy(file)
        try:
            tree = parse(file, 0, file.size, file.name)
        except FormatError as e:
            raise Corrupt(f"{file.name}: {e}: a save of this rank that did not finish") from e
        if not isinstance(tree, dict):
            raise FormatError(f"{file.name}: holds a {type(tree).__name__}, not what DeepSpeed saves")
        self._sources.append(file)
        self._trees.append(tree)
        return len(self._sources) - 1

    def _optimizer(self, file: int) -> dict[str, Any]:
        return self._dict(self._trees[file], "optimizer_state_dict", file)

    def _dict(self, tree: Mapping[str, Any], name: str, file: int) -> dict[str, Any]:
        found = tree.get(name)
        if not isinstance(found, dict):
            raise FormatError(f"{self._sources[file].name}: {name} is {shown(found)}, not what DeepSpeed saves")
        return found

    def _check_complete(self, models: list[int], ranks: list[int]) -> None:
        """NotACheckpoint unless every rank's file is there; FormatError where they are of different saves."""
        if not ranks:
            return
        counts = []
        for file in self._ranks:
            count = self._optimizer(file).get("partition_count")
            counts.append(tuple(count) if isinstance(count, list) else (count,))
        if len(set(counts)) > 1 or not all(type(n) is int for n in counts[0]):
            raise FormatError(
                f"{self._folder}: its optimizer files are of different saves: partition counts {counts[:8]}"
            )
        count = max(counts[0])
        if min(counts[0]) != count:
            raise Unsupported(f"{self._folder}: groups over {sorted(set(counts[0]))} ranks (a mixture of experts)")
        if missing := sorted(set(range(count)) - set(ranks)):
            raise NotACheckpoint(
                f"{self._folder}: the optimizer files of data-parallel ranks {missing[:10]} are missing"
            )
        if len(models) > 1 and (missing := sorted(set(range(count)) - set(models))):
            raise NotACheckpoint(f"{self._folder}: the model files of data-parallel ranks {missing[:10]} are missing")

    # -- the state dict --------------------------------------------------------------------------------------------

    def describe(self) -> Directory:
        """Directory with the nested state dict of the tag."""
        first = self._trees[self._models[0]]
        tree: dict[str, Any] = {k: v for k, v in first.items() if k not in _OWN and k not in COUNTERS and v is not None}
        tree["deepspeed"] = {name: first[name] for name in COUNTERS if name in first}
        if not self._ranks:
            tree["model"], optimizer = self._module(set()), self._unsharded_optimizer(first)
        else:
            stage3 = "fp32_flat_groups" in self._optimizer(self._ranks[0])
            parameters = list(self._stage3() if stage3 else self._flat_groups())
            trained = {name for names, _ in parameters for name in names}
            tree["model"] = {n: t for _, states in parameters for n, t in states.pop("", {}).items()}
            tree["model"] |= self._frozen() if len(self._models) > 1 else {}
            tree["model"] |= self._module(trained | tree["model"].keys(), partitioned=stage3)
            optimizer = self._sharded_optimizer(parameters, stage3=stage3)
        for alias, fqn in (first.get("shared_params") or {}).items():
            if fqn in tree["model"]:
                tree["model"][alias] = tree["model"][fqn]
        if optimizer:
            tree["optim"] = optimizer
        step = first.get("global_steps", 0)
        return Directory(str(self._folder), tree, self._sources, step=step if type(step) is int and step >= 0 else 0)

    def _module(self, known: set[str], *, partitioned: bool = False) -> dict[str, Tensor]:
        """Entries of the model's own state dict that are not known yet; of a partitioned one, buffers alone."""
        file = self._models[0]
        first = self._trees[file]
        buffers = set(first.get("buffer_names") or ())
        tied = first.get("shared_params") or {}
        return {
            name: whole(file, tensor)
            for name, tensor in self._dict(first, "module", file).items()
            if isinstance(tensor, Located)
            and name not in known
            and name not in tied
            and (name in buffers or not partitioned)
        }

    def _shapes(self) -> list[dict[str, Shape]]:
        """Shapes by name, of each group (or sub-group) in the order of its flat buffer."""
        file = self._models[0]
        found = self._trees[file].get("param_shapes")
        if not isinstance(found, list) or not all(isinstance(group, dict) for group in found):
            raise FormatError(
                f"{self._sources[file].name}: param_shapes is {shown(found)}: which parameters the flat "
                "buffers hold is not said"
            )
        return [{name: tuple(shape) for name, shape in group.items()} for group in found]

    def _part(self, file: int, flat: Any, run: Run, start: int, what: str) -> Chunk:
        """Chunk that is elements [start, start + n) of a flat buffer."""
        if not isinstance(flat, Located) or len(flat.shape) != 1 or start + run.numel > flat.shape[0]:
            raise FormatError(f"{self._sources[file].name}: {what}: {shown(flat)} does not hold {run} at {start}")
        at = flat.start + start * item_size(flat.dtype)
        found = replace(flat, shape=(run.numel,), start=at)
        return Chunk(file, run, at, lambda: found)

    def _flat_groups(self) -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
        """(parameters, state -> parameter -> tensor) of each group of stages 1 and 2; state "" is the master."""
        for g, shapes in enumerate(self._shapes()):
            chunks: dict[tuple[str, str], list[Chunk]] = {}
            dtypes: dict[str, str] = {}
            for rank, file in enumerate(self._ranks):
                content = self._optimizer(file)
                flats = self._flat_states(content, g, file)
                lean = flats[""].shape[0]
                padded = lean + (content["group_paddings"][g] if "zero_stage" in content else 0)
                gaps = (content.get("param_alignment_paddings") or [[0] * len(shapes)] * (g + 1))[g]
                low, offset = rank * padded, 0
                for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
                    start, stop = max(offset, low), min(offset + prod(shape), low + padded)
                    if start < stop:
                        run = Run(start - offset, stop - offset)
                        for state, flat in flats.items():
                            part = self._part(file, flat, run, start - low, f"{name} {state}")
                            chunks.setdefault((state, name), []).append(part)
                            dtypes[state] = flat.dtype
                    offset += prod(shape) + gap
            yield [*shapes], _tensors(chunks, dtypes, shapes)

    def _flat_states(self, content: Mapping[str, Any], g: int, file: int) -> dict[str, Located]:
        """Flat buffers of a group: the master as "", and each state that is laid out like it."""
        flats = content.get("single_partition_of_fp32_groups") or content.get("fp32_flat_groups")
        if not isinstance(flats, list) or g >= len(flats) or not isinstance(flats[g], Located):
            raise FormatError(f"{self._sources[file].name}: has no flat fp32 buffer of group {g}: {shown(flats)}")
        master = flats[g]
        lengths = {master.shape[0], master.shape[0] + (content.get("group_paddings") or [0] * (g + 1))[g]}
        states = {
            name: value
            for name, value in self._states(content, g, file).items()
            if isinstance(value, Located) and len(value.shape) == 1 and value.shape[0] in lengths
        }
        return {"": master, **states}

    def _states(self, content: Mapping[str, Any], g: int, file: int) -> dict[str, Any]:
        """States of the flat parameter number `g`, in the order of the groups."""
        base = content.get("base_optimizer_state", content.get("optimizer_state_dict"))
        if not isinstance(base, dict):
            raise Unsupported(f"{self._sources[file].name}: an elastic checkpoint cannot be read; save without it")
        ids = [p for group in base["param_groups"] for p in group["params"]]
        found = base["state"].get(ids[g], {}) if g < len(ids) else {}
        return found if isinstance(found, dict) else {}

    def _stage3(self) -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
        """(parameters, state -> parameter -> tensor) of each sub-group of stage 3."""
        for g, shapes in enumerate(self._shapes()):
            chunks: dict[tuple[str, str], list[Chunk]] = {}
            dtypes: dict[str, str] = {}
            for rank, file in enumerate(self._ranks):
                offset = 0
                flats = self._flat_states(self._optimizer(file), g, file)
                for name, shape in shapes.items():
                    run, length = _own_run(prod(shape), len(self._ranks), rank)
                    for state, flat in flats.items() if run.numel else ():
                        part = self._part(file, flat, run, offset, f"{name} {state}")
                        chunks.setdefault((state, name), []).append(part)
                        dtypes[state] = flat.dtype
                    offset += length
            yield [*shapes], _tensors(chunks, dtypes, shapes)

    def _frozen(self) -> dict[str, Tensor]:
        """Frozen parameters of stage 3, a fragment in each rank's model file."""
        chunks: dict[tuple[str, str], list[Chunk]] = {}
        shapes = {n: tuple(s) for n, s in (self._trees[self._models[0]].get("frozen_param_shapes") or {}).items()}
        dtype = {}
        for rank, file in enumerate(self._models):
            fragments = self._trees[file].get("frozen_param_fragments") or {}
            for name, shape in shapes.items():
                run, _ = _own_run(prod(shape), len(self._models), rank)
                if run.numel:
                    part = self._part(file, fragments.get(name), run, 0, name)
                    chunks.setdefault((name, name), []).append(part)
                    dtype[name] = fragments[name].dtype
        found = _tensors(chunks, dtype, shapes)
        return {name: found[name][name] for name in shapes if name in found}

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def _sharded_optimizer(self, parameters: list[tuple[list[str], dict[str, dict[str, Any]]]], *, stage3: bool) -> Any:
        """State dict of the optimizer, its parameters named."""
        file = self._ranks[0]
        base = self._optimizer(file)["optimizer_state_dict" if stage3 else "base_optimizer_state"]
        ids = [p for group in base["param_groups"] for p in group["params"]]
        names = {p: fqns for p, (fqns, _) in zip(ids, parameters, strict=True)}
        state: dict[str, dict[str, Any]] = {}
        for g, (fqns, states) in enumerate(parameters):
            for fqn in fqns:
                for name, tensors in states.items():
                    state.setdefault(fqn, {})[name] = tensors[fqn]
                for name, value in self._states(self._optimizer(file), g, file).items():
                    if name not in states:
                        state.setdefault(fqn, {})[name] = whole(file, value) if isinstance(value, Located) else value
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            | {"params": [f for p in group["params"] for f in names[p]]}
            for group in base["param_groups"]
        ]
        return {"state": state, "param_groups": groups}

    def _unsharded_optimizer(self, first: Mapping[str, Any]) -> Any:
        """State dict of a stage 0 optimizer: its parameters are named by position, so a live one must name them."""
        found = first.get("optimizer")
        if isinstance(found, dict) and "optimizer_state_dict" in found:
            found = found["optimizer_state_dict"]
        if not isinstance(found, dict) or found.keys() != {"state", "param_groups"}:
            return None
        file = self._models[0]
        state = {
            p: {k: whole(file, v) if isinstance(v, Located) else v for k, v in members.items()}
            for p, members in found["state"].items()
        }
        return {"state": state, "param_groups": found["param_groups"]}


def _own_run(numel: int, ranks: int, rank: int) -> tuple[Run, int]:
    """(elements that a rank has of a parameter partitioned alone, elements of its padded part)."""
    length = -(-numel // ranks)
    start = min(rank * length, numel)
    return Run(start, min(start + length, numel)), length


def _tensors(
    chunks: Mapping[tuple[str, str], list[Chunk]], dtypes: Mapping[str, str], shapes: Mapping[str, Shape]
) -> dict[str, dict[str, Any]]:
    """Tensors by state and parameter."""
    found: dict[str, dict[str, Any]] = {}
    for (state, name), parts in chunks.items():
        found.setdefault(state, {})[name] = Tensor(dtypes[state], shapes[name], tuple(parts))
    return found
