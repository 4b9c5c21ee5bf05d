"""`distckpt export RUN -o OUT`: the model's weights for those who use them, in the form that their tools read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from distckpt.errors import Mismatch
from distckpt.tools.copying import (
    OF_ALL,
    OF_DEEPSPEED,
    answered,
    change_of,
    format_at,
    format_of,
    offer,
    refuse_unused,
    source_of,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from distckpt.tools.answer import Answer
    from distckpt.tools.copy import Source
    from distckpt.tools.lora import Lora

CONFIG = "config.json"
_TO = ("hf", "peft", "safetensors", "torch", "dcp", "deepspeed")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("source", metavar="RUN", help="a run (its newest), a step, `best`, ...: a path or URI; or another tool's")
    add("-o", "--output", required=True, metavar="OUT", help="directory or file to make")
    add("--to", choices=_TO, help="format (default: by the name of OUT; a directory is hf, for from_pretrained)")
    add("--all", action="store_true", help="not the model alone: the optimizer and all other state, too")
    group = parser.add_argument_group("LoRA")
    group.add_argument("--merge", action="store_true", help="the base model with the adapter merged in")
    offer(group, "base", "adapter")
    offer(
        parser,
        "step",
        "only",
        "rename",
        "dtype",
        "shard-size",
        "config",
        "world-size",
        "name",
        "param-order",
        "verify",
        *OF_ALL,
    )
    offer(parser.add_argument_group("for --to deepspeed, which takes all state"), *OF_DEEPSPEED)


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    to = given.to or format_at(given.output, "hf")
    _refuse(given, to)
    config = next((d for d in (given.config, given.base) if d and (d / CONFIG).is_file()), given.config)
    source, change = source_of(given, _lora(given, to)), change_of(given, to)
    if to == "hf" and not given.merge:
        _refuse_others(source, given.only or [])
    made = format_of(given, to, str(config.resolve()) if config and to == "hf" else None)
    answer = answered(given, source, given.output, made, change)
    if to == "hf" and not config and answer.lines:
        answer = replace(
            answer, lines=[*answer.lines, "  note: without config.json and tokenizer: --config DIR has them"]
        )
    return answer


def _refuse(given: argparse.Namespace, to: str) -> None:
    """ValueError for options that do not go together. What is kept unless all is asked for: the model."""
    refuse_unused(given, to)
    if to == "hf" and format_at(given.output, "hf") != "hf":
        raise ValueError(f"{given.output}: --to hf makes a directory; for a single file, --to safetensors")
    if given.config and not given.merge and to not in {"hf", "peft"}:
        raise ValueError(f"--config is for --to hf or peft, and for --merge; {to} has no place for it")
    if given.base and not given.merge:
        raise ValueError("--base is for --merge")
    if given.adapter and not given.merge and to != "peft":
        raise ValueError("--adapter is for --merge, and for --to peft")
    if (given.all or given.only) and (given.merge or to == "peft"):
        raise ValueError("--merge and --to peft take what is the model's: neither --all nor --only goes with them")
    if given.all and given.only:
        raise ValueError("--all and --only: one of them")
    if to != "deepspeed" and not given.all and not given.only:
        given.only = ["model", "peft"] if to == "peft" else ["model"]


def _lora(given: argparse.Namespace, to: str) -> Lora | None:
    if not given.merge and to != "peft":
        return None
    from distckpt.tools.lora import Lora

    config, base = (str(path.resolve()) if path else None for path in (given.config, given.base))
    return Lora(name=given.adapter, config=config, merge=given.merge, base=base)


def _refuse_others(source: Source, only: Sequence[str]) -> None:
    """Mismatch for a model that PEFT has wrapped, and for several: transformers knows none of their names."""
    found = source.open()
    if any(name.startswith("model.base_model.model.") for name in found.manifest.tensors):
        raise Mismatch(f"{found.name}: holds a model with an adapter of PEFT: --merge, or --to peft for the adapter")
    match found.object("environment") if "environment" in found.manifest.objects else None:
        case {"parallelism": {**models}} if "model" not in models and list(only) == ["model"] and models:
            names = [str(name).removeprefix("model.") for name in models]
            raise Mismatch(
                f"{found.name}: holds the models {', '.join(names)}: which one? --only model.{names[0]} "
                f"--rename '^{names[0]}\\.='"
            )
