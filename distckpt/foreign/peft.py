"""PEFT's directory of one adapter: adapter_model.safetensors, adapter_config.json. Read, written, and its names.

A model's state dict names an adapter's tensors with the adapter's own name, `...q_proj.lora_A.default.weight`; the file
leaves it out. Names here are those of the state dict, and an adapter that was read is called `default`.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt.adapters.peft import NAME, ROOT
from distckpt.errors import FormatError, Mismatch, NotACheckpoint
from distckpt.foreign.files import PlainFile, read_bytes
from distckpt.foreign.safetensors import read_safetensors
from distckpt.foreign.safetensors_write import LEAD, safetensors_file
from distckpt.foreign.sink import Sink
from distckpt.format.text import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from distckpt.foreign.described import Directory
    from distckpt.loading.open import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DEFAULT = "default"
_MOST = 64 << 20

_OWN = re.compile(r"(?P<module>.+)\.(?P<part>lora_\w+|trainable_tokens_delta)\.(?P<adapter>[^.]+)(?P<rest>\.\w+)?")
_COPY = re.compile(r"(?P<module>.+)\.(?P<part>modules_to_save)\.(?P<adapter>[^.]+)(?P<rest>\..+)")
_IN_FILE = re.compile(r"(?P<module>.+)\.(?P<part>lora_\w+|trainable_tokens_delta)(?P<rest>\.(?:weight|bias))?")


class Part(NamedTuple):
    """A tensor of an adapter: of which module, what it is there, of which adapter, and what follows that name."""

    module: str
    part: str
    adapter: str
    rest: str

    @property
    def name(self) -> str:
        """Its name in a state dict."""
        return f"{self.module}.{self.part}.{self.adapter}{self.rest}"

    @property
    def in_file(self) -> str:
        """Its name in PEFT's file."""
        if self.part == "modules_to_save":
            return self.module + self.rest
        return f"{self.module}.{self.part}" + ("" if self.part == "lora_magnitude_vector" else self.rest)


def part_of(name: str) -> Part | None:
    """What a tensor of this name in a state dict is of an adapter; None where it is of none."""
    match = _COPY.fullmatch(name) or _OWN.fullmatch(name)
    return Part(match["module"], match["part"], match["adapter"], match["rest"] or "") if match else None


def is_peft(names: list[str]) -> bool:
    """Whether a directory of these files is an adapter's, and not also a model's."""
    weights = [n for n in names if n.endswith((".safetensors", ".safetensors.index.json"))]
    return CONFIG in names and weights == [WEIGHTS]


def read_peft(path: Path) -> Directory:
    """Describe an adapter's directory. FormatError, Corrupt."""
    config = read_config(path)
    found = read_safetensors(path / WEIGHTS)
    found.tree = {
        "model": {_live(name, config): tensor for name, tensor in found.tree["model"].items()},
        NAME: {DEFAULT: {"config": config}},
    }
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Configuration of the adapter in a directory. NotACheckpoint where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        raise NotACheckpoint(f"{path}: does not exist; PEFT writes it beside an adapter")
    file = PlainFile(path)
    return checked_config(read_json(read_bytes(file, 0, min(file.size, _MOST))), str(path))


def checked_config(config: Any, where: str) -> dict[str, Any]:
    """Configuration of an adapter. FormatError, with the member, for one that has it in another form than PEFT."""
    if not isinstance(config, dict):
        raise FormatError(f"{where}: is no JSON object")
    patterns = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha", 8), *(patterns.values() if isinstance(patterns, dict) else ())]
    copies = config.get("modules_to_save") or []
    for member, fine in (
        ("peft_type", isinstance(config.get("peft_type"), str)),
        ("alpha_pattern", isinstance(patterns, dict) and all(map(_is_pattern, patterns))),
        ("lora_alpha, or alpha_pattern", all(type(n) in {int, float} for n in numbers)),
        ("modules_to_save", isinstance(copies, list) and all(isinstance(name, str) for name in copies)),
    ):
        if not fine:
            raise FormatError(f"{where}: {member} is not as PEFT writes it")
    return config


def _is_pattern(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True


def _live(name: str, config: Mapping[str, Any]) -> str:
    """Name in a state dict of what PEFT's file calls so."""
    if match := _IN_FILE.fullmatch(name):
        rest = ".weight" if match["part"] == "lora_magnitude_vector" else match["rest"] or ""
        return Part(match["module"], match["part"], DEFAULT, rest).name
    copies = config.get("modules_to_save") or []
    steps = name.split(".")
    for count in range(1, len(steps)):
        module = ".".join(steps[:count])
        if any(module.endswith(target) for target in copies):  # PEFT's own rule: `norm` is input_layernorm, too
            return Part(module, "modules_to_save", DEFAULT, name.removeprefix(module)).name
    return name


def peft_sink(checkpoint: Checkpoint, room: int) -> Sink:
    """Plan the two files of an adapter's directory. Mismatch for a checkpoint that is no adapter alone."""
    config: Any = None
    match checkpoint.object(NAME) if NAME in checkpoint.manifest.objects else None:
        case {"default": {"config": dict(config)}}:
            pass
    names = {fqn: fqn.removeprefix(LEAD) for fqn in checkpoint.manifest.tensors if fqn.startswith(LEAD)}
    if not config or any(not name.startswith(ROOT) for name in names.values()):
        raise Mismatch(f"{checkpoint.name}: is not an adapter of PEFT alone")
    in_file = {fqn: part.in_file if (part := part_of(name)) else name for fqn, name in names.items()}
    written = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    output = safetensors_file(checkpoint, WEIGHTS, in_file, room)
    return Sink([output], lambda _: [(CONFIG, written)])
