"""What we touch of TRL that it may rename or change: its hooks, in one place.

`tests/model/test_seams.py` holds each hook to the signature that we expect. Modules of TRL are
imported where they are needed: a run of one task does not import the trainers of the others.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from inlay.data.chat import own_template


def score_by_fused_head(model: nn.Module, **asked: Any) -> None:
    """Let TRL put its forward on a model that answers `fused_lm_head=True` with scores."""
    from trl.trainer.utils import add_fused_lm_head

    given: Any = model
    add_fused_lm_head(given, **asked)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return TRL's version of the chat template that marks the assistant's words.

    None when the tokenizer's own does, or when TRL does not know it; the assistant's words are
    then found by what each turn adds.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    from trl.chat_template_utils import get_training_chat_template

    if own_template(tokenizer) != tokenizer.chat_template:
        return None  # one of several, which TRL does not look among
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


@contextmanager
def checkpointing_left_on() -> Generator[None]:
    """Keep GRPO's trainer from switching activation checkpointing off for its rollouts."""
    from trl.trainer import grpo_trainer

    trl: Any = grpo_trainer
    before = trl.disable_gradient_checkpointing
    trl.disable_gradient_checkpointing = lambda *model: nullcontext()
    try:
        yield
    finally:
        trl.disable_gradient_checkpointing = before
