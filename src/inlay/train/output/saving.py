"""The disk's errors while a run is saved, as a sentence for its user."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from inlay.errors import CheckpointError, TrainingError
from inlay.files import is_full


@contextmanager
def saving(what: str, path: Path) -> Generator[None]:
    """Turn the disk's errors into a sentence that says what could not be saved and where."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        reason = "the disk is full" if is_full(error) else str(error)
        raise TrainingError(
            f"{what} could not be saved in {path}: {reason}; what was saved before is intact. "
            "Free some space or mend the folder, then run the same command with --resume"
        ) from None
