"""Whether the files of a DeepSpeed tag are those of one save, and all of it: one error that says what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.deepspeed_files import TENSOR_PARALLEL
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from distckpt.foreign.deepspeed_files import Stage, TagFiles


def check(files: TagFiles, *, universal: bool = False) -> None:
    """NotACheckpoint for what is missing, FormatError for what is of another save, Unsupported."""
    _check_kind(files)
    for stage in files.stages:
        _check_models(stage)
        if not universal:
            _check_optimizers(stage)
    if universal and (len(files.stages) > 1 or files.experts):
        raise Unsupported(f"{files.folder}: what ds_to_universal made of a pipeline or of experts: read its source")
    first = [stage.first for stage in files.stages]
    for name in ("global_steps", "dp_world_size", "mp_world_size", "ds_version"):
        _same(files, name, first, lambda file, name=name: files.trees[file].get(name))  # type: ignore[misc]
    _check_last_steps(files)
    _check_experts(files)


def _check_kind(files: TagFiles) -> None:
    """What the model files say the tag is of, beside the files that are there."""
    model = files.model
    degrees = model.get("checkpoint_parallel_dimensions")
    weights = model.get("module")
    if isinstance(degrees, dict) and degrees.get("tp_degree", 1) not in {1, None}:
        raise Unsupported(f"{files.folder}: {TENSOR_PARALLEL}")
    if len(files.stages) > 1 and weights is not None:
        raise Unsupported(f"{files.folder}: {TENSOR_PARALLEL}")
    if weights is None and not files.layers:
        raise NotACheckpoint(
            f"{files.folder}: all its layer_*-model_states.pt are missing: a save of a pipeline that did not finish"
        )
    if files.layers:
        count = model.get("mp_world_size")
        _complete(files, "the model files of pipeline stages", [s.number for s in files.stages], count)
        if files.experts or weights is not None:
            raise Unsupported(f"{files.folder}: experts in a pipeline: load it with DeepSpeed itself")


def _check_models(stage: Stage) -> None:
    files, indices = stage.files, [*stage.models.values()]
    for name in ("global_steps", "dp_world_size", "ds_version", "param_shapes", "frozen_param_shapes"):
        _same(files, name, indices, lambda file, name=name: files.trees[file].get(name))  # type: ignore[misc]
    if files.partitioned:
        _complete(files, "the model files of data-parallel ranks", stage.models, stage.model.get("dp_world_size"))


def _check_optimizers(stage: Stage) -> None:
    files, ranks = stage.files, [*stage.ranks.values()]
    of = f" of pipeline stage {stage.number}" if len(files.stages) > 1 else ""
    if not ranks:
        if stage.model.get("param_shapes"):
            raise NotACheckpoint(
                f"{files.folder}: all its *_optim_states.pt{of} are missing: a save that did not finish"
            )
        return
    counts = partition_counts(stage)
    said = stage.model.get("dp_world_size")
    count = said if files.experts and type(said) is int else max(counts)
    _complete(files, f"the optimizer files of data-parallel ranks{of}", stage.ranks, count)
    if said not in {None, count}:
        raise FormatError(
            f"{files.folder}: files of different saves: the model was saved by {said} data-parallel ranks, the "
            f"optimizer by {count}"
        )
    if {*counts} != {count} and (not files.experts or any(count % n for n in counts)):
        raise FormatError(f"{files.folder}: groups over {sorted(set(counts))} ranks, in a tag without experts")
    stage3 = "fp32_flat_groups" in files.optimizer(ranks[0])
    if stage3 != files.partitioned:
        raise FormatError(
            f"{files.folder}: files of different saves: the model is {'' if files.partitioned else 'not '}one of "
            f"stage 3, the optimizer is{'' if stage3 else ' not'}"
        )
    _same(files, "zero_stage", ranks, lambda file: files.optimizer(file).get("zero_stage"))
    _same(files, "ds_version", [stage.first, *ranks], lambda file: files.trees[file].get("ds_version"))
    _same(files, "the optimizer's step", ranks, lambda file: _steps(files, file, files.optimizer(file)))


def partition_counts(stage: Stage) -> list[int]:
    """Over how many ranks each group of the optimizer is shared out; one number for all, under ZeRO-3. FormatError."""
    files, ranks = stage.files, [*stage.ranks.values()]
    count = _same(files, "partition_count", ranks, lambda file: files.optimizer(file).get("partition_count"))
    counts = count if isinstance(count, list) else [count]
    if not counts or not all(type(n) is int and n > 0 for n in counts):
        raise FormatError(f"{files.name(ranks[0])}: partition_count is {shown(count)}")
    return counts


def _check_experts(files: TagFiles) -> None:
    """Every expert of every layer, and no file of more."""
    model = files.model
    if not files.experts and "ds_autoep_layers" not in model:
        return
    if model.get("ds_autoep_layers"):
        raise Unsupported(f"{files.folder}: MoE layers that DeepSpeed put in (AutoEP): use deepspeed.moe.layer.MoE")
    counts = model.get("num_experts")
    if not isinstance(counts, list) or not all(type(n) is int and n > 0 for n in counts):
        raise FormatError(f"{files.name(files.stages[0].first)}: num_experts is {shown(counts)}, beside experts' files")
    if files.partitioned:
        raise Unsupported(f"{files.folder}: experts under ZeRO-3: load it with DeepSpeed itself")
    wanted = {(layer, expert) for layer, count in enumerate(counts) for expert in range(count)}
    names = [
        f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
        for layer, expert in sorted(wanted - files.experts.keys())
    ]
    if names:
        raise NotACheckpoint(
            f"{files.folder}: {', '.join(names[:10])} are missing ({len(names)} of {len(wanted)} experts): a "
            "save that did not finish, or was copied in part"
        )
    if more := sorted(files.experts.keys() - wanted):
        raise FormatError(
            f"{files.folder}: files of different saves: of {counts} experts, it has (layer, number) {more}"
        )
    saved = model.get("optimizer")
    if isinstance(saved, dict):
        groups = saved.get("optimizer_state_dict", saved).get("param_groups", [])
        count = max((ep_size(group) for group in groups), default=1)
        _complete(files, "the optimizer files of expert-parallel ranks (expp_rank_*)", files.of_experts, count)


def _check_last_steps(files: TagFiles) -> None:
    """FormatError where a stage, or an expert-parallel rank, has made other steps than another."""
    saved = {f: files.optimizer(f) for stage in files.stages for f in [*stage.ranks.values()][:1]}
    saved |= {f: files.dict_of(files.trees[f], "optimizer", f) for f in files.of_experts.values()}
    steps = {f: max(found.values()) for f, content in saved.items() if (found := _steps(files, f, content))}
    _same(files, "the optimizer's last step", [*steps], steps.__getitem__)


def ep_size(group: Mapping[str, Any]) -> int:
    """Expert-parallel ranks of a group of an optimizer: of one of experts, its name says it."""
    number = str(group.get("name")).removeprefix("ep_size_")
    return int(number) if group.get("moe") and number.isdigit() else 1


def _complete(files: TagFiles, what: str, found: Iterable[int], count: Any) -> None:
    if type(count) is not int:
        return
    if missing := sorted(set(range(count)) - set(found)):
        raise NotACheckpoint(
            f"{files.folder}: {what} {missing[:10]} are missing, of {count}: a save that did not finish, or was copied "
            "in part"
        )
    if more := [rank for rank in found if rank >= count]:
        raise FormatError(f"{files.folder}: files of different saves: {what} {more[:10]}, of {count}")


def _same(files: TagFiles, what: str, indices: list[int], told: Callable[[int], Any]) -> Any:
    """What every file says. FormatError, with two that differ."""
    values = [told(file) for file in indices]
    for file, value in zip(indices, values, strict=True):
        if value != values[0]:
            raise FormatError(
                f"{files.folder}: files of different saves: {what} is {shown(values[0])} in "
                f"{files.sources[indices[0]].name}, {shown(value)} in {files.sources[file].name}"
            )
    return values[0] if values else None


def _steps(files: TagFiles, file: int, content: Mapping[str, Any]) -> Any:
    states = content.get("base_optimizer_state", content.get("optimizer_state_dict", content))
    states = states.get("state") if isinstance(states, dict) else None
    if not isinstance(states, dict):
        return None
    return {p: files.number(file, s["step"]) for p, s in states.items() if isinstance(s, dict) and "step" in s}
