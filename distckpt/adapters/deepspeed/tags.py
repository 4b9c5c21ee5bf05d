"""Tags: `SAVE_DIR/TAG` is a checkpoint of ours where DeepSpeed would have its files, and `latest` names the newest.

A tag is a run of one step (see run/place.py): saved again, the new state replaces the old one as a whole. `latest` is
switched last, so it never names what is not committed. What DeepSpeed itself has saved is read by distckpt.foreign.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distckpt import comm as comms
from distckpt.adapters.slots import naming
from distckpt.adapters.zero.engine import model_of, optimizer_of
from distckpt.comm import exchange, together
from distckpt.errors import (
    Corrupt,
    FormatError,
    KeyMissing,
    Mismatch,
    NewerFormat,
    NotACheckpoint,
    StateWarning,
    Unsupported,
)
from distckpt.foreign.deepspeed_files import MODEL
from distckpt.format.checksum import digest
from distckpt.format.layout import COMMIT, StepDir
from distckpt.loading.plan import Options
from distckpt.run.choose import Search, load_newest
from distckpt.run.direct import save_to
from distckpt.run.place import Place, place
from distckpt.run.saver import Saver
from distckpt.run.source import load_foreign
from distckpt.run.trainstate import TrainState
from distckpt.state import State
from distckpt.store.base import read_all, write_all
from distckpt.store.open import is_uri, located, open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distckpt.comm import Comm

LATEST = "latest"
CLIENT = "client_state"
_MOST_NAME = 1 << 12
"""Bytes of a tag's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What of a checkpoint to load besides the model and the client state."""

    strict: bool
    optimizer: bool
    lr_scheduler: bool
    counters: bool

    def only(self, engine: Any) -> tuple[str, ...] | None:
        """Leads to load, None for all. What an engine does not have is not asked for."""
        has_optimizer = optimizer_of(engine) is not None
        if self.optimizer and self.lr_scheduler and self.counters and has_optimizer:
            return None
        wanted = {
            "optim": self.optimizer and has_optimizer,
            "lr_scheduler": self.lr_scheduler and engine.lr_scheduler is not None,
            "deepspeed": self.counters,
        }
        return ("model", CLIENT, *(lead for lead, chosen in wanted.items() if chosen))


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag that is there. native: DeepSpeed itself has saved it. given: the script asked for it by name."""

    name: str
    native: bool
    given: bool


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
    """Saves and loads tags. Collective. timeout: seconds any wait for ranks may last. wait: see `install`."""

    def __init__(self, timeout: float, *, wait: bool) -> None:
        self._timeout, self._wait = timeout, wait
        self._comm: Comm | None = None
        self._saves: Saver | None = None
        self._broken: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        """Engines that a load has left half-way, and since when."""

    def close(self) -> None:
        """Give back the process group."""
        try:
            if self._saves:
                self._saves.close()
        finally:
            if self._comm:
                self._comm.close()

    def _saver(self) -> Saver:
        self._saves = self._saves or Saver(self._ranks())
        return self._saves

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
        where, named_by = place(_of(save_dir, name)), (str(located(_of(save_dir, LATEST))), name)
        by_writer = named_by if latest and not self._wait else None
        save_to(where, capture, self._saver(), ranks, metrics=told, named_by=by_writer, wait=self._wait)

        def switch() -> None:
            if ranks.rank == 0:
                write_all(open_store(save_dir), LATEST, name.encode())

        if latest and self._wait:
            together(ranks, f"switching {LATEST} to {name}", switch)

    # -- load --------------------------------------------------------------------------------------------------------

    def find(self, engine: Any, load_dir: str, tag: str | None) -> Tag | None:
        """Tag to load, None where nothing is there."""
        if self._saves:
            self._saves.finish()
        said = self._told("looking for the tag", lambda: _look(engine, load_dir, tag))
        return Tag(said[1:], said[0] == _NATIVE, tag is not None) if said else None

    def load(self, engine: Any, load_dir: str, tag: Tag, choice: Choice) -> tuple[str, dict[str, Any]]:
        """Load a tag; returns its path and the client's state.

        A damaged tag that was not asked for by name makes every rank fall back to the newest of ours before it.
        """
        client = ClientState({})
        state = self._state(engine, client)
        options = Options(
            strict=choice.strict, foreign=True, only=choice.only(engine), cast=True, per_rank={CLIENT: "first"}
        )
        before = state.unusable
        try:
            path = self._load_or_fall_back(load_dir, tag, state, options)
            state.unusable = state.unusable and before  # what a damaged tag had left half-way is whole again
        except Mismatch as e:
            raise Mismatch(f"{e}\n{_LEAVE_OUT}") from e
        finally:
            if state.unusable:
                self._broken[engine] = state.unusable
            else:
                self._broken.pop(engine, None)
        return str(path), client.value

    def _load_or_fall_back(self, load_dir: str, tag: Tag, state: TrainState, options: Options) -> Path | str:
        tried: list[str] = []
        while True:
            path = _of(load_dir, tag.name)
            try:
                if tag.native:
                    load_foreign(self._ranks(), Path(path), state, options, rest=CLIENT)
                else:
                    self._load_own(place(path), state, options)
            except (Corrupt, FormatError, NotACheckpoint) as damage:
                tried.append(tag.name)
                final = tag.given or isinstance(damage, NewerFormat)
                other = None if final else self._before(load_dir, tried)
                if other is None:
                    raise
                warnings.warn(f"falling back from tag {tag.name} to {other}: {damage}", StateWarning, stacklevel=4)
                tag = Tag(other, native=False, given=False)
            else:
                return path

    def _load_own(self, where: Place, state: TrainState, options: Options) -> None:
        if load_newest(Search(self._ranks(), where.history, where.step), state, options) is None:
            raise NotACheckpoint(f"{where.store} holds no committed checkpoint: {where.history.why_nothing()}")

    def _before(self, load_dir: str, tried: list[str]) -> str | None:
        """Newest tag of ours that has not been tried, can be opened, and is not newer than the first one tried."""
        return self._told("looking for an older tag", lambda: _newest(load_dir, tried)) or None

    def _told(self, what: str, look: Callable[[], str]) -> str:
        """What rank 0 finds, on every rank; or what it failed at."""
        ranks, found = self._ranks(), b""

        def attempt() -> None:
            nonlocal found
            found = look().encode() if ranks.rank == 0 else b""

        together(ranks, what, attempt)
        return exchange(ranks, what, found)[0].decode()


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


_OWN, _NATIVE = "o", "n"
_LEAVE_OUT = (
    "What engine.load_checkpoint can leave out: load_module_strict=False (of the model, what only one of the two has), "
    "load_optimizer_states=False, load_module_only=True"
)


def _of(folder: str, name: str) -> Path | str:
    """Path or URI of what lies in a directory."""
    return f"{folder.rstrip('/')}/{name}" if is_uri(folder) else Path(folder, name)


def _look(engine: Any, load_dir: str, tag: str | None) -> str:
    """Tag to load, after a letter for whose it is; "" where there is none. Asked on rank 0."""
    if is_uri(load_dir):  # where DeepSpeed itself saves nothing
        with contextlib.suppress(KeyMissing):
            tag = tag or read_all(open_store(load_dir), LATEST, limit=_MOST_NAME).decode(errors="replace").strip()
        return f"{_OWN}{tag}" if tag and place(_of(load_dir, tag)).history.directories() else ""
    if tag is None:
        pointers = [Path(load_dir, name) for name in (f"{LATEST}_universal", LATEST)]
        pointer = next((p for p in pointers[not engine.load_universal_checkpoint() :] if p.is_file()), None)
        if pointer is None:
            return ""
        tag = pointer.read_text(errors="replace").strip()
    path = Path(load_dir, str(tag))
    native = [p.stat().st_mtime for p in path.glob("*.pt") if MODEL.fullmatch(p.name)]
    ours = [p.stat().st_mtime for p in (path / COMMIT, *path.glob(f"step-*/{COMMIT}")) if p.is_file()]
    if native and max(native) > max(ours, default=0):
        return f"{_NATIVE}{tag}"
    return f"{_OWN}{tag}" if place(path).history.directories() else ""


def _newest(load_dir: str, tried: list[str]) -> str:
    """Newest tag besides those tried, and not newer than the first of them, "" for none. Asked on rank 0."""
    parent = PurePosixPath(tried[0]).parent
    known = _age(_of(load_dir, tried[0]))
    found = []
    for entry in open_store(_of(load_dir, str(parent)) if parent.name else load_dir).list(""):
        name, directory = str(parent / entry.name), StepDir.parse(entry.name)
        if entry.size is None and name not in tried and (directory is None or directory.generation == 1):
            age = _age(_of(load_dir, name))
            if age and (known is None or age[0] <= known[0]):
                found.append((age, name))
    return max(found)[1] if found else ""


def _age(path: Path | str) -> tuple[float, str] | None:
    """(steps, date) of a tag of ours that can be opened."""
    where = place(path)
    newest = next((c for c in where.history.valid() if where.step in {None, c.directory.step}), None)
    if newest is None or "tag" not in newest.manifest.metrics:
        return None
    steps = newest.manifest.metrics.get("global_steps")
    return (steps if isinstance(steps, int) else 0), newest.manifest.date
