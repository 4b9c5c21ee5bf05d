"""A checkpoint as a DeepSpeed tag, of any ZeRO stage and number of ranks: what `engine.load_checkpoint` reads.

Groups are those of the checkpoint's optimizer, and within a group parameters lie in its order: the engine that loads
the tag must be made with the same. Flat buffers are streamed, parameter by parameter. `latest` is switched last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported
from distckpt.foreign.deepspeed_layout import Piece, apart_on, period_of, piece_of, round_robin, sub_groups, together
from distckpt.foreign.deepspeed_optim import Group, groups_of
from distckpt.foreign.emit import Call, Global, Instance
from distckpt.foreign.sink import Sink
from distckpt.foreign.torch_zip import TorchFile
from distckpt.format.box import Box, Run
from distckpt.format.dtype import item_size
from distckpt.loading.stream import Stretch
from distckpt.statedict import insert, references

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from distckpt.foreign.sink import Output
    from distckpt.format.box import Shape
    from distckpt.loading.open import Checkpoint

DTYPES = ("float32", "bfloat16", "float16")
_VERSION = "0.19.8"
_NOT_CLIENTS = ("optim", "lr_scheduler", "deepspeed", "environment", "model.extra_state")
_SCALER = {
    "cur_scale": 65536.0,
    "dynamic": True,
    "cur_iter": 0,
    "last_overflow_iter": -1,
    "scale_factor": 2.0,
    "scale_window": 1000,
    "min_scale": 1,
    "delayed_shift": 2,
    "cur_hysteresis": 2,
    "consecutive_hysteresis": False,
    "raise_error_at_min_scale": True,
    "dtype": Global("torch", "float16"),
}
"""DeepSpeed's own defaults, for what a checkpoint does not say."""


@dataclass(frozen=True, slots=True)
class DeepSpeed:
    """A tag for an engine of this ZeRO stage on so many ranks, which must be made the same.

    dtype: of the weights that are computed with; None for that of the tag which is read, else float32. tag: None for
    DeepSpeed's name of the step. round_robin: whether that engine has `round_robin_gradients`, which changes the order
    in the buffers (stages 1, 2). frozen: names of parameters without gradients, where the checkpoint does not tell them
    from buffers (stage 3). sub_group_size: as in the engine's configuration (stage 3).
    """

    stage: int | None = None
    ranks: int | None = None
    dtype: str | None = None
    tag: str | None = None
    round_robin: bool = False
    frozen: tuple[str, ...] = ()
    sub_group_size: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.stage not in range(4) or self.ranks is None or self.ranks < 1:
            raise ValueError(
                f"a tag of ZeRO stage {self.stage} and {self.ranks} ranks: stage (0 to 3) and ranks are those of the "
                "engine that will load it; give both (--zero-stage, --world-size)"
            )
        if self.dtype not in {None, *DTYPES}:
            raise Unsupported(f"dtype {self.dtype!r}: DeepSpeed's weights are {', '.join(DTYPES)}")

    def sink(self, checkpoint: Checkpoint, destination: Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
        """Plan the files of the tag. Unsupported for what ZeRO has no place for, Mismatch for steps that differ."""
        return _Tag(checkpoint, self, room).sink()


class _Tag:
    """One tag, as it is planned."""

    def __init__(self, checkpoint: Checkpoint, wanted: DeepSpeed, room: int) -> None:
        self.checkpoint, self.wanted, self.room = checkpoint, wanted, room
        self.notes: list[str] = []
        said = checkpoint.object("deepspeed") if "deepspeed" in checkpoint.manifest.objects else {}
        engines = said.get("engines") if isinstance(said, dict) else None
        found = engines.get("model") if isinstance(engines, dict) else None
        self.counted: dict[str, Any] = found if isinstance(found, dict) else {}
        self.stage, self.ranks = wanted.stage or 0, wanted.ranks or 1
        self.dtype: str = wanted.dtype or self._said_of("dtype", "float32")
        self.groups = groups_of(checkpoint, self.notes)
        if wanted.round_robin and self.stage in {1, 2}:
            self.groups = [g.ordered(round_robin([*g.shapes], self.ranks)) for g in self.groups]

    def sink(self) -> Sink:
        """All files of the tag."""
        content, wanted = self.checkpoint.manifest, self.wanted
        self.notes += [
            f"{n}: each rank has its own, which a tag has no place for; left out" for n in content.rank_objects
        ]
        self.notes += [f"{n}: cannot be read safely; left out: {w}" for n, w in self.checkpoint.unreadable.items()]
        if not self.groups and self.stage:
            raise Unsupported(
                f"{self.checkpoint.name}: has no optimizer, whose groups say how ZeRO lays weights out: write stage 0, "
                "or safetensors"
            )
        tag = wanted.tag or f"global_step{content.step}"
        try:
            outputs = [*self._outputs(tag)]
        except TypeError as e:
            raise Unsupported(f"{self.checkpoint.name}: a value has no place in a tag: {e}") from e
        return Sink(
            outputs,
            lambda _: [],
            self.notes,
            "inside",
            top=tag,
            pointers=[("latest", tag.encode())],
            dtypes=self._dtypes(),
            order=[[*group.shapes] for group in self.groups],
        )

    def _outputs(self, tag: str) -> Iterator[Output]:
        folder = f"{tag}/"
        low = "bf16_" if self.dtype == "bfloat16" else ""
        for rank in range(self.ranks if self.stage == 3 else 1):
            lead = f"zero_pp_rank_{rank}_" if self.stage == 3 else ""
            file = TorchFile()
            tree = self._model_file(file, rank)
            yield file.output(f"{folder}{lead}mp_rank_00_model_states.pt", tree, self.checkpoint, self.room)
        for rank in range(self.ranks if self.stage else 0):
            file = TorchFile()
            tree = {"optimizer_state_dict": self._flat_file(file, rank)} | self._said()
            name = f"{folder}{low}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            yield file.output(name, tree, self.checkpoint, self.room)

    # -- the model -------------------------------------------------------------------------------------------------

    def _model_file(self, file: TorchFile, rank: int) -> dict[str, Any]:
        content = self.checkpoint.manifest
        tied = {a.partition(".")[2]: f.partition(".")[2] for a, f in content.aliases.items() if a.startswith("model.")}
        module = {name: self._entry(file, name, rank) for name in self._names()}
        module |= {alias: module[fqn] for alias, fqn in tied.items()}
        tree: dict[str, Any] = {
            "module": module,
            "buffer_names": [n for n in self._names() if self._is_buffer(n)],
            "optimizer": self._whole_optimizer(file) if not self.stage and self.groups else None,
            "param_shapes": [_sizes(shapes) for shapes in self._buffers()] if self.stage else None,
            "frozen_param_shapes": None,
            "shared_params": tied if self.stage else None,
            "frozen_param_fragments": None,
            "lr_scheduler": self._value(file, "lr_scheduler") if "lr_scheduler" in content.objects else None,
            "data_sampler": self.counted.get("data_sampler"),
            "random_ltd": self.counted.get("random_ltd"),
            "skipped_steps": self.counted.get("skipped_steps", 0),
            "global_steps": self.counted.get("global_steps", content.step),
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
        } | self._said()
        if "global_samples" in self.counted:
            tree["global_samples"] = self.counted["global_samples"]
        if self.stage == 3:
            still = {n: content.tensors[f"model.{n}"].shape for n in self._names() if self._is_frozen(n)}
            tree["frozen_param_shapes"] = _sizes(still)
            tree["frozen_param_fragments"] = {n: self._fragment(file, n, rank) for n in still}
        clients = [n for n in content.objects if n not in _NOT_CLIENTS]
        for name in clients:
            if name in tree:
                self._note(f"{name}: DeepSpeed has a value of its own under this name; left out")
            else:
                tree[name] = self._value(file, name)
        return tree

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _names(self) -> list[str]:
        """Names of the model's own tensors: those trained first, in the order of their groups."""
        trained = [name for group in self.groups for name in group.shapes]
        inside = {f for n in self.checkpoint.manifest.objects for f in references(self.checkpoint.object(n))}
        return trained + [
            name
            for fqn in self.checkpoint.manifest.tensors
            if fqn.startswith("model.") and fqn not in inside and (name := fqn.removeprefix("model.")) not in {*trained}
        ]

    def _is_trained(self, name: str) -> bool:
        return any(name in group.shapes for group in self.groups)

    def _is_frozen(self, name: str) -> bool:
        if self._is_trained(name):
            return False
        return name in self.wanted.frozen or name in self._said_of("frozen", ())

    def _said_of(self, name: str, default: Any) -> Any:
        """What the tag that is read said of its model."""
        said = self.counted.get("module")
        return said.get(name, default) if isinstance(said, dict) else default

    def _is_buffer(self, name: str) -> bool:
        return not self._is_trained(name) and not self._is_frozen(name)

    def _dtype(self, name: str) -> str:
        """Dtype that a tensor of the model has in `module`."""
        own = self.checkpoint.manifest.tensors[f"model.{name}"].dtype
        return own if self._is_buffer(name) or own not in {*DTYPES, "float64"} else self.dtype

    def _dtypes(self) -> dict[str, str]:
        """What a reader finds each tensor of the model to be."""
        found = {f"model.{n}": self._dtype(n) for n in self._names()}
        if self.stage or self.groups:
            found |= {f"model.{n}": "float32" for group in self.groups for n in group.shapes}
        return found

    def _entry(self, file: TorchFile, name: str, rank: int) -> Any:  # noqa: ARG002
        shape = self.checkpoint.manifest.tensors[f"model.{name}"].shape
        dtype = self._dtype(name)
        if self.stage == 3 and not self._is_buffer(name):
            return file.tensor(dtype, (0,), list)
        return file.tensor(dtype, shape, partial(_whole, f"model.{name}", shape, dtype))

    def _fragment(self, file: TorchFile, name: str, rank: int) -> Any:
        shape, dtype = self.checkpoint.manifest.tensors[f"model.{name}"].shape, self._dtype(name)
        length = piece_of(prod(shape), self.ranks)
        pieces = partial(apart_on, {name: prod(shape)}, self.ranks, rank)
        return file.tensor(dtype, (length,), partial(_flat, pieces, "model.{}", dtype, length))

    def _value(self, file: TorchFile, name: str) -> Any:
        """Value of this name, its tensors in the file."""
        value = self.checkpoint.object(name)
        infos = {fqn: self.checkpoint.manifest.tensors[fqn] for fqn in references(value)}
        made = {f: file.tensor(i.dtype, i.shape, partial(_whole, f, i.shape, i.dtype)) for f, i in infos.items()}
        return insert(value, made)

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def _buffers(self) -> list[dict[str, Shape]]:
        """Parameters of each flat buffer."""
        if self.stage != 3:
            return [group.shapes for group in self.groups]
        found = []
        for group in self.groups:
            numels = {name: prod(shape) for name, shape in group.shapes.items()}
            of_group = sub_groups(numels, self.ranks, self.wanted.sub_group_size)
            found += [{name: group.shapes[name] for name in names} for names in of_group]
        return found

    def _flat_file(self, file: TorchFile, rank: int) -> dict[str, Any]:
        ranks, stage = self.ranks, self.stage
        buffers = self._buffers()
        owners = [next(g for g in self.groups if next(iter(shapes)) in g.shapes) for shapes in buffers]
        lengths, lean = [], []
        for shapes in buffers:
            numels = {name: prod(shape) for name, shape in shapes.items()}
            total = sum(numels.values())
            length = sum(piece_of(n, ranks) for n in numels.values()) if stage == 3 else period_of(total, ranks)
            lengths.append(length)
            lean.append(length if stage == 3 else max(0, min(length, total - rank * length)))
        masters = [
            self._buffer(file, s, rank, name="model.{}", dtype="float32", length=n)
            for s, n in zip(buffers, lean, strict=True)
        ]
        states = {
            i: self._states(file, group, shapes, rank, lengths[i])
            for i, (group, shapes) in enumerate(zip(owners, buffers, strict=True))
        }
        groups, at = [], 0
        for group in self.groups:
            count = owners.count(group)
            groups.append(group.hyper | {"params": [*range(at, at + count)]})
            at += count
        base = {"state": {i: s for i, s in states.items() if s}, "param_groups": groups}
        stage_of = Call(Global("deepspeed.runtime.zero.config", "ZeroStageEnum"), (stage,))
        if stage == 3:
            own = {"optimizer_state_dict": base, "fp32_flat_groups": masters, "partition_count": ranks}
            return {"zero_stage": stage_of, "overflow": False, **self._scaler(always=True), **own}
        return {
            **self._scaler(always=False),
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
            "zero_stage": stage_of,
            "group_paddings": [a - b for a, b in zip(lengths, lean, strict=True)],
            "param_alignment_paddings": [[0] * len(shapes) for shapes in buffers],
            "partition_count": [ranks] * len(buffers),
            "ds_version": self._said()["ds_version"],
        }

    def _buffer(
        self, file: TorchFile, shapes: dict[str, Shape], rank: int, *, name: str, dtype: str, length: int
    ) -> Any:
        """Flat buffer of a rank: `name` is what the tensor of a parameter is called."""
        numels = {n: prod(shape) for n, shape in shapes.items()}
        if self.stage == 3:
            pieces = partial(apart_on, numels, self.ranks, rank)
        else:
            pieces = partial(_together_on, numels, period_of(sum(numels.values()), self.ranks), rank)
        return file.tensor(dtype, (length,), partial(_flat, pieces, name, dtype, length))

    def _states(
        self, file: TorchFile, group: Group, shapes: dict[str, Shape], rank: int, length: int
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for state, dtype in group.flat.items():
            found[state] = self._buffer(file, shapes, rank, name=f"optim.{{}}.{state}", dtype=dtype, length=length)
        for state, (fqn, info) in group.scalars.items():
            found[state] = file.tensor(info.dtype, info.shape, partial(_whole, fqn, info.shape, info.dtype))
        return found | group.values

    def _whole_optimizer(self, file: TorchFile) -> dict[str, Any]:
        """Stage 0: the optimizer as torch has it; over 16-bit weights with its masters, as FP16_UnfusedOptimizer."""
        ids = {name: i for i, name in enumerate(n for group in self.groups for n in group.shapes)}
        state: dict[int, dict[str, Any]] = {}
        for group in self.groups:
            for name in group.shapes:
                tensors = {s: f"optim.{name}.{s}" for s in (*group.flat, *group.scalars)}
                infos = {s: self.checkpoint.manifest.tensors[fqn] for s, fqn in tensors.items()}
                made = {
                    s: file.tensor(i.dtype, i.shape, partial(_whole, tensors[s], i.shape, i.dtype))
                    for s, i in infos.items()
                }
                if of_name := made | group.values:
                    state[ids[name]] = of_name
        groups = [group.hyper | {"params": [ids[n] for n in group.shapes]} for group in self.groups]
        whole = {"state": state, "param_groups": groups}
        if self.dtype == "float32":
            return whole
        masters = [
            [file.tensor("float32", s, partial(_whole, f"model.{n}", s, "float32")) for n, s in group.shapes.items()]
            for group in self.groups
        ]
        scale = self._scale() if self.dtype == "float16" else {"cur_scale": 1.0, "cur_iter": 0}
        names = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
        said = {"dynamic_loss_scale": self.dtype == "float16"} | {n: scale[n] for n in names if n in scale}
        return said | {"optimizer_state_dict": whole, "fp32_groups": masters}

    # -- what the engine counted -----------------------------------------------------------------------------------

    def _scale(self) -> dict[str, Any]:
        saved = self.counted.get("loss_scale")
        if not isinstance(saved, dict):
            self._note("no loss scale was saved: it begins anew, with DeepSpeed's defaults")
        return _SCALER | ({k: v for k, v in saved.items() if k in _SCALER and k != "dtype"} if saved else {})

    def _scaler(self, *, always: bool) -> dict[str, Any]:
        """Loss scaler; an engine of stage 1 or 2 keeps its own where the tag has none."""
        kind = "deepspeed.runtime.fp16.loss_scaler"
        if self.dtype == "float16" and (always or "loss_scale" in self.counted):
            scaler = Instance(Global(kind, "DynamicLossScaler"), self._scale())
            return {"loss_scaler": scaler, "dynamic_loss_scale": True}
        if not always:
            return {}
        fixed = Instance(Global(kind, "LossScaler"), {"cur_scale": 1.0, "dynamic": False})
        return {"loss_scaler": fixed, "dynamic_loss_scale": False}

    def _said(self) -> dict[str, Any]:
        own = {"float32": {}, "bfloat16": {"bf16": {"enabled": True}}, "float16": {"fp16": {"enabled": True}}}
        config = {"zero_optimization": {"stage": self.stage}} | own[self.dtype]
        return {"ds_config": config, "ds_version": _VERSION}


def _sizes(shapes: dict[str, Shape]) -> dict[str, Any]:
    return {name: Call(Global("torch", "Size"), (shape,)) for name, shape in shapes.items()}


def _whole(fqn: str, shape: Shape, dtype: str) -> list[Stretch | int]:
    return [Stretch.whole(fqn, Box.whole(shape), dtype)]


def _together_on(numels: dict[str, int], period: int, rank: int) -> Iterator[Piece]:
    return (piece for piece in together(numels, [0] * len(numels), period) if piece.rank == rank)


def _flat(pieces: Any, name: str, dtype: str, length: int) -> Iterable[Stretch | int]:
    """What makes up a flat buffer of `length` elements: pieces of parameters, zeros where none lies."""
    at = 0
    for piece in pieces():
        if piece.start > at:
            yield (piece.start - at) * item_size(dtype)
        run: Run = piece.run
        yield Stretch.whole(name.format(piece.name), run, dtype)
        at = piece.start + run.numel
    if length > at:
        yield (length - at) * item_size(dtype)
