"""Tags: `SAVE_DIR/TAG` is a checkpoint of ours where DeepSpeed would have its files, and `latest` names the newest.

A tag is a run of one step (see run/place.py): saved again, the new state replaces the old one as a whole. `latest` is
switched last, so it never names what is not committed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distckpt import comm as comms
from distckpt.adapters.slots import naming
from distckpt.adapters.zero.engine import model_of
from distckpt.comm import exchange, together
from distckpt.errors import Corrupt, Mismatch, NotACheckpoint, StateWarning, Unsupported
from distckpt.format.checksum import digest
from distckpt.format.layout import COMMIT
from distckpt.loading.plan import Options
from distckpt.run.choose import Search, load_newest
from distckpt.run.direct import save_to
from distckpt.run.history import History
from distckpt.run.place import place
from distckpt.run.trainstate import TrainState
from distckpt.state import State
from distckpt.store.base import write_all
from distckpt.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distckpt.comm import Comm

LATEST = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a checkpoint to load besides the model and the client state."""

    strict: bool
    optimizer: bool
    lr_scheduler: bool
    counters: bool

    def only(self) -> tuple[str, ...] | None:
        """Leads to load, None for all."""
        if self.optimizer and self.lr_scheduler and self.counters:
            return None
        wanted = (("optim", self.optimizer), ("lr_scheduler", self.lr_scheduler), ("deepspeed", self.counters))
        return ("model", "client_state", *(lead for lead, chosen in wanted if chosen))


class ClientState:
    """The dict that a script gives to save_checkpoint, and gets back from load_checkpoint."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.value = dict(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the dict."""
        return self.value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a saved dict."""
        self.value = state_dict


class Tags:
    """Saves and loads tags. Every method but `close` is collective. timeout: seconds any wait for ranks may last."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._comm: Comm | None = None
        self._broken: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """Engines that a load has left half-way, and since when."""

    def close(self) -> None:
        """Give back the process group."""
        if self._comm:
            self._comm.close()

    def _ranks(self) -> Comm:
        self._comm = self._comm or comms.default(self._timeout)
        return self._comm

    def _state(self, engine: Any, client: ClientState) -> TrainState:
        if engine.use_node_local_storage():
            raise Unsupported("checkpoint.use_node_local_storage: all ranks must see the same files: turn it off")
        state = TrainState(model=engine, rng=False, client_state=client)
        state.unusable = self._broken.get(engine)
        return state

    # -- save --------------------------------------------------------------------------------------------------------

    def save(
        self,
        engine: Any,
        save_dir: str,
        tag: str | None,
        client_state: Mapping[str, Any],
        *,
        latest: bool,
        without_frozen: bool,
    ) -> None:
        """Save an engine and the client's state as a tag (default: global_step<N>), and have `latest` name it."""
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
        ranks = self._ranks()
        _refuse_different(ranks, f"{save_dir}/{name}")
        state = self._state(engine, ClientState(client_state))

        def capture() -> State:
            captured = state.capture()
            return _without_frozen(captured, engine) if without_frozen else captured

        told = {"tag": name, "global_steps": engine.global_steps}
        save_to(place(Path(save_dir, name)), capture, ranks, metrics=told)

        def switch() -> None:
            if ranks.rank == 0:
                write_all(LocalStore(save_dir), LATEST, name.encode())

        if latest:
            together(ranks, f"switching {LATEST} to {name}", switch)

    # -- load --------------------------------------------------------------------------------------------------------

    def find(self, engine: Any, load_dir: str, tag: str | None) -> str | None:
        """Tag to load, None where it is not one of ours: nothing there, or DeepSpeed's own."""
        ranks = self._ranks()
        said = exchange(ranks, "looking for the tag", _look(engine, load_dir, tag) if ranks.rank == 0 else b"")[0]
        return said.decode() or None

    def load(
        self, engine: Any, load_dir: str, tag: str, choice: Choice, *, given: bool, custom_load_fn: Any
    ) -> tuple[str, dict[str, Any]]:
        """Load a tag; returns its path and the client's state.

        A damaged tag that was not asked for by name makes every rank fall back to the newest one before it.
        """
        if custom_load_fn is not None:
            raise Unsupported(
                "custom_load_fn: a checkpoint of distckpt has no state dict of the whole model to give it"
            )
        tried: list[str] = []
        while True:
            try:
                return self._load(engine, Path(load_dir, tag), choice)
            except Corrupt as damage:  # noqa: PERF203
                tried.append(tag)
                other = None if given else self._before(load_dir, tried)
                if other is None:
                    raise
                warnings.warn(f"falling back from tag {tag} to {other}: {damage}", StateWarning, stacklevel=3)
                tag = other

    def _load(self, engine: Any, path: Path, choice: Choice) -> tuple[str, dict[str, Any]]:
        client, where = ClientState({}), place(path)
        options = Options(
            strict=choice.strict, foreign=True, only=choice.only(), cast=True, per_rank={"client_state": "first"}
        )
        state = self._state(engine, client)
        try:
            loaded = load_newest(Search(self._ranks(), where.history, where.step), state, options)
        finally:
            if state.unusable:
                self._broken[engine] = state.unusable
            else:
                self._broken.pop(engine, None)
        if loaded is None:
            raise NotACheckpoint(f"{path} holds no committed checkpoint: {where.history.why_nothing()}")
        return str(path), client.value

    def _before(self, load_dir: str, tried: list[str]) -> str | None:
        """Newest tag of ours that has not been tried and can be opened."""
        ranks = self._ranks()
        said = exchange(ranks, "looking for an older tag", _newest(load_dir, tried) if ranks.rank == 0 else b"")[0]
        return said.decode() or None


def _without_frozen(state: State, engine: Any) -> State:
    named = naming(engine)
    frozen = {f"model.{named(name)}" for name, p in model_of(engine).named_parameters() if not p.requires_grad}
    kept = {fqn: tensor for fqn, tensor in state.tensors.items() if fqn not in frozen}
    aliases = {alias: fqn for alias, fqn in state.aliases.items() if fqn not in frozen}
    return State(kept, aliases, state.objects)


def _refuse_different(ranks: Comm, path: str) -> None:
    replies = together(ranks, "comparing tags", lambda: bytes.fromhex(digest(path.encode())))
    if different := [rank for rank, reply in enumerate(replies) if reply != replies[0]]:
        raise Mismatch(f"ranks {different[:16]} save another tag than rank 0; rank {ranks.rank} saves {path}")


def _look(engine: Any, load_dir: str, tag: str | None) -> bytes:
    """Tag to load if it is one of ours, else nothing. Asked on rank 0."""
    if tag is None:
        pointers = [Path(load_dir, name) for name in (f"{LATEST}_universal", LATEST)]
        pointer = next((p for p in pointers[not engine.load_universal_checkpoint() :] if p.is_file()), None)
        if pointer is None:
            return b""
        tag = pointer.read_text().strip()
    path = Path(load_dir, str(tag))
    ours = [p.stat().st_mtime for p in (path / COMMIT, *path.glob(f"step-*/{COMMIT}")) if p.is_file()]
    native = [p.stat().st_mtime for p in path.glob("*.pt")]
    if native and max(native) > max(ours, default=0):
        return b""
    return str(tag).encode() if place(path).history.directories() else b""


def _newest(load_dir: str, tried: list[str]) -> bytes:
    """Newest tag besides those tried. Asked on rank 0."""
    found = []
    for path in Path(load_dir).iterdir():
        if path.is_dir() and path.name not in tried:
            newest = next(History(LocalStore(path)).valid(), None)
            if newest and (said := newest.manifest.metrics.get("tag")):
                found.append((newest.manifest.metrics.get("global_steps", 0), newest.manifest.date, str(said)))
    return max(found)[2].encode() if found else b""
