"""`distckpt selftest MODULE:FUNCTION`: the cold restart of your own training, before it is needed.

FUNCTION takes nothing and returns (TrainState, step); `step()` does one optimizer step and returns its loss. A process
trains some steps, saves, and does one more step; two fresh processes load that checkpoint and do the same step. Loss,
gradients and state must be equal bit for bit. Two, so that training which is never the same twice is told apart from a
state that is not whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt.errors import Unsupported
from distckpt.tools.answer import Answer, seconds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

_SHOWN = 8
_SAID = 2000
_GRACE = 40.0  # seconds; torchrun gives its ranks 30
_CAUSES = {
    "held": "the checkpoint does not give back what was saved: the values named above come back changed. It is a fault "
    "of whatever has them (its state_dict and load_state_dict), or of distckpt: please report it",
    "missing": "something that the step depends on is not in the TrainState: the position in the data (sampler=, "
    "dataloader=), a random generator of your own (an extra value with state_dict), a schedule (lr_scheduler=), an "
    "average of weights, a buffer with persistent=False, a seed drawn at start-up, a precision set by the step",
    "random": "two processes that loaded the same checkpoint differ, too: the training is not deterministic by itself. "
    "Set torch.use_deterministic_algorithms(True), and look for time, hash order and threads in what it computes",
}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("target", metavar="MODULE:FUNCTION", help="what makes the training; found from here")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps before the save (default: 3)")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started by torchrun (default: one, without)")
    parser.add_argument("--timeout", type=seconds, default=600.0, help="seconds that each of the three runs may take")


def run(given: argparse.Namespace) -> Answer:
    """Answer the command. 1 where something differs."""
    if ":" not in given.target or given.steps < 0 or given.ranks < 1:
        raise ValueError(f"{given.target} --steps {given.steps} --ranks {given.ranks}: MODULE:FUNCTION, and counts")
    with tempfile.TemporaryDirectory(prefix="distckpt-selftest-") as folder:
        first = _life(given, Path(folder), "first")
        with ThreadPoolExecutor(2) as pool:
            again, twice = pool.map(lambda name: _life(given, Path(folder), name), ("again", "twice"))
    held = list(_differences("held", first, again))
    stepped = [d for part in ("loss", "grad", "state") for d in _differences(part, first, again)]
    random = bool([d for part in ("loss", "grad", "state") for d in _differences(part, again, twice)])
    cause = "held" if held else "random" if stepped and random else "missing" if stepped else ""
    value: dict[str, Any] = {
        "equal": not cause,
        "loss": [first[0]["loss"]["loss"], again[0]["loss"]["loss"]],
        "after_load": held,
        "after_step": stepped,
        "deterministic": not random,
        "cause": cause or None,
        "notes": again[0]["notes"],
    }
    return Answer(list(_lines(value, given, len(first[0]["state"]))), value, code=int(bool(cause)))


def _life(given: argparse.Namespace, folder: Path, name: str) -> list[dict[str, Any]]:
    """Run one process, or group of them; what each rank saw. Unsupported, with its last words, where it fails."""
    group = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(given.ranks)]
    command = [
        sys.executable,
        *(group if given.ranks > 1 else []),
        *("-m", "distckpt.tools.cold", given.target, str(folder), str(given.steps), name),
    ]
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(  # noqa: S603  this interpreter, and the user's own function
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            out, err = running.communicate(timeout=given.timeout)
        except subprocess.TimeoutExpired:
            _end(running)
            raise Unsupported(f"{given.target}: the run called {name} has not ended in {given.timeout:g} s") from None
    files = sorted(folder.glob(f"{name}-*.json"))
    if running.returncode or len(files) != given.ranks:
        said = (err or out).strip()[-_SAID:]
        raise Unsupported(f"{given.target}: the run called {name} failed with exit status {running.returncode}: {said}")
    return [json.loads(file.read_text()) for file in files]


def _end(running: subprocess.Popen[str]) -> None:
    """End a run. torchrun that is killed at once would leave its ranks behind; told to end, it ends them first."""
    running.terminate()
    try:
        running.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        running.kill()


def _differences(part: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Names in a part of what ranks saw that are not the same."""
    for rank, (one, other) in enumerate(zip(a, b, strict=True)):
        for name in sorted({*one[part], *other[part]}):
            if one[part].get(name) != other[part].get(name):
                yield name if len(a) == 1 else f"{name} (rank {rank})"


def _lines(value: Mapping[str, Any], given: argparse.Namespace, count: int) -> Iterator[str]:
    first, again = value["loss"]
    yield f"loss of step {given.steps + 1}: {first} without a restart, {again} after one"
    for when, names in (("load", value["after_load"]), ("step", value["after_step"])):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"after the {when} differ: {', '.join(names[:_SHOWN])}{more}"
    yield from value["notes"]
    if value["cause"]:
        yield f"NOT EQUAL: {_CAUSES[value['cause']]}"
    else:
        yield f"equal bit for bit: loss, gradients and {count} values of the state"
