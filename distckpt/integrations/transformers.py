"""The Trainer of Hugging Face transformers, saving and resuming through a Checkpointer.

A callback cannot do this alone: when `on_train_begin` is called, the Trainer has already decided at which epoch and
batch it begins, and it tells a callback nothing that would change that. So it is a mixin, and what changes in a program
is the Trainer's class: `CheckpointedTrainer` for `Trainer`, or `class Mine(Checkpointed, SFTTrainer)`.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distckpt.errors import Mismatch, NotACheckpoint, StateWarning, Unsupported
from distckpt.run import rng
from distckpt.run.schedule import StepReport
from distckpt.run.trainstate import TrainState
from distckpt.signing import refuse_unsigned

try:
    from transformers import Trainer
    from transformers.trainer_callback import ExportableState, TrainerState
except ImportError as e:
    raise ImportError(f"this needs transformers and accelerate: pip install 'distckpt[hf]' ({e})") from e

_SEAMS = ("_prepare_for_training", "_run_epoch", "_load_rng_state", "_maybe_log_save_evaluate", "_save_checkpoint")
"""Methods of the Trainer that are taken over. One of another version that lacks them would not resume, in silence."""

if _lacking := [name for name in _SEAMS if not hasattr(Trainer, name)]:
    raise ImportError(f"the Trainer of this transformers has no {', '.join(_lacking)}: install another; 5.23 has them")

if TYPE_CHECKING:
    from distckpt.loading.report import LoadReport
    from distckpt.run.checkpointer import Checkpointer

_OF_THIS_RUN = {
    *("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "train_batch_size"),
    *("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search", "trial_name", "trial_params"),
}
"""Fields of a TrainerState that the arguments of this run decide, not what it did before."""

_HERE = "distckpt"
"""What the Trainer takes for the directory that it resumes from."""


class Checkpointed:
    """A Trainer of which `checkpointer` saves and resumes everything. To be named before the Trainer's own class.

    Weights, optimizer, scheduler, scaler, generators, the Trainer's state (step, epoch, log, callbacks), and with the
    step the position in the data. `train()` goes on from the newest valid checkpoint, or begins: on one process, under
    DDP, FSDP and DeepSpeed, on any number of ranks that makes the same global batch. `resume_from_checkpoint=False`
    does not resume; a path is left to the Trainer. A resume on as many ranks gives the losses of a run that went
    through, bit for bit, unless the data collator draws random numbers: the Trainer collates ahead of its generators.
    Where logging_steps is not 1, the first line after a resume is the mean of the steps since.

    Saves are those that `checkpointer` has due (`every=`) and those of save_strategy and save_steps (the Trainer's
    default is each 500 steps; "no" for none), and one at the end. Metrics that are logged or evaluated at the step are
    recorded: `keep=Keep(best=("eval_loss", "min", 2))`. With `preemption=True` training stops where the Checkpointer
    says so, and `stop` tells why: `leave(trainer.stop.exit_code)`. `resumed` is the report of the load, if there was
    something to load.

    checkpointer: made after the TrainingArguments, which start the process group.
    """

    args: Any
    state: Any
    control: Any
    model_wrapped: Any
    stop: StepReport
    resumed: LoadReport | None
    _generators: dict[str, Any] | None
    _saved: tuple[int, dict[str, float]]

    def __init__(self, *args: Any, checkpointer: Checkpointer, **options: Any) -> None:
        super().__init__(*args, **options)
        self.checkpointer = checkpointer
        self._begin(resumes=True)
        if self.args.save_total_limit is not None:
            why = "save_total_limit is of the Trainer's own checkpoints: give Checkpointer(keep=Keep(last=...))"
            warnings.warn(why, StateWarning, stacklevel=2)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001
        *args: Any,
        **options: Any,
    ) -> Any:
        """See Trainer.train, and the class."""
        self._begin(resumes=resume_from_checkpoint in {None, True})
        native = resume_from_checkpoint if isinstance(resume_from_checkpoint, str) else None
        if native:
            refuse_unsigned(native)
        return super().train(native, *args, **options)  # type: ignore[misc]

    def _begin(self, *, resumes: bool) -> None:
        self.stop, self.resumed = StepReport(), None
        self._resumes, self._resumed_at, self._generators = resumes, 0, None
        self._asked, self._seen, self._saved = False, -1, (-1, {})

    # -- resume ------------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        """Make model, optimizer and scheduler, and resume into them."""
        made = super()._prepare_for_training(*args, **options)  # type: ignore[misc]
        self._train_state = _train_state(self)
        self.resumed = self.checkpointer.resume(self._train_state) if self._resumes else None
        if self.resumed:
            self._generators, self._resumed_at = rng.get_state(), self.state.global_step
            self._saved = (self._resumed_at, {})
        return made

    def _run_epoch(self, *args: Any, **known: Any) -> None:
        """Train for an epoch: of the one that was left, the rest; of those before it, nothing."""
        if self._generators is not None:
            first, done = divmod(self._resumed_at, known["num_update_steps_per_epoch"])
            if known["epoch"] < first or self.state.global_step >= self.state.max_steps:
                return
            skipped = 0 if self.args.ignore_data_skip else done * self.args.gradient_accumulation_steps
            known |= {"resume_from_checkpoint": _HERE, "epochs_trained": first}
            known["steps_trained_in_current_epoch"] = skipped
        super()._run_epoch(*args, **known)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the generators, once the data are where they were."""
        if checkpoint == _HERE:
            assert self._generators is not None
            rng.set_state(self._generators)
        else:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        """Load the weights that had the best metric."""
        if self.stop.should_stop:
            return
        state, step = TrainState(model=self.model_wrapped, rng=False), self.state.best_global_step
        try:
            self.checkpointer.load(state, step=step, only=("model",))
        except NotACheckpoint as e:
            how = f"Keep(best=({self.args.metric_for_best_model!r}, ...)) keeps it"
            warnings.warn(
                f"the weights stay those of the last step, not of step {step}: {e}; {how}", StateWarning, stacklevel=2
            )

    # -- save --------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Log and evaluate, and save at most once: as the arguments say, as the Checkpointer says, or at the end."""
        if self.stop.should_stop:  # at the end of the epoch that is left: there is no time to evaluate
            return
        self._asked = False
        super()._maybe_log_save_evaluate(*args, **options)  # type: ignore[misc]
        step, metrics = self.state.global_step, self._metrics()
        if step != self._seen:  # it comes again at the end of an epoch
            self._seen = step
            self.stop = self.checkpointer.step(step, self._train_state, metrics)
            if self.stop.saved:
                self._saved = (step, metrics)
        if self.stop.should_stop:
            self.control.should_training_stop = True
        elif (self._asked and self._saved != (step, metrics)) or (
            self.control.should_training_stop and self._saved[0] != step
        ):
            self._saved = (step, metrics)
            self.checkpointer.save(step, self._train_state, metrics)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002
        """Note that the arguments ask for a save."""
        if trial is not None:
            raise Unsupported("hyperparameter_search: each trial is a run of its own: use the Trainer of transformers")
        self._asked = True
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = f"step {self.state.best_global_step}"

    def _metrics(self) -> dict[str, float]:
        """Numbers that were logged at this step."""
        now = [entry for entry in self.state.log_history[-8:] if entry.get("step") == self.state.global_step]
        numbers = {k: v for entry in now for k, v in entry.items() if isinstance(v, float)}
        return {k: v for k, v in numbers.items() if k != "epoch"}


class CheckpointedTrainer(Checkpointed, Trainer):  # type: ignore[misc]
    """The Trainer of transformers, with `checkpointer=` more."""


def _train_state(trainer: Any) -> TrainState:
    """What there is to save of a Trainer that is about to train."""
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
    brings_its_own = engine is not None and engine.lr_scheduler is not None
    return TrainState(
        model=trainer.model_wrapped,
        optimizer=None if engine is not None else getattr(trainer.optimizer, "optimizer", trainer.optimizer),
        lr_scheduler=None if brings_its_own else trainer.lr_scheduler,
        scaler=None if engine is not None else trainer.accelerator.scaler,
        progress=_Position(trainer),
        tokenizer=trainer.processing_class,
    )


class _Position:
    """Where a Trainer is: its state, and the sums that its next log line is made of."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def epoch(self) -> int:
        return int(self._trainer.state.epoch or 0)

    @property
    def samples_seen(self) -> int:
        return int(self._trainer.state.global_step * self._batch)

    @property
    def _batch(self) -> int:
        """Samples of a step, over all ranks."""
        return int(self._trainer.get_total_train_batch_size(self._trainer.args))

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        callbacks = [
            c for c in [*trainer.callback_handler.callbacks, trainer.control] if isinstance(c, ExportableState)
        ]
        trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
        kept = {name: value for name, value in asdict(trainer.state).items() if name not in _OF_THIS_RUN}
        said: dict[str, Any] = json.loads(json.dumps(kept))  # as the Trainer itself would keep it
        return said | {"global_batch": self._batch}

    def check_state_dict(self, state_dict: Any) -> None:
        if not isinstance(state_dict, dict) or type(state_dict.get("global_step")) is not int:
            raise Mismatch(
                f"trainer_state: expected that of a Trainer, with its global_step; found {state_dict!r:.200}"
            )
        before, skips = state_dict.get("global_batch"), not self._trainer.args.ignore_data_skip
        if skips and before is not None and before != self._batch:
            raise Mismatch(
                f"trainer_state: was saved with {before} samples a step over all ranks, here are {self._batch}: the "
                "position in the data is counted in steps. Change per_device_train_batch_size or "
                f"gradient_accumulation_steps to make it {before}, or begin the epoch anew with ignore_data_skip=True"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict.items():
            if name not in _OF_THIS_RUN and hasattr(self._trainer.state, name):
                setattr(self._trainer.state, name, value)
        self._trainer._load_callback_state()
