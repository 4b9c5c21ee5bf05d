"""`distckpt.save` and `distckpt.load`: a state dict to a path and back, in one call each.

The same save and load as Checkpointer's: no planner, no gather of what ranks hold. What is written is an ordinary run.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from distckpt import __version__
from distckpt import comm as comms
from distckpt.adapters.statedict import StateDictAdapter
from distckpt.comm import together
from distckpt.errors import NotACheckpoint
from distckpt.loading.plan import Options
from distckpt.run.choose import Search, load_newest
from distckpt.run.place import Place, place
from distckpt.run.publish import now
from distckpt.run.save import SaveReport, plain_metrics
from distckpt.run.saver import Saver
from distckpt.run.source import foreign_root, load_source
from distckpt.saving.save import Request

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from distckpt.comm import Comm
    from distckpt.loading.report import LoadReport
    from distckpt.run.pending import PendingSave
    from distckpt.state import State
    from distckpt.store.base import Store


def save(
    path: str | os.PathLike[str] | Store,
    state_dict: dict[Any, Any],
    *,
    metrics: Mapping[str, Any] | None = None,
    check_replicas: bool = False,
    timeout: float = 600.0,
    comm: Comm | None = None,
) -> SaveReport:
    """Save a state dict, and return once it is committed and durable. Collective.

    path: a directory of its own, or one step of a run (`RUN/step-00001000`). Saved again, the new state replaces the
    old one as a whole; the one before is kept beside it. state_dict: nested dicts of tensors (DTensor, ShardedTensor,
    plain), NumPy arrays, Python values; at the top also objects with state_dict() and load_state_dict(). A value that
    differs between ranks is kept for each. metrics, check_replicas: as in Checkpointer.save. timeout: seconds that any
    wait for other ranks lasts at most.
    Raises on every rank what fails on any, with rank and cause; what the path held before is untouched then.
    """
    live = StateDictAdapter(state_dict)
    with _ranks(comm, timeout) as ranks, closing(Saver(ranks)) as saver:
        made = save_to(place(path), live.capture, saver, ranks, metrics=metrics or {}, check_replicas=check_replicas)
        assert isinstance(made, SaveReport)
        return made


def save_to(
    where: Place,
    capture: Callable[[], State],
    saver: Saver,
    ranks: Comm,
    *,
    metrics: Mapping[str, Any],
    check_replicas: bool = False,
    named_by: tuple[str, str] | None = None,
    wait: bool = True,
) -> SaveReport | PendingSave | None:
    """Save what `capture` gives as the newest generation of a place. Collective. named_by: see Then."""
    recorded = dict[str, Any]()

    def captured() -> State:
        recorded.update(plain_metrics(metrics))  # here, so that every rank learns of one that cannot be recorded
        return capture()

    said = together(ranks, "reading the run's launches", lambda: _number(where.launch() if not ranks.rank else 0))
    request = Request(
        step=where.step or 0,
        launch=int.from_bytes(said[0], "little"),
        date=now(),
        metrics=recorded,
        writer={"distckpt": __version__},
        generation=lambda: saver.next_generation(where.store, where.step or 0, where.generation_to_save()),
        check_replicas=check_replicas,
    )
    return saver.save(where.history, captured, request, where.then(named_by), wait=wait)


def load(
    path: str | os.PathLike[str] | Store,
    into: dict[Any, Any],
    *,
    strict: bool = True,
    only: tuple[str, ...] | None = None,
    cast: bool = False,
    per_rank: Mapping[str, str] | None = None,
    timeout: float = 600.0,
    comm: Comm | None = None,
) -> LoadReport:
    """Load into a state dict, in place. Collective.

    path: as in `save`; of a run's directory, the newest checkpoint; or what another tool saved (docs/foreign.md).
    Tensors are filled where they lie, at any world size and in any layout; other values are replaced. What dicts and
    optimizers of the checkpoint have besides is added. Options as in Checkpointer.load. A damaged checkpoint makes
    every rank fall back to the one before.
    NotACheckpoint where there is none. After another error than it, Mismatch or Unsupported, `into` may be a mix.
    """
    options = Options(strict=strict, only=only, cast=cast, per_rank=dict(per_rank or {}))
    live = StateDictAdapter(into, only)
    where = place(path)
    with _ranks(comm, timeout) as ranks:
        loaded = load_newest(Search(ranks, where.history, where.step), live, options)
        if loaded is None and (root := foreign_root(ranks, where.store)):
            return load_source(ranks, root, live, options, like=into if isinstance(into, dict) else None)
        if loaded is None:
            raise NotACheckpoint(f"{where.store} holds no committed checkpoint: {where.history.why_nothing()}")
        return loaded[0]


@contextmanager
def _ranks(given: Comm | None, timeout: float) -> Iterator[Comm]:
    """The caller's comm, or one for this call."""
    if given:
        yield given
        return
    with closing(comms.default(timeout)) as made:
        yield made


def _number(value: int) -> bytes:
    return value.to_bytes(8, "little")
