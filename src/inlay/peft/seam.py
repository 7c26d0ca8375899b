"""What we touch of HF PEFT beside its own top-level names: its hooks, in one place.

`tests/model/test_seams.py` holds each hook to what we expect.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.peft_model import TunerLayerStatus, TunerModelStatus
from peft.tuners import ia3, lora
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    save_and_load,
)
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import _get_module_names_tied_with_embedding as tied_with_embedding  # pyright: ignore[reportPrivateUsage]
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

__all__ = [
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",
    "TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING",
    "BaseTuner",
    "LNTuningLayer",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "TrainableTokensLayer",
    "TrainableTokensWrapper",
    "TunerLayerStatus",
    "TunerModelStatus",
    "check_target_module_exists",
    "convert_peft_config_for_transformers",
    "ia3",
    "lora",
    "save_and_load",
    "tied_with_embedding",
]
