"""HF PEFT's model classes by task, and its `AutoPeftModel…` loaders."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
from torch import nn

from inlay.peft.errors import KindError
from inlay.peft.folders import HUB
from inlay.peft.model import PeftModel
from inlay.peft.model_wrapper import BY_TASK

ADAPTER_OPTIONS = frozenset({"adapter_name", "is_trainable", "config", "subfolder", *HUB})
"""The options of a loader that are the adapter's; the others are the base model's."""

theirs: Any = peft


class PeftModelForCausalLM(PeftModel, theirs.PeftModelForCausalLM):
    """A causal language model with adapters."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel, theirs.PeftModelForSeq2SeqLM):
    """An encoder and a decoder with adapters."""

    def generate(self, **kwargs: Any) -> Any:
        """Generate; arguments by name only, as in HF PEFT."""
        return super().generate(**kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSequenceClassification(PeftModel, theirs.PeftModelForSequenceClassification):
    """A classifier of sequences with adapters."""


class PeftModelForTokenClassification(PeftModel, theirs.PeftModelForTokenClassification):
    """A classifier of tokens with adapters."""


class PeftModelForQuestionAnswering(PeftModel, theirs.PeftModelForQuestionAnswering):
    """A model that finds answers in a text, with adapters."""


class PeftModelForFeatureExtraction(PeftModel, theirs.PeftModelForFeatureExtraction):
    """A model of hidden states with adapters."""

    def forward(self, *args: Any, token_type_ids: Any = None, **kwargs: Any) -> Any:
        """Run the model; with a prompt, token_type_ids are left out, as in HF PEFT."""
        if token_type_ids is not None and set(self.prompts()) & set(self.active_adapters):
            warnings.warn(
                "token_type_ids are left out, as HF PEFT does where a prompt is on a model for "
                "feature extraction; every token is of type 0",
                stacklevel=2,
            )
        elif token_type_ids is not None:
            kwargs["token_type_ids"] = token_type_ids
        return super().forward(*args, **kwargs)


class PeftMixedModel(PeftModel, theirs.PeftMixedModel):
    """A model with adapters of several methods, as every `PeftModel` here may have."""

    def check_layers(self, verb: str) -> None:
        raise KindError(f"{verb} is not supported for PeftMixedModel; ask a PeftModel")


BY_TASK.update(
    MIXED=PeftMixedModel,
    SEQ_CLS=PeftModelForSequenceClassification,
    SEQ_2_SEQ_LM=PeftModelForSeq2SeqLM,
    CAUSAL_LM=PeftModelForCausalLM,
    TOKEN_CLS=PeftModelForTokenClassification,
    QUESTION_ANS=PeftModelForQuestionAnswering,
    FEATURE_EXTRACTION=PeftModelForFeatureExtraction,
)


def target(cls: type[PeftModel]) -> Any:
    """Return the class, under its own name, whose `from_pretrained` HF PEFT's loaders call."""
    return type(cls.__name__, (), {"from_pretrained": staticmethod(partial(load, cls))})


def load(cls: type[PeftModel], model: nn.Module, folder: str | Path, **options: Any) -> PeftModel:
    adapters = {key: value for key, value in options.items() if key in ADAPTER_OPTIONS}
    return cls.from_pretrained(model, folder, **adapters)


class AutoPeftModel(peft.AutoPeftModel):
    """A model whose class the adapter's folder names, with the adapter."""

    _target_peft_class = target(PeftModel)


class AutoPeftModelForCausalLM(peft.AutoPeftModelForCausalLM):
    """A causal language model with the adapter."""

    _target_peft_class = target(PeftModelForCausalLM)


class AutoPeftModelForSeq2SeqLM(peft.AutoPeftModelForSeq2SeqLM):
    """An encoder and a decoder with the adapter."""

    _target_peft_class = target(PeftModelForSeq2SeqLM)


class AutoPeftModelForSequenceClassification(peft.AutoPeftModelForSequenceClassification):
    """A classifier of sequences with the adapter."""

    _target_peft_class = target(PeftModelForSequenceClassification)


class AutoPeftModelForTokenClassification(peft.AutoPeftModelForTokenClassification):
    """A classifier of tokens with the adapter."""

    _target_peft_class = target(PeftModelForTokenClassification)


class AutoPeftModelForQuestionAnswering(peft.AutoPeftModelForQuestionAnswering):
    """A model that finds answers in a text, with the adapter."""

    _target_peft_class = target(PeftModelForQuestionAnswering)


class AutoPeftModelForFeatureExtraction(peft.AutoPeftModelForFeatureExtraction):
    """A model of hidden states with the adapter."""

    _target_peft_class = target(PeftModelForFeatureExtraction)


CLASSES: tuple[Any, ...] = (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForFeatureExtraction,
)
