"""Making a committed checkpoint known: pointers and registry. What the writer process does last; imports no torch."""

from __future__ import annotations

import warnings
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from distckpt.errors import FormatError, StateWarning, StoreError

if TYPE_CHECKING:
    from distckpt.loading.open import Checkpoint
    from distckpt.run.history import History


def publish(history: History, checkpoint: Checkpoint) -> None:
    """Switch pointers and registry. They are hints: failing at them does not unmake the checkpoint."""
    try:
        history.publish(checkpoint)
    except (StoreError, FormatError) as e:
        warnings.warn(
            f"{checkpoint.directory} is committed, but last.json or meta.json could not be written: {e}",
            StateWarning,
            stacklevel=4,
        )


def now() -> str:
    """Time of day, as manifests and launch records have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
