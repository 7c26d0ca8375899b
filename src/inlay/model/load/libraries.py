"""Other people's libraries while they read a model: quiet, and their failures as sentences."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import progress_bar_states
from transformers.utils import logging as transformers_logging

from inlay.errors import ModelError, first_line
from inlay.model.load.hf_quantizer import Stopped


@contextmanager
def failures_as_sentences(folder: Path, what: str) -> Generator[None]:
    try:
        yield
    except Stopped as stopped:
        raise stopped.error from None
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(f"the {what} in {folder} cannot be used: {reason}") from error


MODEL_CODE = re.compile(
    r"/transformers/(models/|integrations/|loss/|masking_utils|modeling_|utils/|cache_utils|pytorch_utils)"
)
"""The files of transformers that a model's forward is made of."""


def in_model_code(error: BaseException) -> bool:
    """Return whether transformers' own model code failed, or torch called from it."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [file for file in files if "/torch/" not in file.replace("\\", "/")]
    return bool(own) and MODEL_CODE.search(own[-1].replace("\\", "/")) is not None


@contextmanager
def quiet_hub() -> Generator[None]:
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def quiet_transformers() -> Generator[None]:
    level = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), dict(progress_bar_states)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
        progress_bar_states.clear()
        progress_bar_states.update(hub_bars)
