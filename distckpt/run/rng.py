"""Random number generators: Python, NumPy, torch CPU and every CUDA device, each rank its own.

At another world size no rank's stream can go on as it was: each new rank derives seeds from a saved state, the two
world sizes and its rank. The same resume always derives the same.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distckpt.errors import Mismatch
from distckpt.format import objects
from distckpt.state import RankObject, State

if TYPE_CHECKING:
    from distckpt.state import Saved

NAME = "rng"


class RngAdapter:
    """The process's global generators. `enabled` False: not saved, and left alone by a load."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled

    def capture(self) -> State:
        """See Stateful.capture."""
        return State(objects={NAME: RankObject(get_state(), "derive")} if self._enabled else {})

    def targets(self, saved: Saved) -> State:  # noqa: ARG002
        """See Stateful.targets."""
        return State(objects={NAME: False})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        if not self._enabled:
            return []
        if NAME not in saved.objects:
            return ["rng: not in the checkpoint; the generators were left as they are"]
        if not saved.resharded:
            return set_state(saved.objects[NAME])
        derive(saved.objects[NAME], f"{saved.world_size}>{saved.target_world_size}:{saved.rank}")
        return [f"rng: derived for {saved.target_world_size} ranks from the states of {saved.world_size}"]


def get_state() -> dict[str, Any]:
    """State of every generator, as values that objects.encode takes."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002  the global generator is what training code draws from
    return {
        "python": random.getstate(),
        "numpy": (name, keys.astype("<u4").tobytes(), *rest),  # type: ignore[union-attr]
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
    }


def set_state(state: dict[str, Any]) -> list[str]:
    """Put every generator into this state. Mismatch if it is not one of `get_state`. Returns notes."""
    try:
        name, keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((name, np.frombuffer(keys, "<u4"), *rest))  # noqa: NPY002
        torch.set_rng_state(_tensor(state["torch"]))
        devices = torch.cuda.device_count()
        for device, saved in enumerate(state["cuda"][:devices]):
            torch.cuda.set_rng_state(_tensor(saved), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise Mismatch(f"rng: the saved state does not fit these generators: {e}") from e
    if len(state["cuda"]) > devices:
        return [f"rng: {len(state['cuda'])} CUDA generators saved, {devices} here: the others are dropped"]
    return []


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def derive(state: dict[str, Any], salt: str) -> None:
    """Seed every generator from a saved state and `salt`."""
    seed = hashlib.blake2b(objects.encode(state) + salt.encode(), digest_size=32).digest()
    random.seed(seed)
    np.random.seed(np.frombuffer(seed, "<u4"))  # noqa: NPY002
    number = int.from_bytes(seed[:8], "little")
    torch.manual_seed(number)
