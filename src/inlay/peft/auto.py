"""HF PEFT's `AutoPeftModel…`: the base that an adapter's folder names, loaded, and the adapter."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
from torch import nn

from inlay.peft import by_task
from inlay.peft.folders import HUB
from inlay.peft.model import PeftModel

TAKEN = frozenset({"adapter_name", "is_trainable", "config", "subfolder", *HUB})
"""What of the options belongs to the adapter; the others are the base model's."""


def target(cls: type[PeftModel]) -> Any:
    """Return what HF PEFT's loaders call for the adapter, by the name that they look for."""
    body = {"from_pretrained": staticmethod(partial(load, cls))}
    return type(cls.__name__, (), body)


def load(cls: type[PeftModel], model: nn.Module, folder: str | Path, **options: Any) -> PeftModel:
    """Return a loaded base with an adapter from a folder or the hub."""
    found = {key: value for key, value in options.items() if key in TAKEN}
    return cls.from_pretrained(model, folder, **found)


class AutoPeftModel(peft.AutoPeftModel):
    """A model whose class the adapter's folder names, with the adapter."""

    _target_peft_class = target(PeftModel)


class AutoPeftModelForCausalLM(peft.AutoPeftModelForCausalLM):
    """A causal language model with the adapter."""

    _target_peft_class = target(by_task.PeftModelForCausalLM)


class AutoPeftModelForSeq2SeqLM(peft.AutoPeftModelForSeq2SeqLM):
    """An encoder and a decoder with the adapter."""

    _target_peft_class = target(by_task.PeftModelForSeq2SeqLM)


class AutoPeftModelForSequenceClassification(peft.AutoPeftModelForSequenceClassification):
    """A classifier of sequences with the adapter."""

    _target_peft_class = target(by_task.PeftModelForSequenceClassification)


class AutoPeftModelForTokenClassification(peft.AutoPeftModelForTokenClassification):
    """A classifier of tokens with the adapter."""

    _target_peft_class = target(by_task.PeftModelForTokenClassification)


class AutoPeftModelForQuestionAnswering(peft.AutoPeftModelForQuestionAnswering):
    """A finder of answers in a text with the adapter."""

    _target_peft_class = target(by_task.PeftModelForQuestionAnswering)


class AutoPeftModelForFeatureExtraction(peft.AutoPeftModelForFeatureExtraction):
    """A model of hidden states with the adapter."""

    _target_peft_class = target(by_task.PeftModelForFeatureExtraction)


CLASSES: tuple[Any, ...] = (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)
