"""`distckpt import SOURCE RUN`: another tool's checkpoint, whatever it is, as a step of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distckpt.tools.copying import OF_ALL, answered, change_of, offer, source_of

if TYPE_CHECKING:
    import argparse

    from distckpt.tools.answer import Answer


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a Hugging Face or PEFT directory, a safetensors or torch.save file, a DCP directory, a DeepSpeed tag",
    )
    add("destination", metavar="RUN", help="directory or URI of the run that it becomes a step of")
    offer(parser, "step", "only", "rename", "dtype", "world-size", "name", "param-order", "verify", *OF_ALL)


def run(given: argparse.Namespace) -> Answer:
    """Answer the command."""
    from distckpt.tools.formats import Distckpt

    return answered(given, source_of(given), given.destination, Distckpt(), change_of(given, "distckpt"))
