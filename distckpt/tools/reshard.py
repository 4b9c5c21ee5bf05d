"""`distckpt reshard SRC DST`: any checkpoint that is read, as any that is written, nothing left out unasked."""

from __future__ import annotations

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

_TO = ("distckpt", "dcp", "deepspeed", "safetensors", "torch")


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "source", metavar="SRC", help="a run or a step of one (path or URI), a DCP directory, a DeepSpeed tag, ..."
    )
    parser.add_argument("destination", metavar="DST", help="a run's directory or URI, a directory, or a file, by --to")
    parser.add_argument("--to", choices=_TO, help="format (default: by the name of DST)")
    offer(
        parser, "step", "only", "rename", "dtype", "world-size", "shard-size", "name", "param-order", "verify", *OF_ALL
    )
    offer(parser.add_argument_group("for --to deepspeed"), *OF_DEEPSPEED)


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    to = given.to or format_at(given.destination)
    refuse_unused(given, to)
    return answered(given, source_of(given), given.destination, format_of(given, to), change_of(given, to))
