"""Parameter groups of a tag, named: what the flat buffers of its ranks hold, or universal files.

Every way to find them gives the same: for each flat buffer of the optimizer, its parameters' masters and states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.deepspeed_checks import partition_counts
from distckpt.foreign.deepspeed_layout import apart, period_of, piece_of, together
from distckpt.foreign.described import Chunk, Tensor, whole
from distckpt.foreign.files import inside
from distckpt.foreign.located import Located
from distckpt.format.dtype import item_size
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from distckpt.foreign.deepspeed_experts import Experts
    from distckpt.foreign.deepspeed_files import Stage, TagFiles
    from distckpt.foreign.deepspeed_layout import Piece
    from distckpt.format.box import Shape

MASTER = ""


@dataclass(slots=True)
class Members:
    """Parameters of one flat buffer: their tensors, state -> name -> tensor, and states that are one for them all.

    number: of the buffer, in its optimizer. ranks: how many it is cut over.
    """

    number: int
    shapes: dict[str, Shape]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


def shapes_of(stage: Stage, shape_of: Mapping[str, Shape] | None = None) -> list[dict[str, Shape]]:
    """Shapes by name, of each flat buffer in its order.

    shape_of: of the weights that the model's files hold. BF16_Optimizer says no shapes at stage 0, yet each rank's file
    has the names of what it holds.
    """
    found = stage.model.get("param_shapes")
    if found is None and shape_of is not None:
        found = [{n: shape_of[n] for n in names if n in shape_of} for names in held_by_ranks(stage)] or None
    if not isinstance(found, list) or not all(isinstance(group, dict) for group in found):
        raise FormatError(
            f"{stage.files.name(stage.first)}: param_shapes is {shown(found)}: which parameters the flat buffers hold "
            "is not said"
        )
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in found]


def held_by_ranks(stage: Stage) -> list[dict[str, None]]:
    """Names by flat buffer that BF16_Optimizer's files have for their parts. [] for any other: its may be scrambled."""
    found: list[dict[str, None]] = []
    for rank in stage.optimizers:
        mappings = rank.get("param_slice_mappings")
        if not isinstance(mappings, list) or "zero_stage" in rank:
            return []
        found += [{} for _ in mappings[len(found) :]]
        for group, names in zip(found, mappings, strict=True):
            group.update(dict.fromkeys(map(str, names)))
    return found


def base_of(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """State dict of the optimizer over flat buffers. Unsupported for an elastic one."""
    base = content.get("base_optimizer_state", content.get("optimizer_state_dict"))
    if isinstance(base, list):
        raise Unsupported(f"{where}: an elastic checkpoint cannot be read; save with elastic_checkpoint: false")
    if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
        raise FormatError(f"{where}: the optimizer's state is {shown(base)}, not what DeepSpeed saves")
    return base


def states_of(content: Mapping[str, Any], number: int, where: str) -> dict[str, Any]:
    """States of the flat buffer of this number."""
    base = base_of(content, where)
    ids = [p for group in base["param_groups"] for p in group["params"]]
    found = base["state"].get(ids[number], {}) if number < len(ids) else {}
    return found if isinstance(found, dict) else {}


def sharded(stage: Stage, shapes: list[dict[str, Shape]], experts: Experts) -> Iterator[Members]:
    """Members of each flat buffer, cut over the ranks; of one of experts, those of each expert-parallel rank."""
    files, ranks = stage.files, [*stage.ranks.values()]
    first = files.optimizer(ranks[0])
    flats = first.get("fp32_flat_groups", first.get("single_partition_of_fp32_groups"))
    if not isinstance(flats, list) or len(flats) != len(shapes):
        raise FormatError(
            f"{files.folder}: files of different saves: the model has {len(shapes)} groups, the optimizer's fp32 "
            f"buffers are {shown(flats)}"
        )
    counts = partition_counts(stage)
    for number, group in enumerate(shapes):
        count = counts[number] if number < len(counts) else counts[0]
        for part, own in enumerate(experts.shares([*ranks], count)):
            named = {experts.named(name, len(ranks) // count, part): shape for name, shape in group.items()}
            yield _cut(files, _Buffers(number, own, [_buffers(files, f, number) for f in own]), named)


@dataclass(frozen=True, slots=True)
class _Buffers:
    """Flat buffers of a group: in which files, and in each the master and the states that are laid out like it."""

    number: int
    own: list[int]
    flats: list[dict[str, Located]]

    @property
    def lengths(self) -> list[int]:
        """Elements of each rank's master."""
        return [flats[MASTER].shape[0] for flats in self.flats]


def _cut(files: TagFiles, found: _Buffers, shapes: dict[str, Shape]) -> Members:
    """Members of one flat buffer."""
    first = files.optimizer(found.own[0])
    numels = {name: prod(shape) for name, shape in shapes.items()}
    if "fp32_flat_groups" in first:
        length = sum(piece_of(n, len(found.own)) for n in numels.values())
        _check_lengths(files, found, [length] * len(found.own))
        return _members(files, shapes, apart(numels, len(found.own)), found)
    aligned = first.get("param_alignment_paddings")
    gaps = aligned[found.number] if aligned else [0] * len(shapes)
    return _members(
        files, shapes, together(numels, gaps, _period(files, found, sum(numels.values()) + sum(gaps))), found
    )


def _buffers(files: TagFiles, file: int, number: int) -> dict[str, Located]:
    """Flat buffers of a group in a rank's file: the master, and each state that is laid out like it."""
    content = files.optimizer(file)
    flats = content.get("single_partition_of_fp32_groups", content.get("fp32_flat_groups"))
    master = flats[number] if isinstance(flats, list) and number < len(flats) else None
    if not isinstance(master, Located) or len(master.shape) != 1:
        raise FormatError(f"{files.name(file)}: its flat fp32 buffer of group {number} is {shown(master)}")
    lengths = {master.shape[0]}
    if "zero_stage" in content and "group_paddings" in content:
        lengths.add(master.shape[0] + content["group_paddings"][number])
    states = states_of(content, number, files.name(file)).items()
    return {MASTER: master} | {
        name: value
        for name, value in states
        if isinstance(value, Located) and len(value.shape) == 1 and value.shape[0] in lengths
    }


def _period(files: TagFiles, found: _Buffers, total: int) -> int:
    """Elements that each rank has of a group. FormatError unless the buffers are cut that way."""
    count, content = len(found.own), files.optimizer(found.own[0])
    if "zero_stage" not in content:  # BF16_Optimizer keeps the padding
        _check_lengths(files, found, [period_of(total, count)] * count)
        return found.lengths[0]
    period = found.lengths[0] + content["group_paddings"][found.number]
    lean = [max(0, min(period, total - rank * period)) for rank in range(count)]
    _check_lengths(files, found, lean if period * count >= total else [-1] * count)
    return int(period)


def _check_lengths(files: TagFiles, found: _Buffers, wanted: list[int]) -> None:
    """FormatError unless the flat buffers are as long as the model says."""
    if found.lengths != wanted:
        raise FormatError(
            f"{files.folder}: files of different saves: the parameters of group {found.number}, of the shapes that "
            f"the model's file says, do not fill flat buffers of {shown(found.lengths)} elements"
        )


def _members(files: TagFiles, shapes: dict[str, Shape], pieces: Iterable[Piece], found: _Buffers) -> Members:
    states = found.flats[0]
    chunks: dict[str, dict[str, list[Chunk]]] = {state: {n: [] for n in shapes} for state in states}
    for piece in pieces:
        flats = found.flats[piece.rank]
        if flats.keys() != states.keys():
            raise FormatError(
                f"{files.folder}: files of different saves: the optimizer in {files.name(found.own[0])} has the states "
                f"{sorted(states)}, that in {files.name(found.own[piece.rank])} {sorted(flats)}"
            )
        for state, flat in flats.items():
            chunks[state][piece.name].append(chunk(found.own[piece.rank], flat, piece))
    made = Members(found.number, shapes, ranks=len(found.own))
    for state, of_state in chunks.items():
        made.tensors[state] = {n: Tensor(states[state].dtype, shapes[n], tuple(c)) for n, c in of_state.items()}
    first = found.own[0]
    for name, value in states_of(files.optimizer(first), found.number, files.name(first)).items():
        if name not in made.tensors:
            made.values[name] = whole(first, value) if isinstance(value, Located) else value
    return made


def chunk(file: int, flat: Located, piece: Piece) -> Chunk:
    """Chunk that is a piece of a flat buffer. FormatError unless it lies in it."""
    if flat.strides is not None or len(flat.shape) != 1 or piece.start + piece.run.numel > flat.shape[0]:
        raise FormatError(f"{piece.name}: elements {piece.run} are not at {piece.start} of {shown(flat)}")
    at = flat.start + piece.start * item_size(flat.dtype)
    found = replace(flat, shape=(piece.run.numel,), start=at)
    return Chunk(file, piece.run, at, lambda: found)


# -- what ds_to_universal wrote ----------------------------------------------------------------------------------


def universal(files: TagFiles, optimizer: int) -> list[Members]:
    """Members of each group, every tensor in a file of its own: `zero/<name>/fp32.pt`, `exp_avg.pt`, ...

    optimizer: index of `zero/optimizer_state.pt`.
    """
    folder, tree = files.folder / "zero", files.trees[optimizer]
    stage = files.stages[0]
    found = [Members(number, shapes) for number, shapes in enumerate(shapes_of(stage))]
    for number, made in enumerate(found):
        for name in made.shapes:
            for path in sorted(inside(folder, name, files.name(stage.first)).glob("*.pt")):
                _enter(made, files, name, path)
        if "step" not in made.values and "optimizer_state_dict" in tree:
            step = states_of(tree, number, files.name(optimizer)).get("step")
            if step is not None:
                made.values["step"] = whole(optimizer, step) if isinstance(step, Located) else step
    wanted = {MASTER}.union(*(made.tensors for made in found))
    for made in found:
        if short := [n for n in made.shapes if any(n not in made.tensors.get(state, {}) for state in wanted)]:
            names = sorted(state or "fp32" for state in wanted)
            raise NotACheckpoint(f"{folder / short[0]}: lacks some of {names}: a conversion cut short")
    return found


def _enter(made: Members, files: TagFiles, name: str, path: Path) -> None:
    """Enter what one file says of a parameter: its master, a state, or a number."""
    file = files.open(str(path.relative_to(files.folder)))
    tree = files.trees[file]
    value, shape = tree.get("param", tree.get("")), made.shapes[name]
    if not isinstance(value, Located) or path.stem == "step":
        made.values.setdefault(path.stem, whole(file, value) if isinstance(value, Located) else value)
        return
    if value.strides is not None or prod(value.shape) != prod(shape):
        raise FormatError(f"{files.name(file)}: holds {shown(value)}; {name} has shape {shape}")
    of_state = made.tensors.setdefault(MASTER if path.stem == "fp32" else path.stem, {})
    of_state[name] = whole(file, replace(value, shape=shape))
