"""Other people's libraries while they read a model: quiet, and their failures as sentences."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from inlay.errors import ModelError
from inlay.model.load.hf_quantizer import Stopped


@contextmanager
def failures_as_sentences(folder: Path, what: str) -> Generator[None]:
    """Turn whatever transformers raises over these files into a sentence for the user."""
    try:
        yield
    except Stopped as stopped:
        raise stopped.error from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"the {what} in {folder} cannot be used: {type(error).__name__}: {reason}"
        ) from error


MODEL_CODE = re.compile(
    r"/transformers/(models/|integrations/|loss/|masking_utils|modeling_|utils/|cache_utils|pytorch_utils)"
)
"""The files of transformers that a model's forward is made of."""


def in_model_code(error: BaseException) -> bool:
    """Say whether it was transformers' own code of a model that failed, or torch under it."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    own = [file for file in files if "/torch/" not in file.replace("\\", "/")]
    return bool(own) and MODEL_CODE.search(own[-1].replace("\\", "/")) is not None


@contextmanager
def quiet_hub() -> Generator[None]:
    """Keep the hub client's warnings off the terminal; errors are ours to tell."""
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Keep transformers' progress bars and reports off the terminal; errors are ours to tell."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
