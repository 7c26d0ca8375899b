"""HF PEFT's classes by task, and the one for mixed adapters, of which a wrapped model is one."""

from __future__ import annotations

from typing import Any

import peft

from inlay.peft.model import PeftModel
from inlay.peft.wrapped import BY_TASK

theirs: Any = peft


class PeftModelForCausalLM(PeftModel, theirs.PeftModelForCausalLM):
    """A causal language model with adapters."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the model itself does."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel, theirs.PeftModelForSeq2SeqLM):
    """An encoder and a decoder with adapters."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the model itself does."""
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)


class PeftModelForSequenceClassification(PeftModel, theirs.PeftModelForSequenceClassification):
    """A classifier of sequences with adapters."""


class PeftModelForTokenClassification(PeftModel, theirs.PeftModelForTokenClassification):
    """A classifier of tokens with adapters."""


class PeftModelForQuestionAnswering(PeftModel, theirs.PeftModelForQuestionAnswering):
    """A finder of answers in a text with adapters."""


class PeftModelForFeatureExtraction(PeftModel, theirs.PeftModelForFeatureExtraction):
    """A model of hidden states with adapters."""


class PeftMixedModel(PeftModel, theirs.PeftMixedModel):
    """A model with adapters of several methods, as every `PeftModel` here may have."""


BY_TASK.update(
    MIXED=PeftMixedModel,
    SEQ_CLS=PeftModelForSequenceClassification,
    SEQ_2_SEQ_LM=PeftModelForSeq2SeqLM,
    CAUSAL_LM=PeftModelForCausalLM,
    TOKEN_CLS=PeftModelForTokenClassification,
    QUESTION_ANS=PeftModelForQuestionAnswering,
    FEATURE_EXTRACTION=PeftModelForFeatureExtraction,
)
