"""A torchdata StatefulDataLoader: its position is each rank's own, and means nothing to another number of ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch
from distckpt.state import RankObject, State

if TYPE_CHECKING:
    from distckpt.run.trainstate import HasStateDict
    from distckpt.state import Saved

NAME = "dataloader"


class DataLoaderAdapter:
    """One rank's loader. At another world size it is refused, with what would repeat or be skipped."""

    def __init__(self, loader: HasStateDict) -> None:
        self._loader = loader

    def capture(self) -> State:
        """See Stateful.capture."""
        value = {"state": self._loader.state_dict(), "batch_size": getattr(self._loader, "batch_size", None)}
        return State(objects={NAME: RankObject(value, "derive")})

    def targets(self, saved: Saved) -> State:
        """See Stateful.targets."""
        if saved.resharded and NAME in saved.objects and saved.per_rank.get(NAME) != "first":
            raise Mismatch(_refusal(saved))
        return State(objects={NAME: True})

    def restore(self, saved: Saved) -> list[str]:
        """See Stateful.restore."""
        if NAME not in saved.objects:
            return []
        self._loader.load_state_dict(saved.objects[NAME]["state"])
        return [f"{NAME}: {_consequence(saved)}"] if saved.resharded else []


def _refusal(saved: Saved) -> str:
    saved_on, here = saved.world_size, saved.target_world_size
    return (
        f"{NAME}: saved on {saved_on} ranks, each with a position of its own; on {here} ranks {_consequence(saved)}. "
        f"Use ElasticSampler, which reshards, resume on {saved_on} ranks, or accept it with "
        f"per_rank={{'{NAME}': 'first'}}"
    )


def _consequence(saved: Saved) -> str:
    """Count what repeats or is skipped if each new rank goes on from a saved rank's position."""
    counts = [samples_of(saved.of_rank(NAME, rank)) for rank in range(saved.world_size)]
    if None in counts:
        return "samples would repeat or be skipped (the loader does not tell how many)"
    seen = [c for c in counts if c is not None]
    consumed = sum(seen)
    assumed = sum(seen[rank % saved.world_size] for rank in range(saved.target_world_size))
    if assumed > consumed:
        return f"{assumed - consumed} samples beyond the {consumed} already consumed would be skipped"
    return f"{consumed - assumed} of the {consumed} samples already consumed would repeat"


def samples_of(value: Any) -> int | None:
    """Samples that one rank's loader has yielded in this epoch, from the state that torchdata keeps."""
    state, batch_size = value["state"], value["batch_size"]
    if not isinstance(state, dict) or not isinstance(batch_size, int):
        return None
    batches = state.get("_num_yielded")
    if batches is None and "_snapshot" in state:
        batches = state["_snapshot"].get("_snapshot_step", 0) + state.get("_steps_since_snapshot", 0)
    return batches * batch_size if isinstance(batches, int) else None
