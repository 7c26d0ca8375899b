"""One run from its keys to its folder: the way in for the command and for Python."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from inlay.methods.catalog import build_method
from inlay.model.process import restored, threads
from inlay.run.config import RunConfig
from inlay.train.output.events import Event, OnEvent
from inlay.train.output.folder import open_folder
from inlay.train.processes.division import divided
from inlay.train.processes.world import joined
from inlay.train.stages import Stages, TrainResult
from inlay.train.task import TASKS
from inlay.train.task_run import ignore


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
    with restored(), joined() as world, threads(config.threads):
        tell = on_event if on_event is not None and world.leads else ignore
        own, share = divided(config, world)
        folder, state = world.from_leader(lambda: open_folder(config))
        if state == "finished":
            tell(Event("note", f"the run in {folder.path} is already finished"))
            return TrainResult(folder, folder.record(), None, None, world.leads)
        with quiet_libraries():
            task = TASKS[config.task].run(own)
            task.asked, task.share, task.tell = config, share, tell
            return Stages(task, method, folder, share).result()


@contextmanager
def quiet_libraries() -> Generator[None]:
    """Keep progress bars and chatter of the libraries off the terminal."""
    level, bars = transformers_logging.get_verbosity(), not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
