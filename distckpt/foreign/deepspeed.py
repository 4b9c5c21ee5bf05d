"""A DeepSpeed tag, described: ZeRO 0 to 3 and BF16_Optimizer, universal ones too, without DeepSpeed.

What a parameter is in the checkpoint is its fp32 master, found in the flat buffers of the optimizer's files; buffers
and frozen parameters are as the model has them. ZeRO-0 over 16-bit weights names its masters by position alone: a live
optimizer says which is which (`order`: names by group), else the 16-bit weights are all there is, and a note says so.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, NotACheckpoint
from distckpt.foreign.deepspeed_checks import check
from distckpt.foreign.deepspeed_files import MODEL, TagFiles
from distckpt.foreign.deepspeed_groups import (
    MASTER,
    Members,
    base_of,
    chunk,
    held_by_ranks,
    shapes_of,
    sharded,
    universal,
)
from distckpt.foreign.deepspeed_layout import apart, before_round_robin
from distckpt.foreign.deepspeed_model import check_rounded, weights_of
from distckpt.foreign.deepspeed_position import MISFIT, groups_of, mixed_members, orders_of, plain, saved_by_position
from distckpt.foreign.described import Directory, Tensor, leaves, whole
from distckpt.foreign.files import PlainFile, inside, read_bytes
from distckpt.foreign.located import Located
from distckpt.format.objects import join
from distckpt.format.text import shown
from distckpt.statedict import is_extra_state

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distckpt.format.box import Shape

LATEST = ("latest", "latest_universal")
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
    "num_experts",
    "ds_autoep_layers",
    "dp_world_size",
    "mp_world_size",
    "checkpoint_parallel_dimensions",
    "ds_config",
    "ds_version",
    "universal_checkpoint_info",
    "sparse_tensor_module_names",
    "global_steps",
    "global_samples",
    "skipped_steps",
}
"""Entries of a model file that are no values of the training state by themselves."""
_COMPUTED = {"float32", "bfloat16", "float16"}
_COUNTED = ("global_steps", "global_samples", "skipped_steps", "random_ltd", "data_sampler")


def is_deepspeed(folder: Path) -> bool:
    """Whether a directory is a tag, or one that has a `latest` which names one."""
    return any(MODEL.fullmatch(p.name) for p in folder.iterdir()) or any((folder / n).is_file() for n in LATEST)


def read_deepspeed(folder: Path, order: Sequence[Sequence[str]] | None = None) -> Directory:
    """Describe a tag, or the one that `latest` names. NotACheckpoint, FormatError, Corrupt, Unsupported.

    order: names of the optimizer's parameters by group, for what is saved by position.
    """
    tag = tag_of(folder)
    try:
        return _Tag(tag, order).describe()
    except (DistckptError, OSError):
        raise
    except Exception as e:  # values that are not of the kind that stands there can raise anything
        raise FormatError(f"{tag}: not laid out as DeepSpeed lays out a tag ({type(e).__name__}: {e})") from e


def tag_of(folder: Path) -> Path:
    """Tag that `latest` in a directory names; where there is none, the directory itself. NotACheckpoint."""
    latest = next((folder / name for name in LATEST if (folder / name).is_file()), None)
    if latest is None or any(MODEL.fullmatch(p.name) for p in folder.iterdir()):
        return folder
    file = PlainFile(latest)
    named = read_bytes(file, 0, min(file.size, 4096)).decode(errors="replace").strip()
    tag = inside(folder, named, file.name)
    if not tag.is_dir():
        raise NotACheckpoint(f"{tag}: does not exist, though {file.name} names it; give the directory of another tag")
    return tag


class _Tag:
    """One tag."""

    def __init__(self, folder: Path, order: Sequence[Sequence[str]] | None) -> None:
        self._is_universal = (folder / "zero").is_dir()
        self._files = TagFiles(folder, universal=self._is_universal)
        check(self._files, universal=self._is_universal)
        self._order = [[*names] for names in order] if order is not None else None
        self._notes: list[str] = []
        by_position = not self._is_universal and not any(stage.ranks for stage in self._files.stages)
        hinted = [n for names in self._order or () for n in names] if by_position else ()
        self._weights = weights_of(self._files, self._known(), hinted)
        self._optimizer: dict[str, Any] = {}
        """What rank 0 says of the optimizer besides its flat buffers."""

    def _known(self) -> dict[str, Shape | None]:
        """Names of what is trained, as far as they are said, and their shapes."""
        known: dict[str, Shape | None] = {}
        for stage in self._files.stages:
            for group in stage.model.get("param_shapes") or held_by_ranks(stage):
                known |= {name: None if shape is None else tuple(shape) for name, shape in group.items()}
        return known

    def describe(self) -> Directory:
        """Directory with the nested state dict of the tag."""
        files, first = self._files, self._files.model
        members, optim = self._trained()
        model: dict[str, Tensor] = {}
        for part in members:  # of a tied layer's copies the first stage's counts
            model = part.tensors.get(MASTER, {}) | model
        check_rounded(files, self._weights, model)
        if files.partitioned:
            model |= self._frozen()
        model = self._whole_model(model)
        file = files.stages[0].first
        tree: dict[str, Any] = {
            k: leaves(v, file) for k, v in first.items() if k not in _OWN and not (k == "lr_scheduler" and v is None)
        }
        tree["model"] = model | self._extra_state()
        if optim:
            tree["optim"] = optim
        trained = {n for part in members for n in part.shapes}
        engine = self._counted() | {"module": self._module(trained)}
        tree["deepspeed"] = {"version": first.get("ds_version"), "engines": {"model": engine}}
        step = first.get("global_steps", 0)
        step = step if type(step) is int and step >= 0 else 0
        return Directory(
            str(files.folder),
            tree,
            files.sources,
            has_sums=files.has_sums,
            homes=files.homes,
            step=step,
            notes=self._notes,
        )

    # -- what is trained ---------------------------------------------------------------------------------------------

    def _trained(self) -> tuple[list[Members], dict[str, Any] | None]:
        """(Parameters by flat buffer, none where they have no names; state dict of the optimizer)."""
        files = self._files
        if self._is_universal:
            file = files.open("zero/optimizer_state.pt")
            self._optimizer = files.trees[file]
            made = universal(files, file)
            groups = self._optimizer.get("param_groups")
            groups = groups or base_of(self._optimizer, str(files.folder))["param_groups"]
            return made, self._joined([self._named(made, groups)])
        if not any(stage.ranks for stage in files.stages):
            return self._by_position()
        members, parts = [], []
        for stage in files.stages:
            if not stage.ranks:
                continue  # a stage without parameters
            made = [*sharded(stage, shapes_of(stage, self._weights.shapes), self._weights.experts)]
            saved = stage.optimizers[0]
            self._optimizer = self._optimizer or saved
            members += made
            parts.append(self._named(made, base_of(saved, str(files.folder))["param_groups"]))
        return members, self._joined(parts)

    def _by_position(self) -> tuple[list[Members], dict[str, Any] | None]:
        """See _trained: of stage 0, whose optimizer has no names."""
        files, found = self._files, saved_by_position(self._files)
        self._optimizer = found[0][1] if found else {}
        mixed = bool({"fp32_groups", "fp32_groups_flat"} & self._optimizer.keys())
        alone = len(found) == 1 and not files.layers and not files.experts
        if not found:
            return [], None
        named = self._ordered(found) if self._order is not None else "no optimizer says them"
        if alone and not mixed and named != MISFIT:
            return [], plain(*found[0], [] if isinstance(named, str) else self._order or [])
        if not isinstance(named, str):
            return [part for members, _ in named for part in members], self._joined([optim for _, optim in named])
        lost = (
            "fp32 master weights without names ({}): the model's 16-bit weights are read in their place, and have lost "
            "what rounding took"
            if mixed
            else "optimizer's states without names ({}): the weights alone are read"
        )
        tied = ", a tied layer of a pipeline as one of the places that it is used at" if files.layers else ""
        self._notes.append(
            f"{files.folder}: ZeRO-0 keeps its {lost.format(named)}{tied}. Load it with the optimizer that it was "
            "saved with, or say the order of its parameters"
        )
        return [], plain(*found[0], []) if alone and named != MISFIT else None

    def _ordered(self, found: list[tuple[int, dict[str, Any]]]) -> list[tuple[list[Members], dict[str, Any]]] | str:
        """Members, and state dict, of each optimizer of stage 0; or why the order does not fit."""
        orders = orders_of(self._files, self._weights, self._order or [])
        if isinstance(orders, str):
            return orders
        named = []
        for (file, saved), order in zip(found, orders, strict=True):
            if "param_groups" in saved:
                named.append((list[Members](), plain(file, saved, order) or {}))
                continue
            members = mixed_members(self._files, file, saved, order, self._weights.shapes)
            if isinstance(members, str):
                return members
            named.append((members, self._named(members, groups_of(saved))))
        return named

    def _named(self, members: list[Members], groups: list[dict[str, Any]]) -> dict[str, Any]:
        """State dict of an optimizer, its parameters named."""
        buffers = 1 + max((part.number for part in members), default=-1)
        ids = [p for group in groups for p in group["params"]]
        one_each = len(groups) == buffers
        if not one_each and len(ids) != buffers:
            raise Corrupt(f"{self._files.folder}: {buffers} flat buffers, {len(ids)} in the optimizer's groups")
        owner = [g for g, group in enumerate(groups) for _ in (range(1) if one_each else group["params"])]
        state: dict[str, dict[str, Any]] = {}
        made = [group | {"params": []} for group in groups]
        for part in members:
            made[owner[part.number]]["params"] += self._in_group_order(part)
            for fqn in part.shapes:
                of_state = {n: tensors[fqn] for n, tensors in part.tensors.items() if n != MASTER and fqn in tensors}
                state[fqn] = of_state | part.values
        return {"state": state, "param_groups": made}

    def _joined(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """State dict of all stages' or expert-parallel ranks' optimizers. FormatError where groups differ."""
        state: dict[str, Any] = {}
        groups: list[dict[str, Any]] | None = None
        for part in parts:
            state = part["state"] | state
            own = part["param_groups"]
            if any("moe" in group for group in own):  # which ranks share experts: a live engine's own matter
                own = [{k: v for k, v in group.items() if k not in {"moe", "name"}} for group in own]
            try:
                groups = own if groups is None else join(groups, own, "params", "param_groups")
            except ValueError as e:
                raise FormatError(
                    f"{self._files.folder}: files of different saves: groups of the optimizer differ: {e}"
                ) from e
        return {"state": state, "param_groups": groups or []}

    def _in_group_order(self, part: Members) -> list[str]:
        """Parameters of a flat buffer in the order of their group, which `round_robin_gradients` changes."""
        config = self._files.model.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        changed = isinstance(zero, dict) and zero.get("round_robin_gradients") and "zero_stage" in self._optimizer
        names = [*part.shapes]
        return before_round_robin(names, part.ranks) if changed and not self._files.partitioned else names

    # -- the model -------------------------------------------------------------------------------------------------

    def _whole_model(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masters, and what else the model's own state dict has: of a partitioned one, its buffers alone."""
        files, weights = self._files, self._weights
        tied = {k: v for k, v in (files.model.get("shared_params") or {}).items() if v in known}
        found = dict(known)
        same = {(f, t.start, t.shape): n for n, (f, t) in weights.found.items() if n in known}
        for name, (file, tensor) in weights.found.items():
            if name in known or is_extra_state(name) or (files.partitioned and name not in weights.buffers):
                continue
            owner = tied.get(name, same.get((file, tensor.start, tensor.shape)) if prod(tensor.shape) else None)
            found[name] = known[owner] if owner else whole(file, tensor)
        return found | {name: known[owner] for name, owner in tied.items()}

    def _extra_state(self) -> dict[str, Any]:
        """Extra state of modules."""
        module = self._files.model.get("module")
        entries = module.items() if isinstance(module, dict) else ()
        return {n: leaves(v, self._files.stages[0].first) for n, v in entries if is_extra_state(str(n))}

    def _frozen(self) -> dict[str, Tensor]:
        """Frozen parameters of stage 3, a fragment in each rank's model file."""
        files, models = self._files, [*self._files.stages[0].models.values()]
        shapes = {n: tuple(s) for n, s in (files.model.get("frozen_param_shapes") or {}).items()}
        fragments = [files.dict_of(files.trees[f], "frozen_param_fragments", f) if shapes else {} for f in models]
        found = {}
        for name, shape in shapes.items():
            chunks = []
            for piece in apart({name: prod(shape)}, len(fragments)):
                flat = fragments[piece.rank].get(name)
                if not isinstance(flat, Located):
                    raise FormatError(f"{files.name(models[piece.rank])}: its fragment of {name} is {shown(flat)}")
                chunks.append(chunk(models[piece.rank], flat, piece))
            found[name] = Tensor(fragments[0][name].dtype, shape, tuple(chunks))
        return found

    # -- what the engine counted -----------------------------------------------------------------------------------

    def _counted(self) -> dict[str, Any]:
        """Counters of the engine and its loss scale, as `distckpt.adapters.zero` names them."""
        first = self._files.model
        said = {name: first[name] for name in _COUNTED if first.get(name) is not None}
        scaler = self._optimizer.get("loss_scaler")
        scaler = scaler if isinstance(scaler, dict) else self._optimizer
        if scaler.get("dynamic", scaler.get("dynamic_loss_scale")):
            said["loss_scale"] = {k: v for k, v in scaler.items() if type(v) in {int, float, bool}}
        return said

    def _module(self, trained: set[str]) -> dict[str, Any]:
        """What a tag that is written anew needs to know of the model, and nothing else tells."""
        buffers = self._weights.buffers
        module = {name: t for name, (_, t) in self._weights.found.items() if not is_extra_state(name)}
        dtypes = {t.dtype for n, t in module.items() if n not in buffers and t.dtype in _COMPUTED}
        known = trained | buffers | {*(self._files.model.get("shared_params") or ())}
        frozen = [n for n in module if n not in known] if trained else []
        return {"frozen": frozen} | ({"dtype": dtypes.pop()} if len(dtypes) == 1 else {})
