"""HF PEFT's interface on Inlay's layers: change the import, keep the script.

`from inlay.peft import get_peft_model, PeftModel` stands for the same line from `peft`. The
configuration objects stay HF PEFT's own.
"""

from __future__ import annotations

from importlib.util import find_spec

from inlay.errors import UsageError

if find_spec("peft") is None:
    raise UsageError(
        "inlay.peft takes HF PEFT's configuration objects, and peft is not installed; install it "
        "with pip install 'inlay[peft]', or use inlay.attach, which needs no peft"
    )

from inlay.peft.inject import inject_adapter_in_model
from inlay.peft.model import PeftModel, get_peft_model
from inlay.peft.patch import take_over
from inlay.peft.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from inlay.peft.task_models import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from inlay.peft.tuner import Tuner

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "Tuner",
    "get_base_model_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "take_over",
]
