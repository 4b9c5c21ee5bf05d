"""One life of a self-test (tools/selftest.py): trains and saves, or loads; then one more step. Notes what it saw."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distckpt import comm
from distckpt.errors import Unsupported
from distckpt.format.checksum import digest
from distckpt.run.checkpointer import Checkpointer
from distckpt.run.trainstate import TrainState
from distckpt.saving.objects import encoded
from distckpt.state import as_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from distckpt.state import State

_CHANGES = ("environment",)
"""Objects that are recorded, and not state."""


def main(arguments: list[str]) -> None:
    """Do what the arguments say: target, folder, steps, name of this life."""
    target, folder, steps, name = arguments
    state, step = _made(target)
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpointer(Path(folder) / "run", wait=True) as checkpointer:
            if name == "first":
                for _ in range(int(steps)):
                    step()
                checkpointer.save(int(steps), state)
            else:
                checkpointer.load(state)
            held = _seen(state.capture())
            loss = step()
            grad = _gradients(state, notes)
            after = _seen(state.capture())
        notes += [f"warned: {w.message}" for w in caught if issubclass(w.category, UserWarning)]
    rank = comm.current().rank
    said = {"loss": {"loss": _exact(loss)}, "held": held, "grad": grad, "state": after, "notes": notes}
    (Path(folder) / f"{name}-{rank:05d}.json").write_text(json.dumps(said))


def _made(target: str) -> tuple[TrainState, Callable[[], Any]]:
    module, _, name = target.partition(":")
    make = getattr(importlib.import_module(module), name, None)
    if not callable(make):
        raise Unsupported(f"{target}: {module} has no function {name!r}")
    made = make()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], TrainState) and callable(made[1])):
        raise Unsupported(f"{target} returned a {type(made).__qualname__}: (TrainState, step) is expected")
    return made[0], made[1]


def _seen(state: State) -> dict[str, str]:
    """Digest of each value that this rank holds."""
    found = {
        fqn: digest(*(as_bytes(s.tensor.detach().cpu().contiguous()) for s in whole.shards))
        for fqn, whole in state.tensors.items()
    }
    return found | {name: digest(data) for name, data in encoded(state).items() if name not in _CHANGES}


def _gradients(state: TrainState, notes: list[str]) -> dict[str, str]:
    try:
        return _seen(state.gradients())
    except Unsupported as e:
        notes.append(f"gradients are not compared: {e}")
        return {}


def _exact(loss: Any) -> str:
    """A loss as text: equal only if the numbers are."""
    value = float(loss.detach().item() if hasattr(loss, "detach") else loss)
    return repr(value)


if __name__ == "__main__":
    main(sys.argv[1:])
