"""LoRA adapters as views of a checkpoint: the adapter alone, as PEFT has it, or its base model with it merged in.

What of PEFT cannot be merged here bit for bit is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import partial
from math import prod, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.adapters.peft import NAME, ROOT
from distckpt.errors import Mismatch, Unsupported
from distckpt.foreign.peft import CONFIG, DEFAULT, checked_config, part_of, read_config
from distckpt.foreign.safetensors_write import LEAD
from distckpt.format import objects
from distckpt.format.checksum import digest
from distckpt.format.manifest import ObjectInfo
from distckpt.format.partition import Grid
from distckpt.loading.open import Computed
from distckpt.loading.stream import whole
from distckpt.run.source import open_source
from distckpt.tools.lora_layer import Layer
from distckpt.tools.view import Over

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from distckpt.foreign.peft import Part
    from distckpt.format.manifest import TensorInfo
    from distckpt.loading.open import Checkpoint

_PLAIN = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config"),
    *("megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern"),
    *("revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
}
"""Of a configuration: what leaves an adapter one that is merged here. Anything else that is set is refused."""
_BASE_KEPT = (True, False, "gaussian", "eva", "orthogonal")
"""init_lora_weights after which the base model still has the weights that it came with."""
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_BESIDE = {"lora_B.bias", "lora_magnitude_vector.weight"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Which LoRA adapter of a checkpoint is read, and whether merged into its base model.

    name: of several, which. config: a directory with its adapter_config.json, where the checkpoint has none. base:
    where the base model lies, if not in the same checkpoint.
    """

    name: str | None = None
    config: str | None = None
    merge: bool = False
    base: str | None = None

    def of(self, checkpoint: Checkpoint) -> Checkpoint:
        """View of a checkpoint. Mismatch where it has no such adapter; Unsupported for one of another kind."""
        alone = Alone(checkpoint, self.name, self.config)
        if not self.merge:
            return alone
        if self.base is None:
            return Merged(_within(checkpoint), alone, {})
        _refuse_changed_base(alone.config)
        base = open_source(self.base)
        merged = Merged(base, alone, _aligned(alone, base))
        merged.notes = [*base.notes, *_perhaps_tied(base, alone, merged)]
        return merged


class Alone(Over):
    """The tensors of one adapter, called `default`, below `base_model.model.`, and its configuration: object `peft`."""

    def __init__(self, source: Checkpoint, name: str | None, config: str | None) -> None:
        names = _names(source)
        parts = {n: part for n in names if (part := part_of(n))}
        chosen = _chosen(source, {part.adapter for part in parts.values()}, name)
        mine = {n: part for n, part in parts.items() if part.adapter == chosen}
        self.config, self.transposed = _configuration(source, chosen, config)
        root = "" if all(n.startswith(ROOT) for n in mine) else ROOT
        if root and any(ROOT in n for n in mine):
            raise Unsupported(
                f"{source.name}: has adapters of several models: copy one of them with --only and --rename"
            )
        saved = {LEAD + root + part._replace(adapter=DEFAULT).name: names[n] for n, part in mine.items()}
        saved |= {LEAD + root + n: names[n] for n in _biases(names, mine.values(), self.config.get("bias", "none"))}
        content = replace(
            source.manifest,
            tensors={live: source.manifest.tensors[fqn] for live, fqn in saved.items()},
            rank_objects={},
            aliases={},
        )
        told = objects.encode(self.object(NAME), NAME)
        content = replace(content, objects={NAME: ObjectInfo("", len(told), digest(told))})
        super().__init__(source, content, saved)

    def object(self, name: str) -> Any:  # noqa: ARG002
        """See Checkpoint.object."""
        known = {} if self.transposed is None else {"transposed": sorted(self.transposed)}
        return {DEFAULT: {"config": self.config, **known}}

    def rank_objects(self, rank: int) -> dict[str, Any]:  # noqa: ARG002
        """See Checkpoint.rank_objects: there are none."""
        return {}


def _names(source: Checkpoint) -> dict[str, str]:
    """Saved fqn of each tensor of the model, by its name in the state dict; of tied ones, under each name."""
    content = source.manifest
    pairs = {**dict.fromkeys(content.tensors), **content.aliases}
    return {n.removeprefix(LEAD): fqn or n for n, fqn in pairs.items() if n.startswith(LEAD)}


def _chosen(source: Checkpoint, found: set[str], name: str | None) -> str:
    if not found:
        raise Mismatch(f"{source.name}: holds no LoRA adapter: none of its names has a lora_A")
    if name is None and len(found) > 1 and DEFAULT not in found:
        raise Mismatch(f"{source.name}: holds the adapters {', '.join(sorted(found))}: which one? --adapter NAME")
    chosen = name or (DEFAULT if DEFAULT in found else min(found))
    if chosen not in found:
        raise Mismatch(f"{source.name}: holds no adapter {chosen!r}, but {', '.join(sorted(found))}")
    return chosen


def _configuration(source: Checkpoint, adapter: str, folder: str | None) -> tuple[dict[str, Any], set[str] | None]:
    """(configuration of an adapter, modules whose weights are stored as (in, out): None where nothing tells)."""
    said = source.object(NAME) if NAME in source.manifest.objects else {}
    found = said.get(adapter) if isinstance(said, dict) else None
    found = found if isinstance(found, dict) else {}
    config = read_config(Path(folder)) if folder and (Path(folder) / CONFIG).is_file() else found.get("config")
    if config is None:
        raise Mismatch(f"{source.name}: has no configuration of adapter {adapter!r}: --config DIR with its {CONFIG}")
    config = checked_config(config, f"{source.name}: configuration of adapter {adapter!r}")
    if config.get("peft_type") != "LORA":
        raise Unsupported(f"{source.name}: adapter {adapter!r} is of PEFT's type {config.get('peft_type')}, not LORA")
    turned = found.get("transposed")
    return config, {str(n) for n in turned} if isinstance(turned, list) else None


def _biases(names: Iterable[str], parts: Iterable[Part], which: Any) -> list[str]:
    """Biases of the base model that are trained with the adapter."""
    if which == "lora_only":
        wanted = {f"{part.module}.base_layer.bias" for part in parts if part.part.startswith("lora")}
        return [n for n in names if n in wanted]
    own = (n for n in names if n.endswith(".bias") and not part_of(n) and ".original_module." not in n)
    return [*own] if which == "all" else []


# -- merging -----------------------------------------------------------------------------------------------------------


def _within(checkpoint: Checkpoint) -> Over:
    """Base model in the checkpoint that also holds its adapters, under its own names."""
    content = checkpoint.manifest

    def live(fqn: str) -> str:
        return LEAD + fqn.removeprefix(LEAD).removeprefix(ROOT).replace(".base_layer.", ".")

    kept = {n for n in (*content.tensors, *content.aliases) if n.startswith(LEAD) and not part_of(n)}
    kept = {n for n in kept if ".original_module." not in n and not n.startswith(f"{LEAD}extra_state.")}
    aliases = {live(a): live(fqn) for a, fqn in content.aliases.items() if a in kept and fqn in kept}
    saved = {live(n): content.aliases.get(n, n) for n in content.tensors if n in kept}
    saved |= {live(a): fqn for a, fqn in content.aliases.items() if a in kept and fqn not in kept}
    tensors = {n: content.tensors[fqn] for n, fqn in saved.items()}
    return Over(checkpoint, replace(content, tensors=tensors, aliases=aliases, objects={}, rank_objects={}), saved)


class Merged(Over):
    """A base model with an adapter merged in. aligned: names of modules as the base has them, where they differ."""

    def __init__(self, base: Checkpoint, adapter: Alone, aligned: Mapping[str, str]) -> None:
        self._adapter, self._aligned = adapter, aligned
        self._computed: dict[str, Computed] = {}
        self._infos = {n: i for n, i in base.manifest.tensors.items() if n.startswith(LEAD)}
        self._aliases = {a: n for a, n in base.manifest.aliases.items() if n in self._infos}
        _refuse_unknown(adapter)
        self._base = base
        self._replace_modules()
        for module, parts in _layers(adapter).items():
            self._merge(module, parts)
        one, other = base.manifest, adapter.manifest
        attempt = f"{one.attempt}-{other.attempt}-{other.objects[NAME].digest}"  # another adapter is another copy
        content = replace(one, tensors=self._infos, aliases=self._aliases, objects={}, rank_objects={}, attempt=attempt)
        super().__init__(base, content, {n: n for n in base.manifest.tensors})
        self.name = adapter.name
        self.sources = [*base.sources, *adapter.sources]

    def computed(self, fqn: str) -> Computed | None:
        """See Checkpoint.computed."""
        return self._computed.get(fqn)

    def saved_name(self, fqn: str) -> str:
        """See Checkpoint.saved_name."""
        return self._base.saved_name(fqn)

    def rank_objects(self, rank: int) -> dict[str, Any]:  # noqa: ARG002
        """See Checkpoint.rank_objects: there are none."""
        return {}

    def _called(self, module: str) -> str:
        module = module.removeprefix(ROOT)
        return LEAD + self._aligned.get(module, module)

    def _replace_modules(self) -> None:
        """Take whole modules, and biases, from the adapter: what was tied to them is not any more."""
        for fqn, info in self._adapter.manifest.tensors.items():
            part = part_of(name := fqn.removeprefix(LEAD))
            if part and part.part != "modules_to_save":
                continue
            module, _, last = name.rpartition(".")
            live = (
                self._called(part.module) + part.rest
                if part
                else f"{self._called(module.removesuffix('.base_layer'))}.{last}"
            )
            for alias in [a for a, n in self._aliases.items() if n == live and part]:
                del self._aliases[alias]
                self._infos[alias] = self._infos[live]
                self._computed[alias] = Computed(((self._base, live),), partial(whole, self._base, live))
            self._aliases.pop(live, None)
            self._infos[live] = _in_file(0, info)
            self._computed[live] = Computed(((self._adapter, fqn),), partial(whole, self._adapter, fqn))

    def _merge(self, module: str, parts: Mapping[str, str]) -> None:
        """Have a module's weight, and its bias if it has one of LoRA's, be merged when they are asked for."""
        weight = self._held(module, "weight")
        if parts.keys() != {*_EMBEDDING} and parts.keys() - _BESIDE != {*_LINEAR}:
            raise Unsupported(f"{module}: has {', '.join(sorted(parts))}, which is not merged here: PEFT does it")
        layer = Layer(self._base, self._adapter, weight, parts, _scaling(self._adapter, module, parts))
        if (dtype := self._infos[weight].dtype) not in _FLOATS:
            raise Unsupported(f"{module}: a weight of dtype {dtype} is left to PEFT to merge")
        turned = self._turned(module, parts, self._infos[weight].shape)
        self._infos[weight] = _in_file(len(self._computed) % self._base.manifest.world_size, self._infos[weight])
        reads = ((self._base, weight), *((self._adapter, fqn) for fqn in parts.values()))
        self._computed[weight] = Computed(reads, partial(layer.weight, turned=turned))
        if fqn := parts.get("lora_B.bias"):
            bias = self._held(module, "bias")
            self._computed[bias] = Computed(((self._base, bias), (self._adapter, fqn)), partial(layer.bias, bias))

    def _held(self, module: str, last: str) -> str:
        """Fqn of a parameter of the base. Mismatch where it has none; Unsupported if it is merged already."""
        fqn = f"{self._called(module)}.{last}"
        fqn = self._aliases.get(fqn, fqn)
        if fqn not in self._infos:
            some = ", ".join(sorted(self._infos)[:3])
            raise Mismatch(
                f"{self._base.name}: has no {fqn.removeprefix(LEAD)}, which the adapter changes"
                + (
                    f"; it has {some}, ...: is it the adapter's base model?"
                    if some
                    else ": --base DIR says where it lies"
                )
            )
        if fqn in self._computed:
            raise Unsupported(f"{fqn}: is tied, and changed by the adapter under two names: PEFT merges such a one")
        return fqn

    def _turned(self, module: str, parts: Mapping[str, str], shape: tuple[int, ...]) -> bool:
        """Whether a weight is stored as (in, out). Mismatch for one that the adapter does not fit."""
        infos = {name: self._adapter.manifest.tensors[fqn] for name, fqn in parts.items()}
        embedding = "lora_A.weight" not in parts
        a, b = (infos[n].shape for n in (_EMBEDDING if embedding else _LINEAR))
        if len(a) != 2 or len(b) != 2 or len(shape) != 2:
            raise Unsupported(f"{module}: a weight of {max(len(a), len(shape))} dimensions is left to PEFT to merge")
        fits = {turned for turned, made in ((False, (b[0], a[1])), (True, (a[1], b[0]))) if made == shape}
        fits &= {True} if embedding else {False, True}
        lengths = {prod(infos[name].shape) for name in parts.keys() & _BESIDE}
        if not fits or a[0] != b[1] or not lengths <= {b[0]} or any(i.dtype not in _FLOATS for i in infos.values()):
            told = ", ".join(f"{name} {list(i.shape)} {i.dtype}" for name, i in sorted(infos.items()))
            raise Mismatch(f"{module}: the weight is of shape {list(shape)}, the adapter has {told}")
        if len(fits) == 1:
            return fits.pop()
        if self._adapter.transposed is not None:
            return module.removeprefix(ROOT) in self._adapter.transposed
        return bool(self._adapter.config.get("fan_in_fan_out"))


def _in_file(file: int, info: TensorInfo) -> TensorInfo:
    """A tensor as one whole, so that it is made once."""
    return replace(info, partition=Grid(info.shape, ((),) * len(info.shape), file))


def _layers(adapter: Alone) -> dict[str, dict[str, str]]:
    """Fqns of an adapter by module, and by what they are there."""
    found: dict[str, dict[str, str]] = {}
    for fqn in adapter.manifest.tensors:
        part = part_of(fqn.removeprefix(LEAD))
        if part and part.part != "modules_to_save":
            found.setdefault(part.module, {})[part.part + part.rest] = fqn
    return found


def _scaling(adapter: Alone, module: str, parts: Mapping[str, str]) -> float:
    """Alpha over the rank, or over its root. The rank is what the matrices have."""
    config = adapter.config
    patterns = config.get("alpha_pattern") or {}
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module.removeprefix(ROOT))), None)
    alpha = patterns[key] if key is not None else config.get("lora_alpha", 8)
    rank = adapter.manifest.tensors[parts.get("lora_A.weight") or parts["lora_embedding_A"]].shape[0]
    return alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank  # type: ignore[no-any-return]


def _refuse_unknown(adapter: Alone) -> None:
    odd = sorted(key for key, value in adapter.config.items() if value and key not in _PLAIN)
    if adapter.config.get("init_lora_weights") == "mica":
        odd.append("init_lora_weights")
    if odd:
        said = ", ".join(f"{key}={adapter.config[key]!r:.60}" for key in odd)
        raise Unsupported(f"{adapter.name}: an adapter with {said} is not merged here: PEFT's merge_and_unload does it")


def _refuse_changed_base(config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights", True)
    if not any(start is kept or (isinstance(kept, str) and start == kept) for kept in _BASE_KEPT):
        raise Unsupported(
            f"init_lora_weights={start!r} changed the base model before training: a base from elsewhere is not it. "
            "Without --base, the checkpoint's own is taken"
        )


def _aligned(adapter: Alone, base: Checkpoint) -> dict[str, str]:
    """Names of the adapter's modules as a base has them that was saved from the inside of the model, or the outside."""
    modules = {m.removeprefix(ROOT) for m in _layers(adapter)}
    names = {n.removeprefix(LEAD) for n in (*base.manifest.tensors, *base.manifest.aliases) if n.startswith(LEAD)}
    leads = sorted({n.partition(".")[0] for n in names})
    inner = {m: m.partition(".")[2] for m in modules}
    for called in ({}, inner, *({m: f"{lead}.{m}" for m in modules} for lead in leads)):
        if all(f"{called.get(m, m)}.weight" in names for m in modules):
            return called
    return {}


def _perhaps_tied(base: Checkpoint, adapter: Alone, merged: Checkpoint) -> list[str]:
    """Notes of matrices that the adapter has as a whole, and to which a base from elsewhere may tie another."""
    found = []
    shapes = [info.shape for info in merged.manifest.tensors.values()]
    for fqn, info in adapter.manifest.tensors.items():
        part = part_of(fqn.removeprefix(LEAD))
        if part and part.part == "modules_to_save" and len(info.shape) == 2 and shapes.count(info.shape) == 1:
            name = f"{part.module.removeprefix(ROOT)}{part.rest}"
            found.append(
                f"{name}: is the adapter's. If the base ties another weight to it, such as lm_head, PEFT leaves that "
                "as it was, and this has only one: merge a checkpoint that holds both"
            )
    return found if base.foreign else []
