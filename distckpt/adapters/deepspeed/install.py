"""`install()`: DeepSpeedEngine.save_checkpoint and .load_checkpoint, of every engine there is and will be, become ours.

Hugging Face Trainer and Accelerate call those two. DeepSpeed's own code is left with what only it can answer: where
there is no tag, and what a `custom_load_fn` does with one that DeepSpeed itself has saved.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from distckpt.adapters.deepspeed.tags import Choice, Tags
from distckpt.errors import Unsupported
from distckpt.signing import refuse_unsigned, trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def install(*, timeout: float = 600.0, wait: bool = True) -> Callable[[], None]:
    """Have engines save and load with distckpt. Returns what undoes it; called twice, it does nothing more.

    timeout: seconds that any wait for other ranks lasts at most. wait: whether save_checkpoint returns only when the
    tag is committed. False: once the state is staged; `latest` switches after the commit, and what makes a save fail is
    raised by the next save or load. Not for scripts that remove older tags by themselves. Imports deepspeed.
    """
    kind = importlib.import_module("deepspeed.runtime.engine").DeepSpeedEngine
    if hasattr(kind.save_checkpoint, "undo"):
        return kind.save_checkpoint.undo  # type: ignore[no-any-return]
    native_save, native_load, tags = kind.save_checkpoint, kind.load_checkpoint, Tags(timeout, wait=wait)

    @functools.wraps(native_save)
    def save_checkpoint(  # noqa: PLR0917
        self: Any,
        save_dir: str,
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,  # noqa: FBT001, FBT002  DeepSpeed's own signature
        exclude_frozen_parameters: bool = False,  # noqa: FBT001, FBT002
    ) -> bool:
        tags.save(self, save_dir, tag, client_state or {}, latest=save_latest, without_frozen=exclude_frozen_parameters)
        return True

    @functools.wraps(native_load)
    def load_checkpoint(  # noqa: PLR0917
        self: Any,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,  # noqa: FBT001, FBT002
        load_optimizer_states: bool = True,  # noqa: FBT001, FBT002
        load_lr_scheduler_states: bool = True,  # noqa: FBT001, FBT002
        load_module_only: bool = False,  # noqa: FBT001, FBT002
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> tuple[str | None, Any]:
        found = tags.find(self, load_dir, tag)
        if found is None or (found.native and custom_load_fn is not None):
            if found:
                refuse_unsigned(load_dir)
            elif trusted():
                return None, None  # it would look again, and load what has come meanwhile
            return native_load(  # type: ignore[no-any-return]
                self,
                load_dir,
                tag,
                load_module_strict,
                load_optimizer_states,
                load_lr_scheduler_states,
                load_module_only,
                custom_load_fn,
            )
        if custom_load_fn is not None:
            raise Unsupported(
                "custom_load_fn: a checkpoint of distckpt has no state dict of the whole model to give it"
            )
        choice = Choice(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            lr_scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
        )
        return tags.load(self, load_dir, found, choice)

    def undo() -> None:
        kind.save_checkpoint, kind.load_checkpoint = native_save, native_load
        tags.close()

    save_checkpoint.undo = undo  # type: ignore[attr-defined]
    kind.save_checkpoint, kind.load_checkpoint = save_checkpoint, load_checkpoint
    return undo
