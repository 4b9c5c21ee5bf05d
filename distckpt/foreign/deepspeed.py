"""A DeepSpeed tag, described: ZeRO 0 to 3 and BF16_Optimizer, universal ones too, without DeepSpeed.

What a parameter is in the checkpoint is its fp32 master, found in the flat buffers of the optimizer's files; buffers
and frozen parameters are as the model has them. ZeRO-0 over 16-bit weights names its masters by position alone: a live
optimizer says which is which (`order`: names by group), else the 16-bit weights are all there is, and a note says so.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from distckpt.errors import Corrupt, DistckptError, FormatError, NotACheckpoint
from distckpt.foreign.deepspeed_files import MODEL, TagFiles
from distckpt.foreign.deepspeed_groups import MASTER, base_of, by_position, chunk, sharded, universal
from distckpt.foreign.deepspeed_layout import apart, before_round_robin
from distckpt.foreign.described import Directory, Tensor, whole
from distckpt.foreign.files import PlainFile, inside, read_bytes
from distckpt.foreign.located import Located
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from distckpt.foreign.deepspeed_groups import Members

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
    tag = _tag_of(folder)
    try:
        return _Tag(tag, order).describe()
    except (DistckptError, OSError):
        raise
    except Exception as e:  # values that are not of the kind that stands there can raise anything
        raise FormatError(f"{tag}: not laid out as DeepSpeed lays out a tag ({type(e).__name__}: {e})") from e


def _tag_of(folder: Path) -> Path:
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
        self._order = [[*names] for names in order] if order is not None else None
        self._notes: list[str] = []
        self._optimizer: dict[str, Any] = {}
        """What rank 0 says of the optimizer besides its flat buffers."""

    def describe(self) -> Directory:
        """Directory with the nested state dict of the tag."""
        files, first = self._files, self._files.model
        members = self._members()
        model = {n: t for part in members for n, t in part.tensors.get(MASTER, {}).items()}
        if files.partitioned:
            model |= self._frozen()
        model = self._whole_model(model)
        tree: dict[str, Any] = {k: v for k, v in first.items() if k not in _OWN and v is not None}
        tree["model"] = model
        if optim := self._named_optimizer(members) if members else self._unnamed_optimizer():
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

    def _members(self) -> list[Members]:
        """Parameters by flat buffer; none where the optimizer has no names for them."""
        files = self._files
        if self._is_universal:
            file = files.open("zero/optimizer_state.pt")
            self._optimizer = files.trees[file]
            return universal(files, file)
        if files.ranks:
            self._optimizer = files.optimizer(files.ranks[0])
            return [*sharded(files)]
        found = files.model.get("optimizer")
        if not isinstance(found, dict) or not ({"fp32_groups", "fp32_groups_flat"} & found.keys()):
            return []
        self._optimizer = found
        named = by_position(files, found, self._order) if self._order is not None else "no optimizer says them"
        if isinstance(named, list):
            return named
        self._notes.append(
            f"{files.folder}: ZeRO-0 keeps its fp32 master weights without names ({named}): the model's 16-bit weights "
            "are read in their place, and have lost what rounding took. Load it with the optimizer that it was saved "
            "with, or say the order of its parameters"
        )
        return []

    # -- the model -------------------------------------------------------------------------------------------------

    def _whole_model(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masters, and what else the model's own state dict has: of a partitioned one, its buffers alone."""
        files = self._files
        file = files.models[0]
        buffers = set(files.model.get("buffer_names") or ())
        tied = {k: v for k, v in (files.model.get("shared_params") or {}).items() if v in known}
        module = files.dict_of(files.model, "module", file)
        found = dict(known)
        same = {(t.start, t.shape): n for n, t in module.items() if isinstance(t, Located) and n in known}
        for name, tensor in module.items():
            if not isinstance(tensor, Located) or name in known or (files.partitioned and name not in buffers):
                continue
            owner = tied.get(name, same.get((tensor.start, tensor.shape)) if prod(tensor.shape) else None)
            found[name] = known[owner] if owner else whole(file, tensor)
        return found | {name: known[owner] for name, owner in tied.items()}

    def _frozen(self) -> dict[str, Tensor]:
        """Frozen parameters of stage 3, a fragment in each rank's model file."""
        files = self._files
        shapes = {n: tuple(s) for n, s in (files.model.get("frozen_param_shapes") or {}).items()}
        fragments = [files.dict_of(files.trees[f], "frozen_param_fragments", f) if shapes else {} for f in files.models]
        found = {}
        for name, shape in shapes.items():
            numel = prod(shape)
            chunks = []
            for piece in apart({name: numel}, len(fragments)):
                flat = fragments[piece.rank].get(name)
                if not isinstance(flat, Located):
                    raise FormatError(
                        f"{files.name(files.models[piece.rank])}: its fragment of {name} is {shown(flat)}"
                    )
                chunks.append(chunk(files.models[piece.rank], flat, piece))
            found[name] = Tensor(fragments[0][name].dtype, shape, tuple(chunks))
        return found

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def _named_optimizer(self, members: list[Members]) -> dict[str, Any]:
        """State dict of the optimizer, its parameters named."""
        groups = self._optimizer.get("param_groups") if self._is_universal else None
        if groups is None:
            groups = base_of(self._optimizer, str(self._files.folder))["param_groups"]
        one_each = len(groups) == len(members)
        ids = [p for group in groups for p in group["params"]]
        if not one_each and len(ids) != len(members):
            raise Corrupt(f"{self._files.folder}: {len(members)} flat buffers, {len(ids)} in the optimizer's groups")
        owner = [g for g, group in enumerate(groups) for _ in (range(1) if one_each else group["params"])]
        state: dict[str, dict[str, Any]] = {}
        made = [{k: v for k, v in group.items() if k != "params"} | {"params": []} for group in groups]
        for g, part in zip(owner, members, strict=True):
            made[g]["params"] += self._in_group_order([*part.shapes])
            for fqn in part.shapes:
                of_state = {n: tensors[fqn] for n, tensors in part.tensors.items() if n != MASTER and fqn in tensors}
                state[fqn] = of_state | part.values
        return {"state": state, "param_groups": made}

    def _in_group_order(self, names: list[str]) -> list[str]:
        """Parameters of a flat buffer in the order of their group, which `round_robin_gradients` changes."""
        config = self._files.model.get("ds_config")
        zero = config.get("zero_optimization") if isinstance(config, dict) else None
        changed = isinstance(zero, dict) and zero.get("round_robin_gradients") and "zero_stage" in self._optimizer
        return before_round_robin(names, len(self._files.ranks)) if changed and not self._files.partitioned else names

    def _unnamed_optimizer(self) -> dict[str, Any] | None:
        """State dict of a stage 0 optimizer, its parameters by position: a live one must name them."""
        found = self._files.model.get("optimizer")
        if isinstance(found, dict) and "fp32_groups_flat" in found:
            return None
        found = found.get("optimizer_state_dict", found) if isinstance(found, dict) else None
        if not isinstance(found, dict) or found.keys() != {"state", "param_groups"}:
            return None
        file = self._files.models[0]
        state: dict[Any, dict[str, Any]] = {
            p: {k: whole(file, v) if isinstance(v, Located) else v for k, v in members.items()}
            for p, members in found["state"].items()
        }
        groups, names = found["param_groups"], [*self._order] if self._order is not None else []
        if [len(n) for n in names] == [len(g["params"]) for g in groups]:
            named = dict(zip([p for g in groups for p in g["params"]], [n for of in names for n in of], strict=True))
            state = {named[p]: members for p, members in state.items()}
            groups = [{**g, "params": [named[p] for p in g["params"]]} for g in groups]
        return {"state": state, "param_groups": groups}

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
        buffers = {*(self._files.model.get("buffer_names") or ())}
        module = {n: t for n, t in self._files.model["module"].items() if isinstance(t, Located)}
        dtypes = {t.dtype for n, t in module.items() if n not in buffers and t.dtype in _COMPUTED}
        known = trained | buffers | {*(self._files.model.get("shared_params") or ())}
        frozen = [n for n in module if n not in known] if trained else []
        return {"frozen": frozen} | ({"dtype": dtypes.pop()} if len(dtypes) == 1 else {})
