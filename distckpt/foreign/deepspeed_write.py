"""A checkpoint as a DeepSpeed tag, of any ZeRO stage and number of ranks: what `engine.load_checkpoint` reads.

Groups are those of the checkpoint's optimizer, and within a group parameters lie in its order: the engine that loads
the tag must be made with the same. Flat buffers are streamed, parameter by parameter. `latest` is switched last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import StoreError, Unsupported
from distckpt.foreign.deepspeed import LATEST
from distckpt.foreign.deepspeed_layout import Piece, apart_on, period_of, piece_of, round_robin, sub_groups, together
from distckpt.foreign.deepspeed_module import DTYPES, Module
from distckpt.foreign.deepspeed_optim import Group, groups_of
from distckpt.foreign.emit import Call, Global, Instance
from distckpt.foreign.paths import tree_of
from distckpt.foreign.sink import Sink, lost
from distckpt.foreign.torch_zip import TorchFile
from distckpt.format.box import Box, Run
from distckpt.format.dtype import item_size
from distckpt.loading.stream import Stretch
from distckpt.statedict import insert, references
from distckpt.store.base import check

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from distckpt.foreign.sink import Output
    from distckpt.format.box import Shape
    from distckpt.loading.open import Checkpoint

_VERSION = "0.19.8"
_NOT_CLIENTS = ("model", "optim", "lr_scheduler", "deepspeed", "environment")
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
        try:
            if self.tag is not None and check(self.tag) in LATEST:
                raise StoreError(f"{self.tag!r} is DeepSpeed's own name for the newest tag")
        except StoreError as e:
            raise ValueError(f"tag {self.tag!r}: {e}") from e

    def sink(self, checkpoint: Checkpoint, destination: str | Path, attempt: str, room: int) -> Sink:  # noqa: ARG002
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
        self.tree = tree_of(checkpoint)
        trained = [name for group in self.groups for name in group.shapes]
        model = self.tree.get("model")
        self.module = Module(model if isinstance(model, dict) else {}, checkpoint.manifest.tensors, trained, self.dtype)
        self.module.freeze(self._said_of("frozen", ()), wanted.frozen)
        self.module.refuse_narrowing()
        if wanted.round_robin and self.stage in {1, 2}:
            self.groups = [g.ordered(round_robin([*g.shapes], self.ranks)) for g in self.groups]
        self.buffers = self._flat_buffers()

    def sink(self) -> Sink:
        """All files of the tag."""
        self.notes += lost(self.checkpoint)
        if not self.groups and self.stage:
            raise Unsupported(
                f"{self.checkpoint.name}: has no optimizer, whose groups say how ZeRO lays weights out: write stage 0, "
                "or safetensors"
            )
        tag = self.wanted.tag or f"global_step{self._steps()}"
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
        module, names = self.module, self.module.infos
        entries = {name: self._entry(file, name) for name in names}
        entries |= {other: entries[name] for other, name in module.tied.items()}
        entries |= {name: self._value(file, value) for name, value in module.extra.items()}
        tree: dict[str, Any] = {
            "module": entries,
            "buffer_names": module.buffers,
            "optimizer": self._whole_optimizer(file) if not self.stage and self.groups else None,
            "param_shapes": [_sizes(shapes) for shapes in self.buffers] if self.stage else None,
            "frozen_param_shapes": None,
            "shared_params": module.tied if self.stage else None,
            "frozen_param_fragments": None,
            "lr_scheduler": self._value(file, self.tree.get("lr_scheduler")),
            "data_sampler": self.counted.get("data_sampler"),
            "random_ltd": self.counted.get("random_ltd"),
            "skipped_steps": self.counted.get("skipped_steps", 0),
            "global_steps": self._steps(),
            "dp_world_size": self.ranks,
            "mp_world_size": 1,
        } | self._said()
        if "global_samples" in self.counted:
            tree["global_samples"] = self.counted["global_samples"]
        if self.stage == 3:
            tree["frozen_param_shapes"] = _sizes({name: names[name].shape for name in module.frozen})
            tree["frozen_param_fragments"] = {name: self._fragment(file, name, rank) for name in module.frozen}
        for name, value in self._client_state().items():
            if name in tree:
                self._note(f"{name}: DeepSpeed has a value of its own under this name; left out")
            else:
                tree[name] = self._value(file, value)
        return tree

    def _client_state(self) -> dict[Any, Any]:
        """What is neither the model nor the engine's. `client_state` is that of `distckpt.adapters.deepspeed`."""
        found = {name: value for name, value in self.tree.items() if name not in _NOT_CLIENTS}
        given = found.get("client_state")
        return {n: v for n, v in found.items() if n != "client_state"} | given if isinstance(given, dict) else found

    def _steps(self) -> int:
        found: int = self.counted.get("global_steps", self.checkpoint.manifest.step)
        return found

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _said_of(self, name: str, default: Any) -> Any:
        """What the tag that is read said of its model."""
        said = self.counted.get("module")
        return said.get(name, default) if isinstance(said, dict) else default

    def _dtypes(self) -> dict[str, str]:
        """What a reader finds each tensor of the model to be."""
        found = {self.module.fqns[n]: self.module.dtype_of(n) for n in self.module.infos}
        return found | {self.module.fqns[n]: "float32" for group in self.groups for n in group.shapes}

    def _entry(self, file: TorchFile, name: str) -> Any:
        module = self.module
        shape, dtype = module.infos[name].shape, module.dtype_of(name)
        if self.stage == 3 and not module.is_buffer(name):
            return file.tensor(dtype, (0,), list)
        return file.tensor(dtype, shape, partial(_whole, module.fqns[name], shape, dtype))

    def _fragment(self, file: TorchFile, name: str, rank: int) -> Any:
        shape, dtype = self.module.infos[name].shape, self.module.dtype_of(name)
        length = piece_of(prod(shape), self.ranks)
        pieces = partial(apart_on, {name: prod(shape)}, self.ranks, rank)
        return file.tensor(dtype, (length,), partial(_flat, pieces, self.module.fqns, dtype, length))

    def _value(self, file: TorchFile, value: Any) -> Any:
        """Value with its tensors in the file."""
        infos = {fqn: self.checkpoint.manifest.tensors[fqn] for fqn in references(value)}
        made = {f: file.tensor(i.dtype, i.shape, partial(_whole, f, i.shape, i.dtype)) for f, i in infos.items()}
        return insert(value, made)

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def _flat_buffers(self) -> list[dict[str, Shape]]:
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
        buffers = self.buffers
        owners = [next(g for g in self.groups if next(iter(shapes)) in g.shapes) for shapes in buffers]
        lengths, lean = [], []
        for shapes in buffers:
            numels = {name: prod(shape) for name, shape in shapes.items()}
            total = sum(numels.values())
            length = sum(piece_of(n, ranks) for n in numels.values()) if stage == 3 else period_of(total, ranks)
            lengths.append(length)
            lean.append(length if stage == 3 else max(0, min(length, total - rank * length)))
        masters = [
            self._buffer(file, s, rank, fqns=self.module.fqns, dtype="float32", length=n)
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
        self, file: TorchFile, shapes: dict[str, Shape], rank: int, *, fqns: dict[str, str], dtype: str, length: int
    ) -> Any:
        """Flat buffer of a rank: `fqns` of the parameters' tensors."""
        numels = {n: prod(shape) for n, shape in shapes.items()}
        if self.stage == 3:
            pieces = partial(apart_on, numels, self.ranks, rank)
        else:
            pieces = partial(_together_on, numels, period_of(sum(numels.values()), self.ranks), rank)
        return file.tensor(dtype, (length,), partial(_flat, pieces, fqns, dtype, length))

    def _states(
        self, file: TorchFile, group: Group, shapes: dict[str, Shape], rank: int, length: int
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for state, dtype in group.flat.items():
            fqns = {name: f"optim.{name}.{state}" for name in shapes}
            found[state] = self._buffer(file, shapes, rank, fqns=fqns, dtype=dtype, length=length)
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
        fqns = self.module.fqns
        masters = [
            [file.tensor("float32", s, partial(_whole, fqns[n], s, "float32")) for n, s in group.shapes.items()]
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


def _flat(pieces: Any, fqns: dict[str, str], dtype: str, length: int) -> Iterable[Stretch | int]:
    """What makes up a flat buffer of `length` elements: pieces of parameters, zeros where none lies."""
    at = 0
    for piece in pieces():
        if piece.start > at:
            yield (piece.start - at) * item_size(dtype)
        run: Run = piece.run
        yield Stretch.whole(fqns[piece.name], run, dtype)
        at = piece.start + run.numel
    if length > at:
        yield (length - at) * item_size(dtype)
