"""A run that fails: whose fault it is, and where the last good state lies."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from inlay.errors import ModelError, TrainingError, first_line
from inlay.model.load.libraries import in_model_code
from inlay.train.output import checkpoints
from inlay.train.output.folder import RunFolder


@contextmanager
def naming_the_model(name: str) -> Generator[None]:
    """Say in a sentence where it is the model's own code that fails on the run's rows."""
    try:
        yield
    except Exception as error:
        if not in_model_code(error):
            raise
        raise ModelError(
            f"{name} cannot be trained on these rows: the model's own code ends in "
            f"{type(error).__name__}: {first_line(error)}. It may take other inputs than text, or "
            "miss tokens that its tokenizer should add; choose another model or task"
        ) from error


@contextmanager
def stopping(folder: RunFolder, record: dict[str, Any]) -> Generator[None]:
    """Write into run.json why a run stopped, and say where the last good state lies."""
    try:
        yield
    except TrainingError as error:
        last = checkpoints.latest(folder.checkpoints)
        where = f"; the last good state is {last}" if last else ""
        folder.write_record({**record, "stopped": str(error)})
        raise TrainingError(f"{error}{where}") from None
