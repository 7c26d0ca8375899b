"""Every private part of transformers that Inlay touches; transformers may rename or change them.

`tests/model/test_seams.py` checks that each one exists and behaves as expected here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import Tensor, nn
from transformers import (
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    conversion_mapping,
)  # fmt: skip
from transformers.activations import SiLUActivation
from transformers.core_model_loading import ConversionOps
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.generic import ModelOutput
from transformers.utils.quantization_config import QuantizationConfigMixin

from inlay.model.seams.imports import when_imported

__all__ = [
    "ConversionOps", "ForCausalLMLoss", "GradientCheckpointingLayer", "HfQuantizer",
    "LlamaDecoderLayer", "LlamaMLP", "LlamaRMSNorm", "ModelOutput", "QuantizationConfigMixin",
    "SiLUActivation", "get_keys_to_not_convert", "no_init_weights", "sdpa_attention_forward",
    "sdpa_mask",
]  # fmt: skip

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a forward calls its key-value cache where it does not say so by a type."""
READS_CACHE = "_can_checkpoint_with_cache"
"""A block's attribute: it only reads the key-value cache, so that it may be recomputed."""
CHECKPOINTING = "gradient_checkpointing"
"""A module's attribute: its activations are recomputed in the backward pass."""
TIES = "_tied_weights_keys"
"""Attribute of a class or module: tied parameter -> the parameter that it is tied to."""
INITIALISED = "_is_hf_initialized"
"""Attribute of a layer or parameter whose values the loader leaves alone."""
SDPA, EAGER = "sdpa", "eager"
"""The names of torch's own attention, and of one that is written out."""
TRAINER, RESUMES, TAKES_BEST = (
    "transformers.trainer", "_load_from_checkpoint", "_load_best_model",
)  # fmt: skip
"""The module of Trainer, and its methods that put a checkpoint's values into the model."""

Undo = Callable[[], None]
Restore = Callable[[nn.Module, Path], bool]
"""Put the adapters of a checkpoint into a model; False where it is none of this model's."""


# Attention


class MakesMask(Protocol):
    """A function that transformers asks for the mask of one kind of layer."""

    def __call__(self, batch_size: int, q_length: int, kv_length: int, **more: Any) -> Any: ...


def register_attention(name: str, attention: Callable[..., Any], mask: MakesMask) -> Undo:
    """Register an attention and its masks by name; the undo resets configurations to sdpa."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)

    def undo() -> None:
        for config in naming.pop(name, WeakValueDictionary()).values():
            if attention_of(config) == name:
                set_attention(config, SDPA)
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(name, None)  # pyright: ignore[reportPrivateUsage]

    return undo


naming: dict[str, WeakValueDictionary[int, Any]] = {}
"""Name of a registered attention -> the configurations that were set to it, by id."""


def attention_of(config: Any) -> str | None:
    return getattr(config, "_attn_implementation", None)


def set_attention(config: Any, name: str) -> None:
    config._attn_implementation = name
    if name not in (SDPA, EAGER):
        naming.setdefault(name, WeakValueDictionary())[id(config)] = config


# The key-value cache


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """Return which argument of a forward is the key-value cache: the one typed so, else by name.

    >>> from transformers import LlamaForCausalLM
    >>> cache_argument(LlamaForCausalLM.forward) in CACHE_NAMES
    True
    """
    parameters = inspect.signature(forward).parameters
    typed = [n for n, p in parameters.items() if "Cache" in str(p.annotation)]
    named = [n for n in CACHE_NAMES if n in parameters]
    return next(iter([*typed, *named]), None)


def cache_in(values: Iterable[Any]) -> Cache | None:
    return next((v for v in values if isinstance(v, Cache)), None)


def has_cache(call: Mapping[str, Any]) -> bool:
    named = any(call.get(name) is not None for name in CACHE_NAMES)
    return named or cache_in(call.values()) is not None


def cache_field(output: type[Any]) -> str:
    fields = inspect.signature(output).parameters
    return next((name for name in CACHE_NAMES if name in fields), CACHE_NAMES[0])


# Loading


def register_quantizer(
    name: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]
) -> Undo:
    configs: dict[str, Any] = AUTO_QUANTIZATION_CONFIG_MAPPING
    quantizers: dict[str, Any] = AUTO_QUANTIZER_MAPPING
    configs[name], quantizers[name] = config, quantizer

    def undo() -> None:
        del configs[name], quantizers[name]

    return undo


def release_quantizer(
    model: PreTrainedModel, quantizer: HfQuantizer, keep: Callable[[Any], bool]
) -> None:
    """Take a loader's quantizer off a model; keep those of its weight conversions that `keep`."""
    loaded: Any = model
    conversions = getattr(loaded, "_weight_conversions", None)
    quantizer.remove_quantization_config(model)
    if conversions is not None:
        loaded._weight_conversions = [c for c in conversions if keep(c)]


def mark_initialised(tensor_or_layer: Tensor | nn.Module, done: bool) -> None:
    vars(tensor_or_layer).pop(INITIALISED, None)
    vars(tensor_or_layer).update({INITIALISED: True} if done else {})


def initialise_weights(model: PreTrainedModel, module: nn.Module) -> None:
    private: Any = model
    private._init_weights(module)


def kept_in_full(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parts of names of modules that a model keeps in float32."""
    return tuple(getattr(model, "_keep_in_fp32_modules", None) or ())


def built_empty(made_as: Any, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    return made_as._from_config(config, dtype=dtype)


def classes_of(auto: Any, config: PreTrainedConfig) -> Any:
    return getattr(auto, "_model_mapping", {}).get(type(config), None)


def family_of_experts(config: Any) -> str | None:
    """Return the family whose conversion of experts a configuration's model type has, or None."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        return None
    table: dict[str, str] = {
        **getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}),
        "mixtral": "mixtral",
    }
    converts: Any = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", None)
    if converts is not None and converts(kind) is None:
        return None
    return table.get(kind)


def renaming(model: nn.Module) -> Callable[[str], str] | None:
    table: Any = getattr(conversion_mapping, "get_model_conversion_mapping", None)
    if not isinstance(model, PreTrainedModel) or table is None:
        return None
    renames = [c for c in table(model) if type(c).__name__ == "WeightRenaming"]

    def renamed(name: str) -> str:
        for each in renames:
            name = each.rename_source_key(name)[0]
        return name

    return renamed if renames else None


class NoVideos(dict[str, Any]):
    """Takes the place of a processor's video processor, which needs torchvision."""

    model_input_names: tuple[str, ...] = ()
    _auto_class = None
    num_frames: int | None = None
    fps: float | None = None
    """As `num_frames`, read by SmolVLM's processor whether there is a video or not."""


@contextmanager
def no_video_class() -> Generator[None]:
    """Let a processor be built without its video processor, whose class needs torchvision."""
    mixin: Any = ProcessorMixin
    before = vars(mixin)["get_possibly_dynamic_module"]

    def found(name: str) -> Any:
        return NoVideos if "VideoProcessor" in name else before.__func__(name)

    mixin.get_possibly_dynamic_module = staticmethod(found)
    try:
        yield
    finally:
        mixin.get_possibly_dynamic_module = before


# Tied weights


def tied_weights(model: nn.Module) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", {})


def declared_ties(model: PreTrainedModel, all_submodels: bool) -> dict[str, str]:
    return model.get_expanded_tied_weights_keys(all_submodels=all_submodels)


def declare_ties(module: nn.Module, ties: dict[str, str]) -> None:
    vars(module)[TIES] = ties


# Gradient checkpointing


def checkpoint_blocks(model: PreTrainedModel, function: Callable[..., Any] | None) -> None:
    """Have a function run the model's blocks in training; None: they run and keep everything."""
    private: Any = model
    if function is None:
        private._set_gradient_checkpointing(enable=False)
    else:
        private._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


def checkpointing_function(module: nn.Module) -> Any:
    on = getattr(module, CHECKPOINTING, False)
    return getattr(module, "_gradient_checkpointing_func", None) if on else None


def input_gradients_required(model: nn.Module) -> bool:
    return bool(getattr(model, "_require_grads_hooks", None))


# Trainer


def restore_by(restore: Restore) -> Undo:
    """Have Trainer restore adapters by this function; return what undoes it.

    Trainer is not imported for it, which would take as much memory as all of a small model's
    training: its methods are wrapped once somebody imports it.
    """
    wrapped: list[tuple[Any, str, Any, Any]] = []
    stop = when_imported(TRAINER, lambda module: wrapped.extend(wrap(module.Trainer, restore)))

    def undo() -> None:
        stop()
        for owner, name, theirs, ours in wrapped:
            if vars(owner)[name] is ours:  # nobody has replaced it since
                setattr(owner, name, theirs)

    return undo


def wrap(trainer: Any, restore: Restore) -> Iterator[tuple[Any, str, Any, Any]]:
    """Wrap Trainer's two methods; yield class, name, what the method was, what it is."""
    resume, best = vars(trainer)[RESUMES], vars(trainer)[TAKES_BEST]

    @wraps(resume)
    def resumed(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
        target = self.model if model is None else model
        if not restore(target, Path(resume_from_checkpoint)):
            return resume(self, resume_from_checkpoint, model)
        return None

    @wraps(best)
    def took_best(self: Any) -> Any:
        if not restore(self.model, Path(self.state.best_model_checkpoint)):
            return best(self)
        return None

    for name, theirs, ours in ((RESUMES, resume, resumed), (TAKES_BEST, best, took_best)):
        setattr(trainer, name, ours)
        yield trainer, name, theirs, ours
