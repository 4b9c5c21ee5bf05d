"""Parameter groups of a tag, named: what the flat buffers of its ranks hold, or whole tensors, or universal files.

Every way to find them gives the same: for each flat buffer of the optimizer, its parameters' masters and states.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, NotACheckpoint, Unsupported
from distckpt.foreign.deepspeed_layout import apart, period_of, piece_of, together
from distckpt.foreign.described import Chunk, Tensor, whole
from distckpt.foreign.files import inside
from distckpt.foreign.located import Located
from distckpt.format.dtype import item_size
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from distckpt.foreign.deepspeed_files import TagFiles
    from distckpt.foreign.deepspeed_layout import Piece
    from distckpt.format.box import Shape

MASTER = ""


@dataclass(slots=True)
class Members:
    """Parameters of one flat buffer: their tensors, state -> name -> tensor, and states that are one for them all."""

    shapes: dict[str, Shape]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def shapes_of(files: TagFiles) -> list[dict[str, Shape]]:
    """Shapes by name, of each flat buffer in its order."""
    found = files.model.get("param_shapes")
    if not isinstance(found, list) or not all(isinstance(group, dict) for group in found):
        raise FormatError(
            f"{files.name(files.models[0])}: param_shapes is {shown(found)}: which parameters the flat buffers hold is "
            "not said"
        )
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in found]


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


def sharded(files: TagFiles) -> Iterator[Members]:
    """Members of each flat buffer, cut over the ranks."""
    shapes = shapes_of(files)
    first = files.optimizer(files.ranks[0])
    apart_each = "fp32_flat_groups" in first
    flats = first.get("fp32_flat_groups" if apart_each else "single_partition_of_fp32_groups")
    if not isinstance(flats, list) or len(flats) != len(shapes):
        raise FormatError(
            f"{files.folder}: files of different saves: the model has {len(shapes)} groups, the optimizer's fp32 "
            f"buffers are {shown(flats)}"
        )
    for number, group in enumerate(shapes):
        numels = {name: prod(shape) for name, shape in group.items()}
        buffers = [_buffers(files, file, number) for file in files.ranks]
        if apart_each:
            length = sum(piece_of(n, len(buffers)) for n in numels.values())
            _check_lengths(files, number, [length] * len(buffers), buffers)
            pieces = apart(numels, len(buffers))
        else:
            gaps = (first.get("param_alignment_paddings") or [[0] * len(group)] * len(shapes))[number]
            period = _period(files, number, sum(numels.values()) + sum(gaps), buffers)
            pieces = together(numels, gaps, period)
        yield _members(files, number, group, pieces, buffers)


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


def _period(files: TagFiles, number: int, total: int, buffers: list[dict[str, Located]]) -> int:
    """Elements that each rank has of a group. FormatError unless the buffers are cut that way."""
    found = [flats[MASTER].shape[0] for flats in buffers]
    content = files.optimizer(files.ranks[0])
    if "zero_stage" not in content:  # BF16_Optimizer keeps the padding
        _check_lengths(files, number, [period_of(total, len(found))] * len(found), buffers)
        return found[0]
    period = found[0] + content["group_paddings"][number]
    lean = [max(0, min(period, total - rank * period)) for rank in range(len(found))]
    _check_lengths(files, number, lean if period * len(found) >= total else [-1] * len(found), buffers)
    return int(period)


def _check_lengths(files: TagFiles, number: int, wanted: list[int], buffers: list[dict[str, Located]]) -> None:
    """FormatError unless the flat buffers are as long as the model says."""
    found = [flats[MASTER].shape[0] for flats in buffers]
    if found != wanted:
        raise FormatError(
            f"{files.folder}: files of different saves: the parameters of group {number}, of the shapes that "
            f"{files.name(files.models[0])} says, do not fill flat buffers of {shown(found)} elements"
        )


def _members(
    files: TagFiles, number: int, shapes: dict[str, Shape], pieces: Iterable[Piece], buffers: list[dict[str, Located]]
) -> Members:
    chunks: dict[str, dict[str, list[Chunk]]] = {state: {n: [] for n in shapes} for state in buffers[0]}
    for piece in pieces:
        flats = buffers[piece.rank]
        if flats.keys() != buffers[0].keys():
            raise FormatError(
                f"{files.folder}: files of different saves: the optimizer of rank 0 has the states "
                f"{sorted(buffers[0])}, that of rank {piece.rank} {sorted(flats)}"
            )
        for state, flat in flats.items():
            chunks[state][piece.name].append(chunk(files.ranks[piece.rank], flat, piece))
    made = Members(shapes)
    for state, of_state in chunks.items():
        dtype = buffers[0][state].dtype
        made.tensors[state] = {n: Tensor(dtype, shapes[n], tuple(c)) for n, c in of_state.items()}
    first = files.ranks[0]
    for name, value in states_of(files.optimizer(first), number, files.name(first)).items():
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
    found = [Members(shapes) for shapes in shapes_of(files)]
    for number, made in enumerate(found):
        for name in made.shapes:
            for path in sorted(inside(folder, name, files.name(files.models[0])).glob("*.pt")):
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


# -- whole tensors, without names --------------------------------------------------------------------------------


def by_position(files: TagFiles, saved: Mapping[str, Any], order: list[list[str]]) -> list[Members] | str:
    """Members of each group of a stage 0 tag of 16-bit weights, or why this order does not fit it."""
    file = files.models[0]
    model = files.dict_of(files.model, "module", file)
    masters = saved.get("fp32_groups", saved.get("fp32_groups_flat"))
    if not isinstance(masters, list) or len(masters) != len(order):
        return f"it has {len(masters) if isinstance(masters, list) else 'no'} groups, the optimizer has {len(order)}"
    found = []
    for number, (names, group) in enumerate(zip(order, masters, strict=True)):
        if missing := [n for n in names if not isinstance(model.get(n), Located)]:
            return f"it has no {missing[0]}"
        shapes = {name: model[name].shape for name in names}
        made = Members(shapes)
        if isinstance(group, Located):
            why = _from_flat(made, file, group, states_of(saved, number, files.name(file)))
        else:
            ids = saved["optimizer_state_dict"]["param_groups"][number]["params"]
            why = _from_whole(made, file, group, [saved["optimizer_state_dict"]["state"].get(p, {}) for p in ids])
        if why:
            return f"group {number}: {why}"
        found.append(made)
    return found


def _from_flat(made: Members, file: int, flat: Located, states: Mapping[str, Any]) -> str:
    """FP16_Optimizer: one flat buffer a group."""
    numels = {name: prod(shape) for name, shape in made.shapes.items()}
    total = sum(numels.values())
    if flat.shape != (total,):
        return f"its buffer has shape {flat.shape}, the parameters {total} elements"
    for state, value in {MASTER: flat, **states}.items():
        if isinstance(value, Located) and value.shape == flat.shape:
            pieces = together(numels, [0] * len(numels), max(1, total))
            made.tensors[state] = {
                p.name: Tensor(value.dtype, made.shapes[p.name], (chunk(file, value, p),)) for p in pieces
            }
        else:
            made.values[state] = whole(file, value) if isinstance(value, Located) else value
    return ""


def _from_whole(made: Members, file: int, masters: list[Any], states: list[dict[str, Any]]) -> str:
    """FP16_UnfusedOptimizer: a tensor for each parameter."""
    if [getattr(m, "shape", None) for m in masters] != [*made.shapes.values()] or len(states) != len(masters):
        return f"shapes {shown([getattr(m, 'shape', None) for m in masters])}, not {shown([*made.shapes.values()])}"
    for name, master, state in zip(made.shapes, masters, states, strict=True):
        for key, value in {MASTER: master, **state}.items():
            if isinstance(value, Located):
                made.tensors.setdefault(key, {})[name] = whole(file, value)
            else:
                made.values[key] = value
    return ""
