"""`distckpt export RUN -o OUT`: the model's weights for those who use them, in the form that their tools read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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

    from distckpt.tools.answer import Answer

_TO = ("hf", "safetensors", "torch", "dcp", "deepspeed")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add("source", metavar="RUN", help="a run (its newest), a step, `best`, ...: a path or URI; or another tool's")
    add("-o", "--output", required=True, metavar="OUT", help="directory or file to make")
    add("--to", choices=_TO, help="format (default: by the name of OUT; a directory is hf, for from_pretrained)")
    add("--all", action="store_true", help="not the model alone: the optimizer and all other state, too")
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
    refuse_unused(given, to)
    if to == "hf" and format_at(given.output, "hf") != "hf":
        raise ValueError(f"{given.output}: --to hf makes a directory; for a single file, --to safetensors")
    if given.all and given.only:
        raise ValueError("--all and --only: one of them")
    if to != "deepspeed" and not given.all and not given.only:
        given.only = ["model"]
    answer = answered(given, source_of(given), given.output, format_of(given, to), change_of(given, to))
    if to == "hf" and not given.config and answer.lines:
        answer = replace(
            answer, lines=[*answer.lines, "  note: without config.json and tokenizer: --config DIR has them"]
        )
    return answer
