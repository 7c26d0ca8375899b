"""One run from its keys to its folder: the way in for the command and for Python."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from inlay.methods.catalog import build_method
from inlay.run.config import RunConfig
from inlay.train.output.events import Event, OnEvent
from inlay.train.output.folder import open_folder
from inlay.train.processes.division import divided
from inlay.train.processes.world import joined
from inlay.train.rows import have_images
from inlay.train.running import Running, TrainResult
from inlay.train.tasks import TASKS


def train(config: RunConfig, *, on_event: OnEvent | None = None) -> TrainResult:
    """Train an adapter as a run says, measure it, and leave everything in the output folder.

    Data and output are checked before the model is loaded. A run that was killed goes on with
    `resume` from its last complete checkpoint and ends in the same adapter.

    Args:
        config: the run, as `load_config` returns it.
        on_event: told of every stage, step, held-out loss and checkpoint.

    Raises:
        InlayError: anything that is the user's to mend, in a sentence.
    """
    method = build_method(config.method, config.hyperparameters)
    with joined() as world:
        tell = on_event if on_event is not None and world.leads else ignore
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        own, share = divided(config, world)
        folder, state = world.from_leader(lambda: open_folder(config))
        if state == "finished":
            tell(Event("note", f"the run in {folder.path} has ended already; nothing is to do"))
            return TrainResult(folder, folder.record(), None, None, world.leads)
        with quiet_libraries():
            stages = import_module(loop_of(config)).Stages
            running: Running[Any] = stages(own, method, folder, tell)
            running.divide(config, share)
            return running.result()


def ignore(event: Event) -> None:
    """Tell nobody."""


def loop_of(config: RunConfig) -> str:
    """Return the module with the stages of a run; rows with images have their own."""
    return TASKS[config.task].images if have_images(config) else TASKS[config.task].loop


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Keep progress bars and chatter of the libraries off the terminal."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
