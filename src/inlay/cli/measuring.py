"""A tuned model with the run of the task that its rows are measured by."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from inlay.cli.rows import Measured, run_of
from inlay.cli.tuned import Tuned
from inlay.model.load.folder import located
from inlay.model.load.libraries import quiet_transformers
from inlay.train.task_run import TaskRun


def reading(found: Measured, base: str, revision: str | None) -> Any:
    run = found.task.run(found.config)
    with quiet_transformers():
        run.read_by(located(base, revision), found.rows.pictured)
    return run


def task_run_for(tuned: Tuned, model: PreTrainedModel, found: Measured) -> TaskRun[Any, Any]:
    """Raise DataError or ModelError where rows or model are not of the adapter's task."""
    run = reading(found, tuned.base, tuned.run.get("revision"))
    run.recall(model, found.rows, tuned.record)
    return run


def own_task_run(tuned: Tuned) -> TaskRun[Any, Any]:
    run = tuned.task.run(run_of(tuned, {}))
    with quiet_transformers():
        run.read_by(located(tuned.base, tuned.run.get("revision")), pictured=False)
    return run
