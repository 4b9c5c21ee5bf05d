"""What stands beside the weights in a Hugging Face directory: configuration, tokenizer, code. Copied, never run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distckpt.errors import FormatError, NotACheckpoint, StoreError
from distckpt.foreign.safetensors_write import LEAD
from distckpt.format.text import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from distckpt.foreign.sink import Sink
    from distckpt.loading.open import Checkpoint

CONFIG = "config.json"
_KINDS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_NOT = ("adapter_config.json", "trainer_state.json")
_MOST = 256 << 20


def with_companions(sink: Sink, checkpoint: Checkpoint, folder: Path) -> Sink:
    """Sink that also has the small files of a directory: config.json says the dtype that is written.

    NotACheckpoint where there is no config.json; FormatError where it is none.
    """
    if not (folder / CONFIG).is_file():
        raise NotACheckpoint(f"{folder}: has no {CONFIG}: give the directory of the model that training began from")
    config = _configuration(folder / CONFIG)
    dtypes = {i.dtype for n, i in checkpoint.manifest.tensors.items() if n.startswith(LEAD) and "float" in i.dtype}
    finish = sink.finish

    def complete(results: Mapping[str, Any]) -> list[tuple[str, bytes]]:
        found = {path.name: _content(path) for path in _companions(folder)}
        named = config.keys() & {"dtype", "torch_dtype"}
        if len(dtypes) == 1 and named:
            told = config | dict.fromkeys(named, *dtypes)
            found[CONFIG] = (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()
        return [*found.items(), *finish(results)]

    sink.finish = complete
    return sink


def _companions(folder: Path) -> list[Path]:
    """Small files of a directory that are no weights, nor an index of some, nor what training left there."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in _KINDS
        and path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(".index.json")
        and path.name not in _NOT
    ]


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST:
            raise StoreError(f"{path}: is larger than {_MOST >> 20} MiB: no configuration; move it elsewhere")
        return path.read_bytes()
    except OSError as e:
        if isinstance(e, StoreError):
            raise
        raise StoreError(f"cannot read {path}: {e.strerror}") from e


def _configuration(path: Path) -> dict[str, Any]:
    try:
        said = read_json(_content(path))
    except FormatError as e:
        raise FormatError(f"{path}: {e}") from e
    if not isinstance(said, dict):
        raise FormatError(f"{path}: is no JSON object")
    return said
