"""The rows that a plan is made of, when nothing is trained: read and encoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from inlay.memory.devices import Device
from inlay.memory.skeleton import config_of
from inlay.model.load.causal import check_writes
from inlay.model.load.folder import located
from inlay.model.load.libraries import quiet_transformers
from inlay.model.load.tokenizer import has_tokenizer
from inlay.run.config import RunConfig
from inlay.train.planning import PlannedRows
from inlay.train.rows import rows_of_run
from inlay.train.task import TASKS


def rows_to_plan(
    config: RunConfig, device: Device, has_data: bool
) -> Callable[[RunConfig], PlannedRows]:
    """Return what works out a run's largest batch, also of the run under other keys.

    Without data, or without a tokenizer to encode them, rows are taken to be of full length.
    """
    task = TASKS[config.task]
    shape, where = config_of(config.model, config.revision)
    if not task.has_head:
        check_writes(shape)
    run, encoded = task.run(config), list[Any]()
    if has_data and (not where.exists() or has_tokenizer(where)) and config.packing != "bfd":
        rows = rows_of_run(config)
        with quiet_transformers():
            run.read_by(located(config.model, config.revision), rows.train.pictured)
        run.learn(rows)
        encoded = run.encode(rows.train)
    return lambda changed: run.changed(changed).to_plan(encoded, device)
