"""A number that a model gives on a fixed batch: recorded at saves, and asked again after loads.

Weights that are not what was saved, or are computed with otherwise, show here at once, and not as a loss that is
somewhat worse for hours. Asking disturbs nothing: no gradients, no generator, no buffer, no module's mode.
"""

from __future__ import annotations

import math
import struct
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distckpt.comm import together
from distckpt.errors import StateWarning, failure_text
from distckpt.run import rng

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from distckpt.comm import Comm
    from distckpt.loading.report import LoadReport
    from distckpt.run.trainstate import TrainState

NAME = "probe"
"""Metric that the number is recorded as."""

_SAID = struct.Struct("<dd")

_CAUSES = """\
What usually makes it another:
  - weights that did not come from the checkpoint: `missing` in the report, strict=False, rename=, an EMA swapped in
  - another batch, or another tokenizer: is the batch made anew at each start? TrainState(tokenizer=...) compares them
  - another precision: dtype of the weights, autocast, TF32, another attention kernel
  - dropout or batch statistics: a probe that calls model.train()
  - other code: TrainState(code_version=...) compares it
A loss that jumps where the probe does not: look at the learning rate and its schedule, the optimizer's state, the
generators, and the position in the data. `distckpt selftest` finds which, and `distckpt diff` compares checkpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """When to ask, and what counts as the same.

    fn: a number, such as the loss on one batch that is the same in every launch. Called on every rank at the same
    point, so that it may do collectives; what ranks say is averaged. Models are in eval mode then, without gradients,
    and the generators have the same seed each time. with_metric: ask only at saves that come with this metric, as those
    among which `keep` looks for the best; None: at every save. It costs training what one call takes. rel: how far it
    may be off on another number of ranks, relative. exact: whether on as many ranks it must be the same bit for bit.
    """

    fn: Callable[[], Any]
    with_metric: str | None = None
    rel: float = 1e-3
    exact: bool = True

    def __post_init__(self) -> None:
        if not callable(self.fn) or not 0 <= self.rel < math.inf:
            raise ValueError(f"probe={self.fn!r}, rel={self.rel!r}: a function, and how far it may be off (0.001)")


class Probing:
    """The probe of a Checkpointer; None of it where there is no probe. Collective, all of it."""

    def __init__(self, comm: Comm, probe: Probe | Callable[[], Any] | None) -> None:
        self._comm, self.seconds = comm, 0.0  # of which every rank thinks the same
        self.probe = probe if isinstance(probe, Probe) or probe is None else Probe(fn=probe)

    def hurry(self, seconds_left: float) -> None:
        """Ask no more if there is not much more time than asking takes: what is saved now counts for more."""
        if seconds_left < 2 * self.seconds:
            self.probe = None

    def recorded(self, state: TrainState, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """Metrics of a save, with what the probe says. A probe that fails costs no save: StateWarning."""
        if self.probe is None or state.unusable:
            return metrics
        if NAME in metrics:
            raise ValueError(f"metrics: {NAME!r} is what Checkpointer(probe=) records; call yours something else")
        if (name := self.probe.with_metric) is not None:
            told = together(self._comm, "looking for the metric of the probe", lambda: bytes([name in metrics]))
            if told[0] == b"\0":
                return metrics
        now = self._ask(state, "it is not recorded with this save")
        return metrics if now is None else {**metrics, NAME: now}

    def compare(
        self,
        state: TrainState,
        report: LoadReport,
        only: tuple[str, ...] | None,
        tell: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Ask again after a load, and say in the report, and with a StateWarning, if it is something else."""
        was = report.metrics.get(NAME)
        if self.probe is None or type(was) is not float or not (only is None or "model" in only):
            return
        now = self._ask(state, "it is not compared")
        if now is None:
            return
        alike = self._comm.world_size == report.world_size
        rel = 0.0 if alike and self.probe.exact else self.probe.rel
        if now == was or (math.isnan(now) and math.isnan(was)) or abs(now - was) <= rel * max(abs(was), abs(now)):
            report.notes.append(f"probe: {now:.9g}, recorded was {was:.9g}")
            return
        off = f"{abs(now - was) / abs(was):.2g} of it" if was and math.isfinite(now - was) else f"{now - was:.2g}"
        allowed = f"{rel:g}, relative" if rel else f"nothing, on {report.world_size} rank(s) as when it was saved"
        why = (
            f"the probe says {now!r}, and when step {report.step} was saved it said {was!r}: off by {off}; allowed is "
            f"{allowed}"
        )
        report.notes.append(why)
        tell("probe", step=report.step, was=was, now=now)
        changed = "".join(f"\nSince then: {note}" for note in report.notes if ": was " in note)
        warnings.warn(f"{why}{changed}\n{_CAUSES}", StateWarning, stacklevel=4)

    def _ask(self, state: TrainState, otherwise: str) -> float | None:
        """What the probe says, the same on every rank; None, with a StateWarning, where it fails on any."""
        try:
            told = together(self._comm, "asking the probe", lambda: self._said(state))
        except Exception as e:  # noqa: BLE001  whatever it raises: the save, or the load, is worth more
            warnings.warn(f"the probe failed, so {otherwise}: {failure_text(e)}", StateWarning, stacklevel=6)
            return None
        numbers, seconds = zip(*map(_SAID.unpack, told), strict=True)
        self.seconds = max(seconds)
        return math.fsum(numbers) / len(numbers) if all(map(math.isfinite, numbers)) else math.nan

    def _said(self, state: TrainState) -> bytes:
        assert self.probe is not None
        started = time.monotonic()
        with _undisturbed(state):
            number = float(self.probe.fn())
        return _SAID.pack(number, time.monotonic() - started)


@contextmanager
def _undisturbed(state: TrainState) -> Iterator[None]:
    """Models in eval mode, no gradients, seeded generators; then all as it was."""
    generators = rng.get_state()
    modes = [(module, module.training) for model in state.models for module in model.modules()]
    try:
        rng.derive({}, NAME)
        for model in state.models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        rng.set_state(generators)
